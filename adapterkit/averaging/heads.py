"""Averages of task heads, and of the poolers that feed them: weights that sum to one, tensor by tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from adapterkit.adapter import Adapter
from adapterkit.averaging.parts import mean, refusal
from adapterkit.errors import ConfigError, Problem
from adapterkit.model.blueprint import Blueprint

Weighted = Sequence[tuple[Adapter, float]]


def heads(adapters: Weighted) -> dict[str, dict[str, torch.Tensor]]:
    """Path of a head -> its averaged tensors.

    Raises: PlanError: only some of the adapters have it.
    """
    first = adapters[0][0]
    for adapter, _ in adapters:
        for address in sorted(adapter.heads.keys() ^ first.heads.keys()):
            message = f"only one of {first.name!r} and {adapter.name!r} has a head there"
            raise refusal(message, address, "head=False, or adapters that all have it")
    return {
        address.removeprefix("head."): _averaged([(a.heads[address], weight) for a, weight in adapters])
        for address in first.heads
    }


def poolers(adapters: Weighted, blueprint: Blueprint) -> dict[str, dict[str, torch.Tensor]]:
    """Address of a pooler -> its averaged tensors, where some adapter brought one of its own."""
    return {
        pooler.address: _averaged([(a.poolers.get(pooler.address, pooler.module), w) for a, w in adapters])
        for pooler in blueprint.poolers
        if any(pooler.address in adapter.poolers for adapter, _ in adapters)
    }


def _averaged(modules: Sequence[tuple[nn.Module, float]]) -> dict[str, torch.Tensor]:
    total = sum(weight for _, weight in modules)
    if total == 0:
        message = "the weights sum to 0, and a head is no change of anything that could be added up"
        raise ConfigError(Problem("bad-weights", message, "weights", "head=False, or other weights"))
    states = [
        {key: value for key, value in module.state_dict().items() if "adapterkit." not in key}
        for module, _ in modules
    ]
    weights = [weight / total for _, weight in modules]
    return {key: mean([state[key] for state in states], weights) for key in states[0]}
