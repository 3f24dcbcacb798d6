"""How far the tools reach: every model type of transformers, built tiny, observed, drafted, proved.

    python -m benchmarks.reach                         # all types, two at a time; about half an hour
    python -m benchmarks.reach --types bert gpt2       # some
    python -m benchmarks.reach --jobs 16 --out r.jsonl # what is in the file already is not run again
    python -m benchmarks.reach --shard 1/4 --out r1.jsonl
    python -m benchmarks.reach --report r*.jsonl       # the numbers of all shards

Prints four numbers: built tiny, ran with attention, drafted completely, and drafted and passing the laws of
LoRA / of all columns. Each type runs in a process that is ended after `--limit` seconds. No network.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def types() -> list[str]:
    """Every model type that AutoModel knows."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    return sorted(MODEL_MAPPING_NAMES)


# ------------------------------------------------------------------------------------------- one model type


def reach(model_type: str, methods: bool = True) -> Record:
    """How far one model type gets."""
    from adapterkit.author import draft, tiny
    from adapterkit.author.observe import observe
    from adapterkit.errors import AdapterkitError

    record: Record = {"type": model_type, "built": False, "ran": False, "attention": 0, "complete": False}
    try:
        model, inputs = tiny.build(model_type)
    except AdapterkitError as error:
        message = error.problems[0].message
        return record | {"built": "no inputs were found" in message, "why": message}
    record |= {"built": True, "ran": True, "inputs": sorted(inputs)}
    record["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    record["attention"] = len(observe(model, inputs).attentions)
    if not record["attention"]:
        return record
    try:
        found = draft.of_model(model, inputs, like=False)
    except AdapterkitError as error:
        return record | {"why": str(error)}
    record["complete"] = found.is_complete
    record["gaps"] = [f"{'.'.join(loc)}: {text}" for loc, text in found.notes.gaps]
    record["stacks"] = list(found.data["stacks"])
    if methods and found.is_complete:
        record["columns"] = columns(found)
    return record


NINE = (
    "lora",
    "bottleneck",
    "compacter",
    "prefix_tuning",
    "prompt_tuning",
    "reft",
    "invertible",
    "fusion",
    "parallel",
)
"""The columns of the usual table of methods."""


def columns(found: Any) -> dict[str, str]:
    """Every column of methods: '' if all its laws hold, else why not."""
    from adapterkit.author.prove import prove_method
    from adapterkit.author.scene import Scene
    from adapterkit.model.resolve import resolve

    scene = Scene(type(found.model).__name__, found.model, found.inputs)
    blueprint = resolve(found.model, found.interface)
    verdicts = (prove_method(name, found.interface, scene, blueprint) for name in NINE)
    return {one.method: "" if one.state == "proved" else f"{one.state}: {one.reason}" for one in verdicts}


# ------------------------------------------------------------------------------------------------ processes


def _serve(link: Connection, methods: bool) -> None:
    """One process: model types in, records out."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    sys.stdout = sys.stderr = Path(os.devnull).open("w", encoding="utf-8")
    warnings.simplefilter("ignore")
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    link.send(None)
    while True:
        model_type = link.recv()
        try:
            record = reach(model_type, methods)
        except Exception as error:  # a model may raise anything; that is a result
            record = {
                "type": model_type,
                "why": f"{type(error).__name__}: {str(error)[:300]}",
                "crashed": True,
            }
        link.send(record)


class _Worker:
    """A process that is replaced when it hangs or dies."""

    def __init__(self, methods: bool, limit: float) -> None:
        self.methods, self.limit = methods, limit
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.link, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, self.methods), daemon=True)
        self.process.start()
        other.close()
        self.type: str | None = None
        self.since = time.monotonic()
        self.ready = False

    def give(self, model_type: str) -> None:
        self.type, self.since = model_type, time.monotonic()
        self.link.send(model_type)

    def take(self) -> Record | None:
        """What it found; None if it has only just started."""
        try:
            record = self.link.recv()
        except EOFError:
            return self.replace("the process died")
        self.ready = True
        if record is None:
            return None
        record["seconds"] = round(time.monotonic() - self.since, 2)
        self.type = None
        return dict(record)

    @property
    def is_late(self) -> bool:
        return self.type is not None and time.monotonic() - self.since > self.limit

    def replace(self, why: str) -> Record:
        record = {"type": self.type, "why": why, "crashed": True, "seconds": time.monotonic() - self.since}
        self.process.kill()
        self.process.join()
        self.start()
        return record


def run(wanted: Iterable[str], jobs: int, limit: float, methods: bool) -> Iterator[Record]:
    """Records as they come."""
    left = list(wanted)[::-1]
    workers = [_Worker(methods, limit) for _ in range(min(jobs, len(left)))]
    while left or any(worker.type for worker in workers):
        for worker in workers:
            if worker.ready and worker.type is None and left:
                worker.give(left.pop())
        links = [worker.link for worker in workers]
        for link in wait(links, timeout=1.0):
            worker = next(one for one in workers if one.link is link)
            record = worker.take()
            if record is not None and record["type"] is not None:
                yield record
        for worker in workers:
            if worker.is_late:
                yield worker.replace(f"not done after {limit:g} seconds")
    for worker in workers:
        worker.process.kill()


# --------------------------------------------------------------------------------------------------- report


def report(records: list[Record]) -> str:
    """The four numbers, and what stopped the others, most frequent first."""
    attention = [r for r in records if r.get("attention")]
    complete = [r for r in attention if r.get("complete")]
    proved = [r for r in complete if r.get("columns")]
    lora = [r for r in proved if r["columns"].get("lora") == ""]
    every = [r for r in proved if not any(r["columns"].values())]
    rows = [
        ("model types", len(records), 0),
        ("built tiny", sum(bool(r.get("built")) for r in records), len(records)),
        ("ran", sum(bool(r.get("ran")) for r in records), len(records)),
        ("ran with attention", len(attention), len(records)),
        ("drafted completely", len(complete), len(attention)),
        ("  ... passing the laws of LoRA", len(lora), len(attention)),
        ("  ... of all columns", len(every), len(attention)),
    ]
    lines = [
        f"{name:34}{count:5}" + (f"  {count / of:6.1%} of {of}" if of else "") for name, count, of in rows
    ]
    reasons = Counter(
        _class(g) for r in attention if not r.get("complete") for g in r.get("gaps") or [r.get("why", "")]
    )
    lines += ["", "what drafts lack", *(f"{count:5}  {text}" for text, count in reasons.most_common(25))]
    broken = Counter(f"{m}: {_class(w)}" for r in proved for m, w in r["columns"].items() if w)
    lines += ["", "what breaks a column", *(f"{count:5}  {text}" for text, count in broken.most_common(40))]
    return "\n".join(lines)


def _class(text: str) -> str:
    """A reason without the names of modules and numbers."""
    import re

    return re.sub(r"\b[\w.]*\.[\w.]+\b|\d+", "*", text)[:150]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--types", nargs="*", help="model types; default: all")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for one type")
    parser.add_argument("--shard", default="1/1", help="this part of the types, such as 2/4")
    parser.add_argument("--out", type=Path, help="records, one JSON object a line; those there are kept")
    parser.add_argument("--again", action="store_true", help="run those that failed again")
    parser.add_argument("--no-methods", action="store_true", help="stop after the drafts")
    parser.add_argument("--report", nargs="+", type=Path, help="print the numbers of these files only")
    given = parser.parse_args()
    if given.report:
        print(report(list(_read(given.report).values())))
        return
    part, parts = map(int, given.shard.split("/"))
    wanted = (given.types or types())[part - 1 :: parts]
    known = _read([given.out] if given.out else [])
    if given.again:
        known = {name: r for name, r in known.items() if r.get("columns") and not any(r["columns"].values())}
    missing = [name for name in wanted if name not in known]
    for record in run(missing, given.jobs, given.limit, not given.no_methods):
        known[record["type"]] = record
        if given.out:
            with given.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
    print(report([known[name] for name in wanted if name in known]))


def _read(paths: list[Path]) -> dict[str, Record]:
    """Records by type, the latest of each."""
    lines = (
        line for path in paths if path.exists() for line in path.read_text(encoding="utf-8").splitlines()
    )
    return {record["type"]: record for record in map(json.loads, lines)}


if __name__ == "__main__":
    main()
