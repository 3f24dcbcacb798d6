"""Setups -> programs: which units each site runs, in which order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from adapterkit.adapter import Adapter
from adapterkit.composition import Fuse, Setup
from adapterkit.errors import CompositionError, NotAttachedError, Problem
from adapterkit.inject import entry
from adapterkit.methods.fusion import FusionConfig
from adapterkit.methods.targets import Layers, chosen_layers
from adapterkit.model.blueprint import Blueprint
from adapterkit.runtime import Program, Programs


class _Step(NamedTuple):
    """One unit at a site; steps are sorted by phase and keep their order within it."""

    path: str
    key: str
    acts_on: str
    phase: int


def programs(
    setup: Setup | None,
    adapters: Mapping[str, Adapter],
    blueprint: Blueprint,
    entries: Iterable[str],
    skip_layers: Layers = (),
) -> Programs:
    """What each site does under a setup.

    Raises: CompositionError: it is no setup. NotAttachedError: an adapter is not there.
        PlanError: a layer to be skipped does not exist.
    """
    if setup is None:
        return {}
    if not isinstance(setup, str | Fuse):
        kind = type(setup).__name__
        message = f"a setup is the name of an adapter, a block such as Fuse, or None, not {kind}"
        raise CompositionError(Problem("bad-setup", message))
    kept = chosen_layers(blueprint, None, skip_layers) if skip_layers else None
    # heads are those of the adapter that acts last
    last = adapters[setup if isinstance(setup, str) else setup.children[-1]]
    found: dict[str, Program] = {path: Program(before=entry.KEY) for path in entries}
    for address in (*last.heads, *last.poolers):
        path, key = last.injection.by_address[address]
        found[path] = Program(instead=key)
    steps = _fused(setup, adapters, kept) if isinstance(setup, Fuse) else _steps(adapters[setup], kept)
    for step in sorted(steps, key=lambda step: step.phase):
        old = found.get(step.path, Program())
        if step.acts_on == "entry":
            found[step.path] = old._replace(entry=(*old.entry, step.key))
        elif step.acts_on == "input":
            found[step.path] = old._replace(inputs=(*old.inputs, step.key))
        elif step.acts_on == "kernel":
            found[step.path] = old._replace(kernel=(*old.kernel, step.key))
        elif step.acts_on == "held":
            found[step.path] = old._replace(held=(*old.held, step.key))
        else:
            found[step.path] = old._replace(outputs=(*old.outputs, step.key))
    return found


def _steps(adapter: Adapter, kept: set[tuple[str, int]] | None) -> Iterable[_Step]:
    """Units and helpers of one adapter outside the layers that are skipped."""
    if isinstance(adapter.config, FusionConfig):
        message = f"{adapter.name!r} is a fusion and does nothing alone"
        children = ", ".join(map(repr, adapter.config.children))
        raise CompositionError(Problem("bad-setup", message, expected=f"Fuse({children})"))
    for slot in adapter.plan.slots:
        if kept is None or slot.layer is None or (slot.stack, slot.layer) in kept:
            unit = adapter.units[slot.address]
            yield _Step(*adapter.injection.by_address[slot.address], unit.acts_on, unit.phase)
    yield from _helpers(adapter)


def _helpers(adapter: Adapter) -> Iterable[_Step]:
    for helper in adapter.injection.helpers:
        yield _Step(helper.place.path, helper.key, helper.acts_on, helper.phase)


def _fused(
    setup: Fuse, adapters: Mapping[str, Adapter], kept: set[tuple[str, int]] | None
) -> Iterable[_Step]:
    """The fusion's units in place of those of its children.

    Raises: NotAttachedError: the fusion has no weights. CompositionError: those are of other adapters.
    """
    if setup.name not in adapters:
        names = ", ".join(map(repr, setup.children))
        message = f"there are no weights for {setup!r}"
        raise NotAttachedError(Problem("no-fusion", message, expected=f"kit.fuse({names}) first"))
    fusion = adapters[setup.name]
    config = fusion.config
    if not isinstance(config, FusionConfig) or config.children != setup.children:
        message = f"{setup.name!r} does not hold the weights of {setup!r}"
        raise CompositionError(Problem("no-fusion", message))
    for slot in fusion.plan.slots:
        if kept is None or (slot.stack, slot.layer) in kept:
            unit = fusion.units[slot.address]
            yield _Step(*fusion.injection.by_address[slot.address], unit.acts_on, unit.phase)
    # every child's: the last one's residual, the points that arm the branch
    yield from dict.fromkeys(step for child in setup.children for step in _helpers(adapters[child]))
