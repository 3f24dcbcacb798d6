"""The weight of a host, in the orientation and rows of a slot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from adapterkit.errors import PlanError, Problem
from adapterkit.model.walk import CHILD, is_sharded

if TYPE_CHECKING:
    from adapterkit.model.blueprint import Slot
    from adapterkit.model.layouts import Rows


PLAIN = (nn.Parameter, torch.Tensor)
"""Types of ordinary tensors: a quantised one may say that it is of float32."""


def is_plain(host: nn.Module) -> bool:
    """Whether the weight is an ordinary floating-point tensor, neither quantised nor wrapped."""
    weight = host._parameters.get("weight")
    if weight is None:
        return False
    return type(weight) in PLAIN and weight.is_floating_point()


def joinable(host: nn.Module) -> bool:
    """Whether the host computes W x + b and nothing else; its class may have become a site."""
    return getattr(type(host), "_adapterkit_base", type(host)) is nn.Linear and is_plain(host)


def float_of(module: nn.Module) -> torch.dtype:
    """The type that a module computes in: that of its parameters.

    Quantised after attach it may have none, and takes float32.
    """
    own = next(module.parameters(), None)
    return torch.float32 if own is None else own.dtype


def wide(tensor: torch.Tensor) -> torch.dtype:
    """Type in which new weights are computed from a tensor: float64, which no autocast and no TF32 rounds."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def in_rows(x: torch.Tensor) -> bool:
    """Whether the rows of x (..., D) lie one after another, by its strides even where there is only one.

    Where they do not, torch may take one kernel or another, by strides and by what wants a gradient.
    """
    if not x.is_contiguous():
        return False
    if 1 not in x.shape:
        return True
    expected = 1
    for size, stride in zip(reversed(x.shape), reversed(x.stride()), strict=True):
        if stride != expected:
            return False
        expected *= size
    return True


def slot_weight(host: nn.Module, transposed: bool, rows: Rows | None) -> torch.Tensor:
    """(D_out, D_in) weight of a slot; a view of the host's where possible."""
    weight: torch.Tensor = host.weight  # type: ignore[assignment]
    if transposed:
        weight = weight.t()
    return weight if rows is None else rows.take(weight)


def slot_bias(host: nn.Module, rows: Rows | None) -> torch.Tensor | None:
    """(D_out,) bias of a slot."""
    bias: torch.Tensor | None = getattr(host, "bias", None)
    return bias if bias is None or rows is None else rows.take(bias)


def refuse_quantised(host: nn.Module) -> None:
    """Refuse a weight that a library has quantised since it was seen: it may say that it is of float32.

    Raises: PlanError.
    """
    weight = host._parameters.get("weight")
    if weight is None or type(weight) in PLAIN or not hasattr(weight, "__tensor_flatten__"):
        return
    if not is_sharded(weight):  # sharded ones are computed with
        message = (
            f"the weight ({type(weight).__name__}) was quantised after attach, and its norm is asked for"
        )
        expected = "a method that does not read the weight, such as LoRA"
        place: Any = host._modules.get(CHILD)
        raise PlanError(Problem("weight-unreadable", message, getattr(place, "key", ""), expected))


def readable(slot: Slot, why: str) -> torch.Tensor:
    """The slot's weight in float32 at build time; on the meta device where a plan builds there, for its
    shape.

    Raises: PlanError: it is quantised or on the meta device, so that its values are not there to read.
    """
    host = slot.module
    planned = torch.get_default_device().type == "meta"
    if not is_plain(host) or (host.weight.is_meta and not planned):
        problem = Problem(
            "weight-unreadable",
            f"{why} needs the weight of {slot.path}, quantised or not loaded ({type(host).__name__})",
            slot.address,
            "a model with plain floating-point weights",
        )
        raise PlanError(problem)
    weight = slot_weight(host, slot.transposed, slot.rows).detach()
    if planned:
        weight = weight.to("meta")
    return weight.to(torch.promote_types(weight.dtype, torch.float32))
