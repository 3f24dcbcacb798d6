"""A weighted average of adapters, as the content of a file would be: an adapter of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch

from adapterkit.adapter import Adapter
from adapterkit.averaging import heads, scales, tensors, updates
from adapterkit.averaging.parts import How, Made, Part, averaged, refusal
from adapterkit.errors import ConfigError, Problem, did_you_mean, listing
from adapterkit.files.content import Content
from adapterkit.methods.fusion import FusionConfig
from adapterkit.model.blueprint import Blueprint
from adapterkit.planning import seeded

Strategy = Literal["linear", "negate_b", "svd", "ties", "dare", "magnitude"]
STRATEGIES = get_args(Strategy)
_PRUNING = ("ties", "dare", "magnitude")


@torch.no_grad()
def average(
    adapters: Sequence[tuple[Adapter, float]],
    blueprint: Blueprint,
    how: How,
    *,
    normalize: bool,
    head: bool | str,
) -> Content:
    """The average under the name of the first adapter.

    Raises: ConfigError: weights that cannot be used. PlanError: adapters that cannot be averaged so.
    """
    weighted = _weighted(adapters, normalize)
    for adapter, _ in weighted:
        if isinstance(adapter.config, FusionConfig):
            raise refusal(f"{adapter.name!r} is a fusion, whose attention belongs to its adapters")
    if len(weighted) == 1 and weighted[0][1] == 1 and how.is_plain:
        made = _as_it_is(weighted[0][0])
    else:
        made = averaged(weighted, lambda parts: _method(parts, how))
    with_head = bool(head) and any(adapter.heads for adapter, _ in weighted)
    if head is True and not with_head:
        raise refusal("none of the adapters has a head", expected="head='auto'")
    return Content(
        weighted[0][0].name,
        made.config,
        made.tensors,
        made.addresses,
        heads.heads(weighted) if with_head else {},
        heads.poolers(weighted, blueprint) if head else {},
        source="the average",
    )


def weights_of(adapters: Mapping[str, float] | Sequence[str]) -> dict[str, float]:
    """Name -> weight; names alone have equal weights.

    Raises: ConfigError.
    """
    if isinstance(adapters, str) or not adapters:
        raise ConfigError(Problem("bad-weights", "adapters with their weights are needed", "weights"))
    found = dict(adapters) if isinstance(adapters, Mapping) else dict.fromkeys(adapters, 1.0)
    for name, weight in found.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            message = f"the weight of {name!r} is {weight!r}"
            raise ConfigError(Problem("bad-weights", message, "weights", "a finite number"))
    return {name: float(weight) for name, weight in found.items()}


def how_of(strategy: str, rank: int | None, density: float, seed: int | None) -> How:
    """The options of an average, checked.

    Raises: ConfigError.
    """
    found = []
    if strategy not in STRATEGIES:
        expected, hint = f"one of {listing(STRATEGIES)}", did_you_mean(str(strategy), STRATEGIES)
        found.append((f"there is no strategy {strategy!r}", "strategy", expected, hint))
    if not isinstance(density, int | float) or not 0 < density <= 1:
        found.append((f"{density!r} is no part that is kept", "density", "0 < density <= 1", ""))
    elif density < 1 and strategy not in _PRUNING:
        found.append((f"{strategy!r} drops nothing", "density", f"one of {listing(_PRUNING)}", ""))
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        found.append((f"{rank!r} is no rank", "rank", "a number from 1 on", ""))
    elif rank is not None and strategy in ("linear", "negate_b"):
        expected = f"one of {listing(('svd', *_PRUNING))}"
        found.append((f"the rank of {strategy!r} follows from the adapters", "rank", expected, ""))
    if found:
        raise ConfigError(Problem("bad-option", *problem) for problem in found)
    return How(strategy, rank, float(density), seeded(seed))


def _weighted(adapters: Sequence[tuple[Adapter, float]], normalize: bool) -> list[tuple[Adapter, float]]:
    """Adapters whose weight is not zero, with weights that sum to one if they shall."""
    total = sum(weight for _, weight in adapters)
    if normalize and total == 0:
        message = "the weights sum to 0, so they cannot be made to sum to 1"
        raise ConfigError(Problem("bad-weights", message, "weights", "normalize=False, or other weights"))
    found = [(adapter, weight / total if normalize else weight) for adapter, weight in adapters]
    found = [(adapter, weight) for adapter, weight in found if weight]
    if not found:
        raise ConfigError(Problem("bad-weights", "all weights are 0", "weights"))
    return found


def _as_it_is(adapter: Adapter) -> Made:
    beside = (*adapter.heads, *adapter.poolers)
    own = {key: value for key, value in adapter.state_dict().items() if not key.startswith(beside)}
    return Made(adapter.config, tuple(slot.address for slot in adapter.plan.slots), own)


def _method(parts: Sequence[Part], how: How) -> Made:
    """The average of one method: of changes where they can be added up, else of tensors."""
    units = [unit for part in parts for unit in part.units.values()]
    if not any(unit.state_dict() for unit in units) and parts[0].shared is None:
        return tensors.linear(parts)  # there is nothing to be averaged
    if how.strategy == "negate_b":
        return tensors.negate_b(parts)
    if all(map(scales.is_scale, units)):
        return scales.average(parts, how)
    if all(map(updates.is_update, units)):
        return updates.average(parts, how)
    if how.strategy != "linear":
        first = parts[0].config.method
        message = f"{how.strategy!r} acts on changes of weights, and {first} makes none that can be added up"
        raise refusal(message, expected="strategy='linear', which averages every tensor")
    return tensors.linear(parts)
