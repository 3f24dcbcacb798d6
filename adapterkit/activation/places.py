"""What the rooms of a compiled setup share: places with their steps, and how blocks take their parts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from adapterkit.composition import Average, BatchSplit, Block, MultiTask, Parallel, Split, copies
from adapterkit.inject.lanes import INDEX
from adapterkit.runtime import Lanes, Step


class Place(NamedTuple):
    """Where and when a unit acts: steps at one place run together."""

    path: str
    acts_on: str
    phase: int


Steps = dict[Place, tuple[Step, ...]]
Heads = dict[Place, Step]
AROUND = "around"
ROW_WISE = ("rows", "tasks", "route")
"""Kinds of lanes that give each its examples, in the order in which one may lie in another around a core."""


def kind_of(block: Block) -> tuple[str, tuple[float, ...]]:
    """How the lanes of a block take their parts, and how much each."""
    match block:
        case Parallel():
            return "rows", tuple(map(copies, block.children))
        case BatchSplit():
            return "rows", block.batch_sizes
        case Split():
            return "split", block.splits
        case Average():
            return "average", block.shares
        case MultiTask():
            return "tasks", ()
    return "route", ()


def alike(kind: str, own: Sequence[tuple[Step, ...]], numbers: Sequence[float]) -> bool:
    """Whether all lanes make the same of their parts as one would make of the whole."""
    if kind == "average":
        return len(own) == 1 and numbers[0] == 1
    if kind == "split":
        return len(own) == 1
    return all(lane == own[0] for lane in own)


def one_by_one(kind: str, own: tuple[tuple[Step, ...], ...]) -> list[tuple[tuple[Step, ...], ...]]:
    """Lanes with as many units each, as one block for the first of each, one for the second, and so on.

    Blocks of one unit each may run in one go. A mean is taken of all that the lanes do, so it stays one.
    """
    counts = {len(lane) for lane in own if lane}
    if kind == "average" or len(counts) != 1 or any(isinstance(step, Lanes) for lane in own for step in lane):
        return [own]
    return [tuple(lane[i : i + 1] for lane in own) for i in range(counts.pop())]


def asked(steps: Iterable[Step]) -> Iterator[str]:
    """What blocks among the steps read from the flow, the choice of a lane included."""
    for step in steps:
        if isinstance(step, Lanes):
            yield from step.reads
            if step.kind in INDEX:
                yield INDEX[step.kind]
