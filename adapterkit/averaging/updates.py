"""Averages of changes of weights: exact sums of low-rank updates, or strategies on the changes themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from adapterkit.averaging.matrices import Factors, combined, factored, reduced
from adapterkit.averaging.parts import How, Made, Part, narrow, refusal
from adapterkit.averaging.selection import merged_selection, option
from adapterkit.errors import ConfigError, Problem
from adapterkit.methods.base import Unit
from adapterkit.methods.dora import DoRAConfig, Magnitude
from adapterkit.methods.lora import LoRAConfig
from adapterkit.methods.weights import readable, slot_weight, wide
from adapterkit.model.blueprint import Slot

Own = list[tuple[Unit, float]]
"""The units at one slot with their weights."""


def is_update(unit: Unit) -> bool:
    """Whether a unit adds something to a weight that does not depend on the input."""
    return type(unit).factors is not Unit.factors and unit.refuses_merge() is None


def average(parts: Sequence[Part], how: How) -> Made:
    """W + sum w_i (W_i - W), as far as the strategy keeps it; where an adapter has no unit it adds nothing.

    `linear` is exact: the factors side by side make a LoRA of the sum of the ranks, and where magnitudes are
    adapted a DoRA. Every other strategy acts on the changes W_i - W, and gives a LoRA.
    """
    decomposed = any(isinstance(unit, Magnitude) for part in parts for unit in part.units.values())
    exact = how.strategy == "linear" and decomposed
    slots = {address: slot for part in parts for address, slot in part.slots.items()}
    tensors: dict[str, torch.Tensor] = {}
    for address, slot in slots.items():
        own = [(part.units[address], part.weight) for part in parts if address in part.units]
        device = next(own[0][0].parameters()).device
        dtype = narrow([next(unit.parameters()) for unit, _ in own])
        if exact:
            found = _decomposed(own, slot, sum(part.weight for part in parts))
        else:
            found = dict(zip("BA", _low_rank(own, slot, how, parts, decomposed), strict=True))
        tensors |= {f"{address}.{key}": value.to(device, dtype) for key, value in found.items()}
    return Made(_config(parts, slots, tensors, decomposed=exact), tuple(slots), tensors)


def _low_rank(own: Own, slot: Slot, how: How, parts: Sequence[Part], decomposed: bool) -> Factors:
    limit = min(slot.shape or (1, 1))
    if how.rank is not None and how.rank > limit:
        message = f"rank {how.rank} is more than {limit}, the smaller side of {slot.shape}"
        raise ConfigError(Problem("bad-rank", message, slot.address))
    if how.strategy in ("linear", "svd") and not decomposed:
        left, right = _side_by_side(own)
        is_small = how.strategy == "linear" and right.shape[0] <= limit
        return (left, right) if is_small else reduced(left, right, how.rank)
    deltas = [_change(unit, slot) for unit, _ in own]
    weights, total = [weight for _, weight in own], sum(abs(part.weight) for part in parts)
    change = combined(deltas, weights, how.strategy, how.density, total, how.generator)
    return factored(change, how.rank)


def _side_by_side(own: Own, gains: Sequence[torch.Tensor] | None = None) -> Factors:
    """L (D_out, R) and S (R, D_in) with L S = sum w_i g_i s_i L_i S_i, R the sum of the ranks."""
    lefts, rights = [], []
    device = next(own[0][0].parameters()).device
    for index, (unit, weight) in enumerate(own):
        left, right, scaling = _factors(unit)
        gain = weight * scaling if gains is None else weight * scaling * gains[index][:, None].to(left)
        lefts.append((left * gain).to(device))
        rights.append(right.to(device))
    return torch.cat(lefts, dim=1), torch.cat(rights)


def _factors(unit: Unit) -> tuple[torch.Tensor, torch.Tensor, float]:
    found = unit.factors(wide(next(unit.parameters())))
    assert found is not None
    left, right, scaling = found
    return left.detach(), right.detach(), scaling


def _change(unit: Unit, slot: Slot) -> torch.Tensor:
    """W_i - W (D_out, D_in)."""
    if not isinstance(unit, Magnitude):
        left, right, scaling = _factors(unit)
        return left @ right * scaling
    weight = _weight(slot, unit)
    if unit.scale_bias and getattr(slot.module, "bias", None) is not None:
        message = "scales the bias too, which no change of the weight alone can do"
        raise refusal(message, slot.address, "strategy='linear'")
    return (unit.merged(weight, None)[0] - weight).detach()


def _weight(slot: Slot, unit: Unit) -> torch.Tensor:
    """The slot's weight where the unit is, wide."""
    readable(slot, "an average")
    own = next(unit.parameters())
    return slot_weight(slot.module, slot.transposed, slot.rows).detach().to(own.device, wide(own))


