"""Setups -> programs: what each site runs, in which order and on which part of the batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from adapterkit.activation.around import around
from adapterkit.activation.heads import heads
from adapterkit.activation.places import AROUND
from adapterkit.activation.steps import Compiler
from adapterkit.adapter import Adapter
from adapterkit.composition import (
    BatchSplit,
    MultiTask,
    Parallel,
    Route,
    Setup,
    blocks,
    check,
    copies,
    examples,
    first,
    names,
)
from adapterkit.inject import entry
from adapterkit.methods.targets import Layers, chosen_layers
from adapterkit.model.blueprint import Blueprint
from adapterkit.runtime import Batch, Lanes, Program, Programs, Step

_FIELDS = {"entry": "entry", "input": "inputs", "kernel": "kernel", "held": "held", "output": "outputs"}


def programs(
    setup: Setup | None,
    adapters: Mapping[str, Adapter],
    blueprint: Blueprint,
    entries: Iterable[str],
    skip_layers: Layers = (),
) -> Programs:
    """What each site does under a setup.

    Raises: CompositionError: it is no setup, or has no meaning for these adapters. NotAttachedError: an
        adapter is not there. PlanError: a layer to be skipped does not exist.
    """
    check(setup)
    if setup is None:
        return {}
    kept = chosen_layers(blueprint, None, skip_layers) if skip_layers else None
    compiler = Compiler(adapters, blueprint, kept, first(setup))
    steps = compiler.steps(setup)
    compiler.refuse_scattered(steps)
    for place, keys in compiler.helpers(setup).items():
        steps[place] = (*steps.get(place, ()), *keys)
    fields: dict[str, dict[str, Any]] = {path: {"before": entry.KEY} for path in entries}
    for place, step in heads(setup, adapters).items():
        fields[place.path] = {"instead": step, "composed": isinstance(step, Lanes)}
    for place in sorted(steps, key=lambda place: place.phase):
        own = steps[place]
        composed = any(isinstance(step, Lanes) for step in own)
        if place.acts_on == AROUND and not composed:
            continue
        program = fields.setdefault(place.path, {})
        if composed:
            program["composed"] = True
        if place.acts_on == AROUND:
            program["around"] = around(place, own, compiler.units, blueprint)
        else:
            field = _FIELDS[place.acts_on]
            program[field] = (*program.get(field, ()), *own)
    for program in fields.values():
        if program.keys() == {"composed", "outputs"}:
            program["lone"] = _is_lone(program["outputs"])
    for path, key in compiler.joining():
        if fields.get(path) == {"outputs": (key,)}:
            fields[path]["joined"] = True
    batch = _batch(setup, adapters, blueprint)
    if batch is not None:
        fields.setdefault(entry.Top.key, {})["batch"] = batch
    return {path: Program(**program) for path, program in fields.items()}


def _is_lone(outputs: tuple[Step, ...]) -> bool:
    """Whether outputs are lanes alone that cut the batch, and all act at once."""
    match outputs:
        case (Lanes(kind="rows" | "route" | "tasks", block=0),):
            return True
    return False


def _batch(setup: Setup, adapters: Mapping[str, Adapter], blueprint: Blueprint) -> Batch | None:
    """What a setup asks of the batch, None if nothing."""
    found = {type(block): len(block.children) for block in blocks(setup)}
    if not found.keys() & {Parallel, BatchSplit, Route, MultiTask}:
        return None
    slots = (slot for name in names(setup) for slot in adapters[name].plan.slots)
    met = [blueprint.stacks.get(stack) for stack in {slot.stack for slot in slots}]
    images = any(info is None or info.inputs.ids is None for info in met)
    return Batch(copies(setup), examples(setup), found.get(Route, 0), found.get(MultiTask, 0), images)
