"""Averages of learned factors: what each adapter changes of a factor of one is added up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from adapterkit.averaging.matrices import combined
from adapterkit.averaging.parts import How, Made, Part, narrow, refusal
from adapterkit.averaging.selection import merged_selection
from adapterkit.methods.base import Unit
from adapterkit.methods.ia3 import IA3Config, Scale
from adapterkit.methods.weights import wide
from adapterkit.model.blueprint import Slot


def is_scale(unit: Unit) -> bool:
    return isinstance(unit, Scale) and unit.gate is None


def average(parts: Sequence[Part], how: How) -> Made:
    """The factors l = 1 + sum w_i (alpha_i l_i - 1), as far as the strategy keeps it.

    The paper of TIES tries it on such vectors. An adapter without a unit at a slot leaves it at 1. The
    result keeps alpha where all adapters have the same, else it is 1.
    Raises: PlanError: a vector has no singular values; a slot is scaled on other sides.
    """
    if how.strategy == "svd" or how.rank is not None:
        raise refusal("(IA)^3 is a vector and has no rank", expected="strategy='linear'")
    slots: dict[str, Slot] = {address: slot for part in parts for address, slot in part.slots.items()}
    configs = [part.config for part in parts if isinstance(part.config, IA3Config)]
    alphas = {config.alpha for config in configs}
    alpha = alphas.pop() if len(alphas) == 1 else 1.0
    sides = {address: _sides_at(address, slot, configs, parts) for address, slot in slots.items()}
    tensors: dict[str, torch.Tensor] = {}
    for address in slots:
        if len(sides[address]) > 1:
            raise refusal("some of the adapters scale the input, others the output", address)
        own = [(part.units[address], part.weight) for part in parts if address in part.units]
        tensors[f"{address}.scale"] = _scale(own, alpha, sum(abs(part.weight) for part in parts), how)
    made: dict[str, Any] = merged_selection(configs, [part.slots for part in parts], slots)
    return Made(IA3Config(**made, alpha=alpha, sides=_sides(configs, slots, sides)), tuple(slots), tensors)


def _scale(own: Sequence[tuple[Any, float]], alpha: float, total: float, how: How) -> torch.Tensor:
    first = own[0][0].scale
    deltas = [
        unit.scale.detach().to(device=first.device, dtype=wide(first)) * unit.alpha - 1 for unit, _ in own
    ]
    weights = [weight for _, weight in own]
    change = combined(deltas, weights, how.strategy, how.density, total, how.generator)
    return ((1 + change) / alpha).to(narrow([unit.scale for unit, _ in own]))


def _sides_at(address: str, slot: Slot, configs: Sequence[IA3Config], parts: Sequence[Part]) -> set[str]:
    """What the adapters scale at a slot."""
    return {config.side(slot) for config, part in zip(configs, parts, strict=True) if address in part.units}


def _sides(
    configs: Sequence[IA3Config], slots: Mapping[str, Slot], sides: Mapping[str, set[Any]]
) -> dict[str, Any]:
    """The adapters' own words where they agree, else an address for each slot."""
    if all(config.sides == configs[0].sides for config in configs):
        return configs[0].sides
    return {address: next(iter(sides[address])) for address in slots}
