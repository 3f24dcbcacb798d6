"""Which block has a meaning for which method, said by what the units of the method are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adapterkit.composition import Average, Block, Split
from adapterkit.errors import CompositionError, Problem
from adapterkit.methods.base import Unit
from adapterkit.methods.prompt import Prompt
from adapterkit.model.blueprint import Slot


def refuse_undefined(
    block: Block, units: Sequence[tuple[Unit, Slot]], lanes: Sequence[tuple[Any, ...]]
) -> None:
    """Refuse units for which a block has no meaning at a place.

    Args: units: all of the lanes. lanes: their steps.
    Raises: CompositionError.
    """
    problems = []
    for unit, slot in units:
        problem = _problem(block, unit, slot)
        if problem is not None:
            problems.append(problem)
    prompts = [unit for unit, _ in units if isinstance(unit, Prompt)]
    if prompts and (len({(len(p.embeds), p.offset) for p in prompts}) > 1 or not all(lanes)):
        word = type(block).__name__
        message = f"{word}: all examples get a prompt of the same length at the same place, or none does"
        problems.append(Problem("uneven-prompts", message, units[0][1].address))
    if problems:
        raise CompositionError(problems)


def _problem(block: Block, unit: Unit, slot: Slot) -> Problem | None:
    word = type(block).__name__
    if isinstance(block, Split):
        if not unit.per_position or getattr(slot, "chunked", False):
            message = f"{word}: what the unit does depends on the whole sequence"
            return Problem("undefined-block", message, slot.address)
        return None
    if isinstance(block, Average):
        if not unit.averages:
            message = f"{word}: a mean of what such units give has no meaning"
            return Problem("undefined-block", message, slot.address)
        return None
    if slot.batch != "first":
        message = f"{word}: {slot.path} is called with something that has no row for each example"
        return Problem("no-batch-axis", message, slot.address)
    return None
