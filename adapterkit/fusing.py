"""Fusions between the adapters of a kit: which places they share, and the keys of their units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import nn

from adapterkit.adapter import Adapter
from adapterkit.composition import Block, Fuse, Setup
from adapterkit.errors import CompositionError, ConfigError, PlanError, Problem, did_you_mean, listing
from adapterkit.inject import injector
from adapterkit.methods.bottleneck import Bottleneck
from adapterkit.methods.fusion import PRESETS, Fusion, FusionConfig
from adapterkit.methods.names import validate
from adapterkit.methods.weights import float_of
from adapterkit.planning import Draft, Plan


def config_of(adapters: Sequence[Adapter], config: str | Mapping[str, Any] | FusionConfig) -> FusionConfig:
    """The config of a fusion of these adapters: a preset, options, or a config whose children they are.

    Raises: ConfigError: unknown preset or option. PlanError: they have no place in common.
    """
    if isinstance(config, str) and config not in PRESETS:
        hint = did_you_mean(config, PRESETS)
        message = f"there is no fusion config {config!r}"
        raise ConfigError(Problem("unknown-method", message, "config", f"one of {listing(PRESETS)}", hint))
    options = PRESETS[config] if isinstance(config, str) else dict(config)
    if isinstance(config, FusionConfig):
        for found in ("children", "places", "branch"):  # say which adapters they are, and where
            del options[found]
    places = _all(adapters) if options.get("partial") else _common(adapters)
    if not places:
        names = listing(adapter.name for adapter in adapters)
        message = f"{names} have no place in common at which they could be fused"
        expected = "bottlenecks at the same branches, or LoRAs without gates at the same targets"
        raise PlanError(Problem("nothing-selected", message, expected=expected))
    children = tuple(adapter.name for adapter in adapters)
    problems = [problem for adapter in adapters for problem in _left_out(adapter, places)]
    if problems:
        raise PlanError(problems)
    where = {unit.config.branch for adapter in adapters for unit in _bottlenecks(adapter).values()}
    if len(where) > 1:
        message = f"{listing(children)} act before and after the norm of the branch, not at one place"
        raise PlanError(Problem("nothing-selected", message, "branch", "the same `branch` for all"))
    given = {"children": children, "places": places, **({"branch": where.pop()} if where else {})}
    made = validate(FusionConfig, {**options, **given})
    assert isinstance(made, FusionConfig)
    return made


def _bottlenecks(adapter: Adapter) -> dict[str, Bottleneck]:
    """Address -> bottleneck."""
    return {address: unit for address, unit in adapter.units.items() if isinstance(unit, Bottleneck)}


def _units(adapter: Adapter) -> dict[str, str]:
    """Place -> address of the adapter's unit that can be fused there: a bottleneck, an update of a weight."""
    found: dict[str, str] = {}
    for address, unit in adapter.units.items():
        if isinstance(unit, Bottleneck):
            found.setdefault(unit.branch, address)
        elif unit.adds:
            found.setdefault(address.partition(":")[2] or address, address)
    return found


def _common(adapters: Sequence[Adapter]) -> tuple[str, ...]:
    first, *others = (_units(adapter) for adapter in adapters)
    return tuple(place for place in first if all(place in other for other in others))


def _all(adapters: Sequence[Adapter]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(place for adapter in adapters for place in _units(adapter)))


def _left_out(adapter: Adapter, places: Sequence[str]) -> list[Problem]:
    """Units of an adapter that would silently not act in a fusion at these places."""
    fused = {address for place, address in _units(adapter).items() if place in places}
    rest = [a for a, unit in adapter.units.items() if a not in fused and not unit.first_only]
    if not rest:
        return []
    message = f"{adapter.name!r} also acts where there is no fusion: {listing(rest)}"
    expected = "the same places for all and nothing else, partial=True, or Stack('x', Fuse(...)) for the rest"
    return [Problem("not-fused", message, adapter.name, expected)]


def cast(plan: Plan, draft: Draft, model: nn.Module, adapters: Sequence[Adapter]) -> None:
    """Weights of a fusion to the device of their hosts and the type of the adapters that they mix.

    These may be of float32 on a model in half precision.
    """
    injector.cast(plan, draft, model, "match")
    places = [_units(adapter) for adapter in adapters]
    for place, fusion in draft.units.items():
        fused = [a.units[own[place]] for a, own in zip(adapters, places, strict=True) if place in own]
        types = [unit.dtype if isinstance(unit, Bottleneck) else float_of(unit) for unit in fused]
        fusion.to(reduce(torch.promote_types, types))


