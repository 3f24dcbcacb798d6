"""Which blocks may lie in which, and how many rows each part of a setup gets.

What is refused has no meaning: a block that repeats the batch cannot lie where only a part of it, or a mean
of results, is asked for; groups of a fixed size cannot lie where the batch itself decides who gets which
example.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby

from adapterkit.composition.blocks import (
    BatchSplit,
    Block,
    Fuse,
    MultiTask,
    Parallel,
    Route,
    Setup,
    Stack,
    illegal,
)


def names(setup: Setup | None) -> tuple[str, ...]:
    """Every adapter of a setup, in order, each once; the weights of a fusion stand before its children."""
    return tuple(dict.fromkeys(_names(setup))) if setup is not None else ()


def _names(setup: Setup) -> Iterator[str]:
    if not isinstance(setup, Block):
        yield setup
        return
    if isinstance(setup, Fuse):
        yield setup.name
    for child in setup.children:
        yield from _names(child)


def blocks(setup: Setup | None) -> Iterator[Block]:
    """Every block of a setup, from outside to inside."""
    if isinstance(setup, Block):
        yield setup
        for child in setup.children:
            yield from blocks(child)


def first(setup: Setup | None) -> str | None:
    """The adapter that acts first, on everything; None if a part of the batch or sequence is all it gets."""
    while isinstance(setup, Stack):
        setup = setup.children[0]
    return setup if isinstance(setup, str) else None


def copies(setup: Setup | None) -> int:
    """How often the batch is repeated for a setup."""
    if isinstance(setup, Parallel):
        return sum(map(copies, setup.children))
    if isinstance(setup, Stack):
        return max(map(copies, setup.children))
    return 1


def parts(setup: Setup) -> list[tuple[int, Setup]]:
    """What acts on each part of the repeated batch, one after another: its examples, and a setup that neither
    repeats the batch nor cuts it into groups of a fixed size.

    Without such groups each copy of the batch is a part, of 1.
    """
    number = examples(setup) or 1
    return [part for each in _each_copy(setup) for part in _groups(each, number)]


def _each_copy(setup: Setup) -> list[Setup]:
    if isinstance(setup, Parallel):
        return [each for child in setup.children for each in _each_copy(child)]
    if isinstance(setup, Stack):
        own = [_each_copy(child) for child in setup.children]
        return [_with(setup, [each[i % len(each)] for each in own]) for i in range(copies(setup))]
    return [setup]


def _groups(setup: Setup, number: int) -> list[tuple[int, Setup]]:
    if not isinstance(setup, Block) or not any(isinstance(block, BatchSplit) for block in blocks(setup)):
        return [(number, setup)]
    if isinstance(setup, BatchSplit):
        sized = zip(setup.children, setup.batch_sizes, strict=True)
        return [group for child, size in sized if size for group in _groups(child, size)]
    own = [[part for size, part in _groups(child, number) for _ in range(size)] for child in setup.children]
    alike = groupby(zip(*own, strict=True))
    return [(len(list(same)), _with(setup, children)) for children, same in alike]


def _with(block: Block, children: Iterable[Setup]) -> Block:
    """The same block of others."""
    return type(block)(*children, **block.options())


def check(setup: Setup | None) -> None:
    """Refuse a setup that has no meaning.

    Raises: CompositionError: `bad-nesting`, or `bad-setup` if it is no setup at all.
    """
    if setup is None or isinstance(setup, str):
        return
    if not isinstance(setup, Block):
        message = (
            f"a setup is the name of an adapter, a block such as Stack, or None, not {type(setup).__name__}"
        )
        raise illegal("bad-setup", message)
    found = list(blocks(setup))
    for chosen, what in ((Route, "rows"), (MultiTask, "task_ids")):
        if sum(isinstance(block, chosen) for block in found) > 1:
            word = chosen.__name__
            message = f"there are several blocks {word}, but the batch says {what} for one"
            raise illegal("bad-nesting", message, f"one {word} with all children")
    _check(setup, ())
    examples(setup)


def _check(setup: Setup, outside: tuple[Block, ...]) -> None:
    if not isinstance(setup, Block):
        return
    for block in outside:
        inner, outer = type(setup).__name__, type(block).__name__
        if isinstance(setup, Parallel) and not isinstance(block, Stack | Parallel):
            message = f"{inner} repeats the whole batch, but {outer} asks for one result of a part of it"
            raise illegal("bad-nesting", message, f"{outer} inside of {inner}")
        if isinstance(setup, BatchSplit) and isinstance(block, Route | MultiTask):
            message = f"{inner} has groups of a fixed size, but {outer} gives as many as the batch says"
            raise illegal(
                "bad-nesting", message, f"{outer} inside of {inner}, or all adapters in one {outer}"
            )
    if isinstance(setup, Stack):
        wide = sorted({count for child in setup.children if (count := copies(child)) > 1})
        if len(wide) > 1:
            message = f"parts of a Stack repeat the batch {' and '.join(map(str, wide))} times"
            raise illegal("bad-nesting", message, "as many children in each Parallel of a Stack")
    for child in setup.children:
        _check(child, (*outside, setup))


def examples(setup: Setup | None) -> int | None:
    """How many examples (before they are repeated) a setup is for, None if it does not say.

    Raises: CompositionError: its parts say different numbers.
    """
    if isinstance(setup, BatchSplit):
        for child, size in zip(setup.children, setup.batch_sizes, strict=True):
            if size and examples(child) not in (None, size):
                raise _unlike({size, examples(child) or 0})
        return sum(setup.batch_sizes)
    if not isinstance(setup, Block):
        return None
    found = {number for child in setup.children if (number := examples(child)) is not None}
    if len(found) > 1:
        raise _unlike(found)
    return found.pop() if found else None


def _unlike(numbers: set[int]) -> Exception:
    said = " and ".join(map(str, sorted(numbers)))
    return illegal("batch-mismatch", f"parts of one batch are for {said} examples at once")
