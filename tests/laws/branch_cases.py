"""The methods that act between sublayers, on every family: cases for the tests of their laws."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import adapterkit as ak
from tests.laws import matrix
from tests.models import tiny

# smooth activations, so that no unit is dead by chance; widths that the tiny models can be divided by
_SMOOTH = {"non_linearity": "gelu"}
_NICE = {"method": "invertible", **_SMOOTH}
_BOTTLENECK = {"reduction_factor": 4, **_SMOOTH}
# tied: behind the last layer many heads read the first position only, or the last
_REFT = {"prefix_positions": 3, "suffix_positions": 2, "tied_weights": True, "r": 2}
METHODS: dict[str, dict[str, Any]] = {
    "seq_bn": {"method": "seq_bn", **_BOTTLENECK},
    "double_seq_bn": {"method": "double_seq_bn", "reduction_factor": 4},
    "par_bn": {"method": "par_bn", **_BOTTLENECK},
    "scaled_par_bn": {"method": "scaled_par_bn", **_BOTTLENECK},
    "adapterplus": {"method": "adapterplus", "reduction_factor": 8},
    "compacter": {"method": "compacter", "reduction_factor": 4},
    "compacter++": {"method": "compacter++", "reduction_factor": 4},
    "seq_bn_inv": {"method": "union", "configs": [{"method": "seq_bn", **_BOTTLENECK}, _NICE]},
    "glow": {**_NICE, "coupling": "glow"},
    "loreft": {"method": "loreft", **_REFT},
    "noreft": {"method": "noreft", **_REFT},
    "direft": {"method": "direft", **_REFT},
    "lora|par_bn": {"method": "union", "configs": ["lora", {"method": "par_bn", **_BOTTLENECK}]},
}
# class, variant -> code: what an invertible adapter is refused with
NOT_INVERTIBLE = {
    ("WhisperForAudioClassification", ""): "no-embeddings",
    ("EncoderDecoderModel", "roberta-gpt2"): "other-width",
}
INVERTIBLE = ("seq_bn_inv", "glow")
REFT = ("loreft", "noreft", "direft")
SIX = ("bert", "llama", "gemma2", "phi", "t5", "bart", "vit")
"""Structures that differ: where norms stand, parallel sublayers, two stacks, a shared tail."""


class BranchCase(matrix.Case):
    """One class of a family with one method that acts between sublayers."""

    @property
    def config(self) -> dict[str, Any]:
        return METHODS[self.method]

    def attached(self, dtype: torch.dtype = torch.float32) -> ak.Kit:
        kit = self.attach(self.model(dtype))
        randomise(kit)
        return kit

    def unreached(self, name: str) -> bool:
        return super().unreached(name.partition(":")[2] or name)


@torch.no_grad()
def randomise(kit: ak.Kit, name: str = "default", *, heads: bool = True, seed: int = 7) -> None:
    """Move every tensor that the adapter trains, those that its units share too."""
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in kit[name].named_parameters():
        if tensor.requires_grad and (heads or not key.startswith("head.")):
            tensor.add_((0.1 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype))


def cases(classes: Any = None) -> Iterator[Any]:
    """The base class of every family with every method; with -m full a class with a head, and variants."""
    for row, found in tiny.ROWS.items():
        base, *others = matrix.default_classes(row)
        for method in METHODS:
            yield pytest.param(BranchCase(row, base, method), id=f"{row}-{method}")
            for cls, variant in (*((cls, "") for cls in others), *((base, v) for v in found.variants)):
                case = BranchCase(row, cls, method, variant)
                if method in INVERTIBLE and (cls, variant) in NOT_INVERTIBLE:
                    continue
                yield pytest.param(case, id=str(case), marks=[pytest.mark.full])


def few(*rows: str) -> Iterator[Any]:
    """All cases; in the default run only those of a few base classes."""
    for param in cases():
        case = param.values[0]
        marks = [] if case.row in rows and not param.marks else [pytest.mark.full]
        yield pytest.param(case, id=param.id, marks=marks)


def generating() -> Iterator[Any]:
    """The first class of every family that can generate.

    ReFT edits the prompt alone under a cache; without one the suffix and a prefix that is longer than the
    prompt move on with the tokens.
    """
    for row, found in tiny.ROWS.items():
        for cls in matrix.generating(row)[:1]:
            for method in METHODS:
                if method not in REFT or found.kind == "decoder":
                    case = BranchCase(row, cls, method)
                    marks = [] if row in SIX else [pytest.mark.full]
                    yield pytest.param(case, id=str(case), marks=marks)
