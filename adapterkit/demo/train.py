"""Training in plain torch: a linear head on the frozen encoder, and an adapter with a head of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

import adapterkit as ak
from adapterkit.demo.data import Dataset, weights

NAME = "demo"
METHOD = ak.LoRAConfig(r=16, targets=("q", "k", "v", "o", "up", "down"))
READ = 32
"""Texts in a batch that is only read."""

TOKENS = 32
"""Longer texts are cut: a statement shows its kind early, and the time grows with the length."""

PENALTIES = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003)

Tick = Callable[[], object]
"""Called after each batch, for the progress bar."""


@dataclass(frozen=True)
class Settings:
    """Size of the job."""

    train: int = 120
    """Texts for training, for each class."""
    test: int = 50
    """Texts held out, for each class."""
    epochs: int = 2
    batch: int = 16
    rate: float = 2e-3
    head_rate: float = 1e-2
    """Learning rate of the head: it starts at random, and what the pooler gives it is small."""

    def steps(self, texts: int) -> int:
        """Batches of all epochs."""
        return self.epochs * -(-texts // self.batch)


QUICK = Settings(train=8, test=5, epochs=1)
"""Shows that everything runs, learns nothing worth speaking of."""


class Encoder:
    """The packaged tokenizer, and models with the packaged weights."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.directory = weights()
        self.classes = classes
        with quiet():
            self.tokenizer: Any = AutoTokenizer.from_pretrained(self.directory, local_files_only=True)

    def fresh(self, seed: int = 0) -> nn.Module:
        """A model as it comes: pretrained encoder and pooler, random head.

        Without dropout in the encoder: it is frozen, so that there is nothing to regularise but noise to add.
        """
        torch.manual_seed(seed)
        with quiet():
            model: nn.Module = AutoModelForSequenceClassification.from_pretrained(
                self.directory,
                local_files_only=True,
                num_labels=len(self.classes),
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
        return model.eval()

    def batch(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Model inputs: (B, T) with T up to TOKENS."""
        options = {"padding": True, "truncation": True, "max_length": TOKENS, "return_tensors": "pt"}
        return dict(self.tokenizer(list(texts), **options))


@contextmanager
def quiet() -> Iterator[None]:
    """No bars and no notes on new heads from the libraries: the console belongs to the demo."""
    bars, level = transformers_logging.is_progress_bar_enabled(), logging.root.manager.disable
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)
        if bars:
            transformers_logging.enable_progress_bar()


# -- head only


@torch.no_grad()
def features(model: nn.Module, encoder: Encoder, texts: Sequence[str], tick: Tick) -> dict[str, Tensor]:
    """What the frozen encoder says of each text, (N, D).

    The class's own head reads the pooler. The mean over tokens is what this encoder was pretrained for and
    the better input for a head: without it, the comparison would flatter the adapter.
    """
    pooled, means = [], []
    for rows in torch.arange(len(texts)).split(READ):
        inputs = encoder.batch([texts[row] for row in rows])
        out = model.base_model(**inputs)  # type: ignore[operator]
        mask = inputs["attention_mask"].unsqueeze(-1)
        pooled.append(out.pooler_output)
        means.append((out.last_hidden_state * mask).sum(1) / mask.sum(1))
        tick()
    return {"pooler": torch.cat(pooled), "mean of tokens": torch.cat(means)}


def fit_head(x: Tensor, labels: Tensor, documents: Sequence[str]) -> nn.Linear:
    """The best linear head on fixed features (N, D): logistic regression, solved to the end.

    The penalty is the one that does best on a quarter of the training documents, set aside for this choice.
    The problem is convex: there is no seed and no learning rate that a better head could come from.
    """
    names = sorted(set(documents))
    aside = torch.tensor([names.index(document) % 4 == 0 for document in documents])
    classes = int(labels.max()) + 1

    def score(penalty: float) -> float:
        return accuracy(_solve(x[~aside], labels[~aside], classes, penalty)(x[aside]), labels[aside])

    return _solve(x, labels, classes, max(PENALTIES, key=score))


def _solve(x: Tensor, labels: Tensor, classes: int, penalty: float) -> nn.Linear:
    """Minimum of cross-entropy + penalty / 2 * mean over classes of |W_c|^2.

    W acts on standardised features; what standardises them is folded into the head at the end.
    """
    mean, std = x.mean(0), x.std(0)
    z = ((x - mean) / std).double()
    weight = torch.zeros(classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> float:
        optimizer.zero_grad()
        value = F.cross_entropy(z @ weight.T + bias, labels) + penalty / 2 * weight.square().sum() / classes
        value.backward()
        return float(value.detach())

    optimizer.step(loss)
    head = nn.Linear(x.shape[1], classes)
    with torch.no_grad():
        head.weight.copy_(weight / std)
        head.bias.copy_(bias - head.weight.double() @ mean.double())
    return head.requires_grad_(False)


# -- the adapter


def attach(model: nn.Module, seed: int) -> ak.Kit:
    """LoRA on all linear maps of the encoder, with its own copy of the head; all else is frozen."""
    return ak.attach(model, METHOD, name=NAME, seed=seed)


def load(model: nn.Module, directory: Path) -> ak.Kit:
    """The saved adapter, in another model with the same base weights."""
    return ak.load(model, directory)


def fit_adapter(
    kit: ak.Kit,
    encoder: Encoder,
    texts: Sequence[str],
    labels: Tensor,
    settings: Settings,
    seed: int,
    tick: Tick,
) -> None:
    """Train what requires a gradient: AdamW with a short warm-up and a cosine down to zero."""
    model = kit.model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    head = {parameter for module in kit[NAME].heads.values() for parameter in module.parameters()}
    groups = [[p for p in trained if p not in head], [p for p in trained if p in head]]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups], weight_decay=0.01)
    rates, steps = [settings.rate, settings.head_rate], settings.steps(len(texts))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps, pct_start=0.1)
    order = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(settings.epochs):
        for rows in torch.randperm(len(texts), generator=order).split(settings.batch):
            logits = model(**encoder.batch([texts[row] for row in rows])).logits
            optimizer.zero_grad()
            F.cross_entropy(logits, labels[rows]).backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            tick()
    model.eval()


@torch.no_grad()
def predict(model: nn.Module, encoder: Encoder, texts: Sequence[str], tick: Tick) -> Tensor:
    """Logits (N, classes)."""
    found = []
    for rows in torch.arange(len(texts)).split(READ):
        found.append(model(**encoder.batch([texts[row] for row in rows])).logits)
        tick()
    return torch.cat(found)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of the rows whose highest logit is that of the label."""
    return int((logits.argmax(-1) == labels).sum()) / len(labels)


def side(dataset: Dataset, indices: Sequence[int]) -> tuple[list[str], Tensor]:
    """Texts and labels of one side of the split."""
    return [dataset.texts[i] for i in indices], torch.tensor([dataset.labels[i] for i in indices])
