"""What the tests of the mechanisms share: an adapted tiny model whose adapter visibly does something."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from tests.models import tiny

METHODS = ("lora", "ia3", "vera[r=4,d_initial=1]", "dora", "dvora[r=4,d_initial=1]")
FEW = tuple(pytest.param(m, marks=() if m in ("lora", "dora") else pytest.mark.full) for m in METHODS)
ALL_ROLES = "lora[targets=all,r=4]"


def attach(
    model: nn.Module, method: str = "lora", name: str = "a", *, seed: int = 0, **options: Any
) -> ak.Kit:
    """Attach an adapter and move its tensors away from the start, where most of them do nothing."""
    kit = ak.attach(model, method, name=name, seed=seed, **options)
    move(kit, name, seed)
    return kit


@torch.no_grad()
def move(kit: ak.Kit, name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(100 + seed)
    for parameter in kit[name].parameters():
        if parameter.requires_grad:
            parameter.add_((0.2 * torch.randn(parameter.shape, generator=generator)).to(parameter))


@torch.no_grad()
def run(model: nn.Module, given: Mapping[str, Tensor]) -> Tensor:
    """All main outputs as one flat tensor."""
    return tiny.output(model(**given))


def tensors(kit: ak.Kit, name: str = "a") -> dict[str, Tensor]:
    """Copies of the tensors of an adapter."""
    return {key: value.clone() for key, value in kit[name].state_dict().items()}


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Whether both hold the same tensors, to the bit."""
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def gradients(model: nn.Module, given: Mapping[str, Tensor], name: str = "a") -> dict[str, Tensor | None]:
    """Gradient of the model's own loss (or of the sum of squares) for every trained tensor of an adapter."""
    model.zero_grad(set_to_none=True)
    result = model(**given)
    loss = result["loss"] if result.get("loss") is not None else tiny.output(result).square().sum()
    loss.backward()
    own = ak.of(model)[name].named_parameters()
    return {key: None if p.grad is None else p.grad.clone() for key, p in own if p.requires_grad}