def users(name: str, adapters: Mapping[str, Adapter]) -> tuple[str, ...]:
    """Names of the fusions that an adapter is part of."""
    found = ((other, adapter.config) for other, adapter in adapters.items())
    return tuple(o for o, config in found if isinstance(config, FusionConfig) and name in config.children)


def setup_of(adapter: Adapter) -> Setup:
    """The setup under which an adapter acts: its name, or the block of which it is the weights."""
    config = adapter.config
    return Fuse(*config.children, name=adapter.name) if isinstance(config, FusionConfig) else adapter.name


def refuse_used(name: str, adapters: Mapping[str, Adapter], verb: str) -> None:
    """Refuse to take an adapter away whose units a fusion looks for.

    Raises: PlanError.
    """
    found = users(name, adapters)
    if found:
        message = f"{name!r} is part of the fusion {listing(found)}"
        raise PlanError(Problem("in-use", message, verb, "the fusion detached first"))


def connect(fusion: Adapter, adapters: Mapping[str, Adapter]) -> None:
    """Tell the units of a fusion where those of its children are.

    Raises: PlanError: a child is missing, or has no unit at a place though the fusion is not partial; all
        have one where there is no fusion.
    """
    if not isinstance(fusion.config, FusionConfig):
        return
    problems = []
    for unit in fusion.units.values():
        keys = []
        for child in fusion.config.children:
            own = adapters.get(child)
            address = (
                None if own is None else _units(own).get(unit.address) if isinstance(unit, Fusion) else None
            )
            if own is not None and address is None and fusion.config.partial:
                continue
            if own is None or address is None:
                message = f"fused adapter {child!r} is not attached at this place"
                problems.append(Problem("no-such-adapter", message, str(getattr(unit, "address", ""))))
            else:
                keys.append(own.injection.by_address[address][1])
        if isinstance(unit, Fusion):
            unit.children_keys = tuple(keys)
    own_places = _places(fusion)
    for place in () if problems else _common([adapters[child] for child in fusion.config.children]):
        if place not in own_places:
            message = (
                f"the fusion {fusion.name!r} has no weights at this place, where all of its adapters act"
            )
            problems.append(Problem("no-fusion", message, place))
    for child in () if problems else fusion.config.children:
        problems += _left_out(adapters[child], own_places)
    if problems:
        raise PlanError(problems)


def _places(fusion: Adapter) -> tuple[str, ...]:
    return tuple(unit.address for unit in fusion.units.values() if isinstance(unit, Fusion))


def members(setup: Fuse, adapters: Mapping[str, Adapter]) -> dict[str, tuple[tuple[str, ...], ...]]:
    """Place -> keys of the units there, child by child, those that act before the fused one first.

    Raises: CompositionError: an adapter of a Stack would silently not act somewhere.
    """
    places = _places(adapters[setup.name])
    chains = [child.children if isinstance(child, Block) else (child,) for child in setup.children]
    problems = [p for chain in chains for name in chain for p in _left_out(adapters[str(name)], places)]
    for *before, last in chains:
        for unit in _bottlenecks(adapters[str(last)]).values() if before else ():
            if unit.config.reads_stream:
                message = (
                    f"{last!r} reads the stream, so that {listing(map(repr, before))} before it would not act"
                )
                problems.append(
                    Problem("not-fused", message, unit.branch, "a sequential adapter as the last")
                )
    if problems:
        raise CompositionError(problems)

    def key(adapter: Adapter, place: str) -> tuple[str, ...]:
        address = _units(adapter).get(place)
        return () if address is None else (adapter.injection.by_address[address][1],)

    return {
        place: tuple(tuple(k for name in chain for k in key(adapters[str(name)], place)) for chain in chains)
        for place in places
    }


def loss(fusion: Adapter) -> torch.Tensor:
    """Regularisation of the value projections of a fusion.

    Raises: ConfigError: its config has none.
    """
    config = fusion.config
    units = [unit for unit in fusion.units.values() if isinstance(unit, Fusion)]
    if not isinstance(config, FusionConfig) or not (config.regularization and config.value):
        message = f"{fusion.name!r} has no value projection that is regularised"
        raise ConfigError(Problem("bad-option", message, "regularization"))
    return torch.stack([unit.loss() for unit in units]).sum()
