"""Which block has a meaning for which method, said by what the units of the method are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from adapterkit.composition import Average, Block, Split
from adapterkit.errors import CompositionError, Problem
from adapterkit.methods.base import Unit
from adapterkit.methods.prompt import Prompt
from adapterkit.model.blueprint import Slot


def refuse_undefined(block: Block, units: Iterable[tuple[Unit, Slot]]) -> None:
    """Refuse units for which a block has no meaning at a place.

    Raises: CompositionError.
    """
    problems = []
    for unit, slot in units:
        problem = _problem(block, unit, slot)
        if problem is not None:
            problems.append(problem)
    if problems:
        raise CompositionError(problems)


def refuse_uneven(prompts: Iterable[tuple[Prompt, Slot]], lengths: Sequence[int] = ()) -> None:
    """Refuse prompts that cannot be put into one batch together.

    Args: lengths: positions that each lane of a block takes.
    Raises: CompositionError.
    """
    found: dict[str, Prompt] = {}
    for prompt, slot in prompts:
        other = found.setdefault(prompt.stack, prompt)
        if other.place != prompt.place or len(set(lengths)) > 1:
            message = "prompts that act together have one place, and as many positions for each example"
            raise CompositionError(Problem("uneven-prompts", message, slot.address))


def refuse_no_first(first: str | None, slot: Slot) -> None:
    """Refuse a unit that acts only in the first adapter of a setup in which no adapter is that.

    Raises: CompositionError.
    """
    if first is None:
        message = "acts only where its adapter is the first of a setup, and here the first act side by side"
        expected = "Stack(...) with adapters before all blocks, or the adapter attached with first_only=False"
        raise CompositionError(Problem("undefined-block", message, slot.address, expected))


def _problem(block: Block, unit: Unit, slot: Slot) -> Problem | None:
    word = type(block).__name__
    if isinstance(block, Split):
        if not unit.per_position or getattr(slot, "chunked", False):
            message = f"{word}: what the unit does depends on the whole sequence"
            return Problem("undefined-block", message, slot.address)
        if slot.batch != "first":
            message = f"{word}: {slot.path} is called with something that has no row for each position"
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
