"""Cores that are called for one lane at a time, because a unit within them cannot cut the batch itself."""

from __future__ import annotations

from collections.abc import Mapping

from adapterkit.activation.places import ROW_WISE, Place, asked
from adapterkit.errors import CompositionError, Problem
from adapterkit.inject.lanes import INDEX
from adapterkit.methods.base import Unit
from adapterkit.model.blueprint import Blueprint, Slot
from adapterkit.model.cores import whole_arguments
from adapterkit.runtime import Around, Lanes, Step


def around(
    place: Place,
    steps: tuple[Step, ...],
    units: Mapping[tuple[str, str], tuple[Unit, Slot]],
    blueprint: Blueprint,
) -> Around:
    """The blocks around a core, one within the other.

    Args: units: all that were met, by path and key.
    Raises: CompositionError: several of them cut the batch into groups.
    """
    inside = [found for (path, _), found in units.items() if f"{path}.".startswith(f"{place.path}.")]
    # the rows as well: a block inside, none of whose units is called in parts, asks for them all the same
    reads = (
        *dict.fromkeys(key for unit, _ in inside for key in unit.per_example),
        *INDEX.values(),
    )
    found = sorted(
        (step for step in steps if isinstance(step, Lanes)), key=lambda step: ROW_WISE.index(step.kind)
    )
    if sum(step.kind == "rows" for step in found) > 1:
        message = f"{place.path} is called for one lane at a time, but two blocks of a Stack cut the batch"
        expected = "one block with Stacks in it, or adapters without this slot"
        raise CompositionError(Problem("no-batch-axis", message, inside[0][1].address, expected))
    whole: Lanes | None = None
    for step in reversed(found):
        whole = _within_lanes(step, whole, reads)
    assert whole is not None
    return Around(whole, whole_arguments(blueprint, inside[0][1].stack))


def _within_lanes(step: Lanes, inner: Lanes | None, reads: tuple[str, ...]) -> Lanes:
    """A block around a core with another one in each of its lanes."""
    own = []
    for lane in step.lanes:
        nested = [s for s in lane if isinstance(s, Lanes)]
        last = _within_lanes(nested[0], inner, reads) if nested else inner
        own.append(() if last is None else (last,))
    more = () if inner is None else asked((inner,))
    read = dict.fromkeys((*step.reads, *reads, *more))
    return step._replace(lanes=tuple(own), reads=tuple(read))
