"""Setups -> programs: which units each site runs, in which order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from adapterkit.adapter import Adapter
from adapterkit.errors import CompositionError, Problem
from adapterkit.inject import entry
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
    setup: str | None,
    adapters: Mapping[str, Adapter],
    blueprint: Blueprint,
    entries: Iterable[str],
    skip_layers: Layers = (),
) -> Programs:
    """What each site does under a setup.

    Raises: CompositionError: it is no setup. PlanError: a layer to be skipped does not exist.
    """
    if setup is None:
        return {}
    if not isinstance(setup, str):
        kind = type(setup).__name__
        raise CompositionError(Problem("bad-setup", f"a setup is the name of an adapter or None, not {kind}"))
    adapter = adapters[setup]
    kept = chosen_layers(blueprint, None, skip_layers) if skip_layers else None
    found: dict[str, Program] = {path: Program(before=entry.KEY) for path in entries}
    for address in (*adapter.heads, *adapter.poolers):
        path, key = adapter.injection.by_address[address]
        found[path] = Program(instead=key)
    for step in sorted(_steps(adapter, kept), key=lambda step: step.phase):
        old = found.get(step.path, Program())
        if step.acts_on == "entry":
            found[step.path] = old._replace(entry=(*old.entry, step.key))
        elif step.acts_on == "input":
            found[step.path] = old._replace(inputs=(*old.inputs, step.key))
        else:
            found[step.path] = old._replace(outputs=(*old.outputs, step.key))
    return found


def _steps(adapter: Adapter, kept: set[tuple[str, int]] | None) -> Iterable[_Step]:
    """Units and helpers of one adapter outside the layers that are skipped."""
    for slot in adapter.plan.slots:
        if kept is None or slot.layer is None or (slot.stack, slot.layer) in kept:
            unit = adapter.units[slot.address]
            yield _Step(*adapter.injection.by_address[slot.address], unit.acts_on, unit.phase)
    for helper in adapter.injection.helpers:
        yield _Step(helper.place.path, helper.key, helper.acts_on, helper.phase)
