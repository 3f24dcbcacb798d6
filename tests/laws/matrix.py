"""What the laws are tried on: families x classes x methods, and what is known of each from elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import adapterkit as ak
from tests.models import tiny

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "targets": "all", "r": 4, "alpha": 6},
    "ia3": {"method": "ia3"},
    "vera": {"method": "vera", "targets": "all", "r": 6},
    "dora": {"method": "dora", "targets": "all", "r": 4, "alpha": 6},
    "dvora": {"method": "dvora", "targets": "all", "r": 6},
    "mtl_lora": {
        "method": "mtl_lora",
        "targets": "all",
        "r": 4,
        "alpha": 6,
        "n_up": 2,
        "task_matrix": "full",
    },
}
CUSTOM = Path(__file__).parent.parent / "models" / "custom.yaml"
TASKS = ("Classification", "Classifier", "CausalLM", "ConditionalGeneration")
# what has a head on top of the base, by the last words of its name; the path to the vocabulary is no head
HEADED = (
    "Classification",
    "Classifier",
    "QuestionAnswering",
    "MultipleChoice",
    "NextSentencePrediction",
    "SemanticSegmentation",
)

_NO_STATES = "no encoder states are given, so the cross-attention is not called"
_UNUSED_LAYER = "its head reads the states before each of four layers, so nothing reads those after the last"
# class -> {start of an address: why what is there cannot move the output}
UNREACHED: dict[str, dict[str, str]] = {
    **{
        f"{family}ForCausalLM": {f"decoder.{i}.cross_attention.": _NO_STATES for i in (0, 1)}
        for family in ("Bart", "MBart", "PLBart")
    },
    "BeitForSemanticSegmentation": {"encoder.3.": _UNUSED_LAYER},
}


@dataclass(frozen=True)
class Case:
    """One class of a family with one method."""

    row: str
    cls: str
    method: str
    variant: str = ""

    def __str__(self) -> str:
        return "-".join(part for part in (self.row, self.cls, self.method, self.variant) if part)

    @property
    def config(self) -> dict[str, Any]:
        return METHODS[self.method]

    @property
    def interface(self) -> Path | None:
        return CUSTOM if self.row == "custom" else None

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A fresh model in eval mode, always the same weights."""
        return copy.deepcopy(_template(self.row, self.cls, self.variant, dtype))

    def inputs(
        self, dtype: torch.dtype = torch.float32, *, labels: bool = False, padded: bool = True
    ) -> dict[str, Any]:
        given = tiny.inputs(self.row, self.cls, labels=labels, padded=padded)
        return {key: value.to(dtype) if value.is_floating_point() else value for key, value in given.items()}

    def attach(self, model: nn.Module, **options: Any) -> ak.Kit:
        return ak.attach(model, self.config, interface=self.interface, seed=0, **options)

    def attached(self, dtype: torch.dtype = torch.float32) -> ak.Kit:
        """A fresh model whose adapter is away from its start."""
        kit = self.attach(self.model(dtype))
        randomise(kit)
        return kit

    @property
    def headed(self) -> bool:
        return self.cls.endswith(HEADED)

    def unreached(self, name: str) -> bool:
        """Whether a tensor of this name ('address.tensor') cannot move the output of the class."""
        return name.startswith(tuple(UNREACHED.get(self.cls, ())))


@lru_cache(maxsize=4)
def _template(row: str, cls: str, variant: str, dtype: torch.dtype) -> nn.Module:
    return tiny.build(row, cls, dtype=dtype, **(tiny.ROWS[row].variants[variant] if variant else {}))


def default_classes(row: str) -> tuple[str, ...]:
    """The base class, and the first that has a head and takes labels."""
    base, *others = tiny.classes(row)
    tasks = (cls for task in TASKS for cls in others if cls.endswith(task))
    return (base, *list(tasks)[:1])


def generating(row: str) -> tuple[str, ...]:
    return tuple(cls for cls in tiny.classes(row) if tiny.can_generate(row, cls))


def cases() -> Iterator[tuple[Case, bool]]:
    """Every case, and whether it belongs to the full matrix only."""
    for row, found in tiny.ROWS.items():
        for variant in ("", *found.variants):
            for cls in tiny.classes(row):
                for method in METHODS:
                    yield Case(row, cls, method, variant), bool(variant) or cls not in default_classes(row)


def generating_cases() -> Iterator[tuple[Case, bool]]:
    """Every case that can generate; the first such class of each family is in the default run."""
    for case, _ in cases():
        able = generating(case.row)
        if case.cls in able:
            yield case, bool(case.variant) or case.cls != able[0]


def headed_cases() -> Iterator[tuple[Case, bool]]:
    """Every class with a head, with one method: heads do not depend on it."""
    return ((case, full) for case, full in cases() if case.headed and case.method == "lora")


@torch.no_grad()
def randomise(kit: ak.Kit, name: str = "default", *, heads: bool = True, seed: int = 7) -> None:
    """Move every tensor that the adapter trains; the frozen ones, shared by all its units, stay."""
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in kit[name].named_parameters():
        if not key.startswith("shared.") and (heads or not key.startswith("head.")):
            tensor.add_((0.1 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype))


def run(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """The main outputs as one flat tensor, without gradients.

    With them the bits may differ for reasons of torch: it has one attention kernel for a mask that needs a
    gradient (relative positions of T5 and BEiT, before they are frozen) and another for one that does not.
    """
    with torch.no_grad():
        return tiny.output(model(**inputs))


def loss(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """The losses of a class with labels, else a weighted sum of the outputs."""
    result = model(**inputs)
    losses = [value for name, value in result.items() if name.endswith("loss")]
    if losses:
        return torch.stack(losses).sum()
    out = tiny.output(result)
    return (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(3))).sum()