def _decomposed(own: Own, slot: Slot, total: float) -> dict[str, torch.Tensor]:
    """A, B and m of the DoRA whose weight is W + sum w_i (W_i - W), with W_i = g_i (W + D_i).

    With c = 1 - sum w_i + sum w_i g_i that weight is c (W + D), where D = sum w_i (g_i / c) D_i, and m is
    c ||W + D||.
    """
    weight = _weight(slot, own[0][0])
    gains = [_gain(unit, weight) for unit, _ in own]
    present = sum(w for _, w in own)
    c = sum((w * g for (_, w), g in zip(own, gains, strict=True)), torch.full_like(weight[:, 0], 1 - present))
    if not bool((c != 0).all()):
        raise refusal("the weights take a magnitude to exactly zero", slot.address, "other weights")
    left, right = _side_by_side(own, [gain / c for gain in gains])
    if right.shape[0] > min(weight.shape):
        left, right = reduced(left, right, None)
    norm = torch.linalg.vector_norm(weight + left @ right, dim=1)
    return {"A": right, "B": left, "m": c * norm}


def _gain(unit: Unit, weight: torch.Tensor) -> torch.Tensor:
    """G (D_out,) with W_i = g (W + D_i): one where no magnitude is adapted."""
    if not isinstance(unit, Magnitude):
        return torch.ones_like(weight[:, 0])
    left, right, scaling = _factors(unit)
    direction = weight + (scaling if unit.norm_scaled else 1.0) * (left @ right).to(weight.device)
    gain: torch.Tensor = unit.m.detach().to(weight) / torch.linalg.vector_norm(direction, dim=1)
    return gain


def _config(
    parts: Sequence[Part], slots: Mapping[str, Slot], tensors: Mapping[str, torch.Tensor], *, decomposed: bool
) -> LoRAConfig:
    """A config of its own for the result, with alpha = R, so that the factors are the whole update."""
    ranks = {address: int(tensors[f"{address}.A"].shape[0]) for address in slots}
    made = merged_selection([part.config for part in parts], [part.slots for part in parts], slots)
    options = {**made, "r": _by_slot(ranks, slots), "dropout": option(parts, "dropout", 0.0)}
    if not decomposed:
        return LoRAConfig(**options)
    scaled = {u.scale_bias for part in parts for u in part.units.values() if isinstance(u, Magnitude)}
    plain = any(not isinstance(unit, Magnitude) for part in parts for unit in part.units.values())
    if len(scaled) > 1 or (True in scaled and plain):
        raise refusal("some of the adapters scale the bias and others not", expected="one scale_bias")
    return DoRAConfig(**options, scale_bias=True in scaled)


def _by_slot(ranks: Mapping[str, int], slots: Mapping[str, Slot]) -> int | dict[str, int]:
    """One rank if it is the same everywhere, else one for each role or, where that is not enough, address."""
    if len(set(ranks.values())) == 1:
        return next(iter(ranks.values()))
    by_role: dict[str, set[int]] = {}
    for address, rank in ranks.items():
        by_role.setdefault(slots[address].role, set()).add(rank)
    if all(len(found) == 1 for found in by_role.values()):
        return {role: next(iter(found)) for role, found in by_role.items()}
    return dict(ranks)
