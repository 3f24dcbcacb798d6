"""Folding weight deltas into the weights of the model, and taking the exact bits back."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from adapterkit.adapter import Adapter
from adapterkit.errors import PlanError, Problem
from adapterkit.methods.weights import is_plain, wide
from adapterkit.model.blueprint import Blueprint, Slot

Originals = dict[str, tuple[torch.Tensor, torch.Tensor | None]]
"""Host path -> weight and bias before the merge."""


def check(model: nn.Module, adapter: Adapter) -> None:
    """Refuse what cannot be folded in exactly.

    Raises: PlanError: with every slot that stands in the way, and why.
    """
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), set()).add(id(module))
    problems = []
    for slot in adapter.plan.slots:
        reason = adapter.units[slot.address].refuses_merge()
        weight = slot.module._parameters.get("weight")
        if reason is None and not is_plain(slot.module):
            reason = f"the weight of {type(slot.module).__name__} is quantised or wrapped"
        elif reason is None and weight is not None and weight.is_meta:
            reason = "its weight is offloaded"
        elif reason is None and weight is not None and len(owners.get(id(weight), ())) > 1:
            reason = "its weight is tied to another module, which would change too"
        if reason is not None:
            problems.append(Problem("cannot-merge", f"{slot.path} cannot be merged: {reason}", slot.address))
    if problems:
        raise PlanError(problems)


@torch.no_grad()
def fold(model: nn.Module, adapter: Adapter) -> Originals:
    """Fold an adapter into its hosts; computed in float64 where there is one, and rounded once.

    All of them or none: what goes wrong on the way gives every host its bits back.
    """
    originals: Originals = {}
    try:
        _fold_all(adapter, originals)
    except BaseException:
        restore(model, originals)
        raise
    return originals


def _fold_all(adapter: Adapter, originals: Originals) -> None:
    """Fold every slot, and note of each host what it was before it is written."""
    for path, slots in _by_host(adapter.plan.slots).items():
        host = slots[0].module
        bias = host._parameters.get("bias")
        weight = host._parameters["weight"]
        assert weight is not None
        originals[path] = (weight.detach().clone(), None if bias is None else bias.detach().clone())
        new_weight = (weight.t() if slots[0].transposed else weight).to(wide(weight), copy=True)
        new_bias = None if bias is None else bias.to(wide(weight), copy=True)
        for slot in slots:
            _fold_slot(adapter, slot, new_weight, new_bias)
        _check_range(slots, (weight, new_weight), (bias, new_bias))
        weight.copy_(new_weight.t() if slots[0].transposed else new_weight)
        if bias is not None and new_bias is not None:
            bias.copy_(new_bias)


def _check_range(slots: list[Slot], *tensors: tuple[torch.Tensor | None, torch.Tensor | None]) -> None:
    """Refuse numbers that the type of a host has not got, or that are none.

    Raises: PlanError.
    """
    for old, new in tensors:
        if old is not None and new is not None and not bool(new.to(old.dtype).isfinite().all()):
            what = f"the sum has numbers that are not finite in {str(old.dtype).removeprefix('torch.')}"
            message = f"{slots[0].path} cannot be merged: {what}"
            raise PlanError(Problem("cannot-merge", message, slots[0].address))


def _fold_slot(adapter: Adapter, slot: Slot, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Change the rows of one slot in a wide (D_out, D_in) weight and bias."""
    rows = slot.rows
    own = weight if rows is None else rows.take(weight)
    own_bias = bias if bias is None or rows is None else rows.take(bias)
    merged, merged_bias = adapter.units[slot.address].merged(own, own_bias)
    for whole, before, part in ((weight, own, merged), (bias, own_bias, merged_bias)):
        if whole is None or part is None or part is before:
            continue
        if rows is None:
            whole.copy_(part)
        else:
            rows.put(whole, part)


def _by_host(slots: Iterable[Slot]) -> dict[str, list[Slot]]:
    hosts: dict[str, list[Slot]] = {}
    for slot in slots:
        hosts.setdefault(slot.path, []).append(slot)
    return hosts


@torch.no_grad()
def restore(model: nn.Module, originals: Originals) -> None:
    """Put the exact bits back."""
    for path, (weight, bias) in originals.items():
        host = model.get_submodule(path)
        host.weight.copy_(weight)  # type: ignore[operator]
        if bias is not None:
            host.bias.copy_(bias)  # type: ignore[operator]


@torch.no_grad()
def keep_heads(adapter: Adapter, blueprint: Blueprint) -> None:
    """Give the model itself the tensors of an adapter's heads and poolers."""
    for found in (*blueprint.heads, *blueprint.poolers):
        copied = {**adapter.heads, **adapter.poolers}.get(found.address)
        own = found.module.state_dict(keep_vars=True)  # running statistics are part of a head too
        for path, new in copied.state_dict().items() if copied is not None else ():
            own[path].copy_(new)
