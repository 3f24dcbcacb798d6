"""The whole job on real input, offline: pretrained weights, real text, training, and a file read again."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from adapterkit.demo.data import Dataset

WANTED = 0.05
"""By how much LoRA has to beat the best linear head on the frozen encoder, for every seed."""


@dataclass(frozen=True)
class DemoResult:
    """Accuracy on texts that were held out, and what became of the file."""

    majority: float
    heads: Mapping[str, float]
    """Head only: what it reads from the frozen encoder -> accuracy. It is solved exactly, without a seed."""
    lora: tuple[float, ...]
    """LoRA with a head of its own, for each seed."""
    trained: int
    """Numbers that LoRA trains."""
    same_after_load: bool
    """Whether every adapter, saved and loaded into a fresh model, gave all logits again."""
    seconds: float

    @property
    def margins(self) -> tuple[float, ...]:
        """For each seed, how far LoRA is above the better head."""
        return tuple(accuracy - max(self.heads.values()) for accuracy in self.lora)

    @property
    def passed(self) -> bool:
        return self.same_after_load and min(self.margins) >= WANTED


def run(seeds: int = 3, quick: bool = False, console: Console | None = None) -> DemoResult:
    """Train and print. `quick` shows that everything runs, on so few texts that the numbers mean nothing.

    Raises: AdapterkitError: the packaged weights or the sources of the standard library are missing.
    """
    from adapterkit.demo import data

    start = time.perf_counter()
    console = console or Console()
    # what is missing is said before the libraries are loaded, which takes a while
    data.weights()
    console.print("Which keyword began a statement of Python's library? Pretrained MiniLM, no network.")

    import torch

    from adapterkit.demo import train

    settings = train.QUICK if quick else train.Settings()
    encoder = train.Encoder(data.CLASSES)
    dataset = data.load(settings.train, settings.test)
    _introduce(console, dataset)
    texts, labels = train.side(dataset, dataset.train)
    held_out, answers = train.side(dataset, dataset.test)
    lora, same = [], True
    with torch.random.fork_rng(devices=[]), TemporaryDirectory() as directory, _progress(console) as progress:
        task = progress.add_task("head only", total=None)

        def tick() -> None:
            progress.advance(task)

        model = encoder.fresh()
        seen = train.features(model, encoder, texts, tick)
        unseen = train.features(model, encoder, held_out, tick)
        documents = [dataset.documents[i] for i in dataset.train]
        heads = {}
        for name in seen:
            head = train.fit_head(seen[name], labels, documents)
            heads[name] = train.accuracy(head(unseen[name]), answers)
        steps = settings.steps(len(texts)) + 2 * -(-len(held_out) // train.READ)
        progress.update(task, total=seeds * steps, completed=0)
        for seed in range(seeds):
            progress.update(task, description=f"LoRA, seed {seed}")
            model = encoder.fresh(seed)
            kit = train.attach(model, seed)
            if seed == 0:
                progress.console.print(escape(kit.summary()), highlight=False)
            train.fit_adapter(kit, encoder, texts, labels, settings, seed, tick)
            logits = train.predict(model, encoder, held_out, tick)
            lora.append(train.accuracy(logits, answers))
            # another seed gives the fresh model another random head: what it knows comes from the file
            saved = kit.save(Path(directory) / str(seed), train.NAME)
            again = train.load(encoder.fresh(seed + 1), saved)
            same &= torch.equal(train.predict(again.model, encoder, held_out, tick), logits)
    result = DemoResult(
        majority=Counter(answers.tolist()).most_common(1)[0][1] / len(answers),
        heads=heads,
        lora=tuple(lora),
        trained=kit[train.NAME].num_parameters,
        same_after_load=same,
        seconds=time.perf_counter() - start,
    )
    _report(console, result)
    return result


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description:14}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)


def _introduce(console: Console, dataset: Dataset) -> None:
    """The two sides of the split, and three texts."""
    console.print(f"{len(dataset.classes)} classes", highlight=False)
    for word, side in (("training", dataset.train), ("held out", dataset.test)):
        documents = {dataset.documents[i] for i in side}
        console.print(f"{word}: {len(side)} texts from {len(documents)} modules", highlight=False)
    for name in ("if", "for", "with"):
        i = next(i for i in dataset.train if dataset.classes[dataset.labels[i]] == name)
        console.print(f"  ___ {escape(dataset.texts[i])}  [dim]-> {name}[/dim]", highlight=False)


def _report(console: Console, result: DemoResult) -> None:
    table = Table(box=None, header_style="bold")
    table.add_column("accuracy on modules held out, %")
    for seed in range(len(result.lora)):
        table.add_column(f"seed {seed}", justify="right")
    rows = {"majority class": [result.majority] * len(result.lora)}
    for name, accuracy in result.heads.items():
        rows[f"head only, on the {name}"] = [accuracy] * len(result.lora)
    rows[f"LoRA, {result.trained:,} parameters"] = list(result.lora)
    for row, values in rows.items():
        table.add_row(row, *(f"{100 * value:.1f}" for value in values))
    table.add_row("LoRA above the better head", *(f"{100 * margin:+.1f}" for margin in result.margins))
    console.print(table)
    same = "equal" if result.same_after_load else "[bold red]NOT equal[/bold red]"
    message = f"Saved, loaded into a fresh model: all predictions {same}. {result.seconds:.0f} seconds."
    console.print(message, highlight=False)
