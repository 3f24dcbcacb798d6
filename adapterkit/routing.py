"""Names of adapters, one for each example, as indices of the lanes of a setup."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from adapterkit.composition import Block, MultiTask, Route, Setup, parse
from adapterkit.composition.rules import blocks
from adapterkit.errors import CompositionError, Problem, did_you_mean, listing


def chosen(setup: Setup | None, rows: Any, task_ids: Any, device: Any) -> tuple[Any, Any]:
    """Indices (B,) for the block Route and for the block MultiTask of a setup, None where nothing is said.

    Raises: CompositionError: unknown names, numbers out of range, or there is no such block.
    """
    return (
        _index(setup, Route, "rows", rows, device),
        _index(setup, MultiTask, "task_ids", task_ids, device),
    )


def _index(setup: Setup | None, kind: type[Block], option: str, said: Any, device: Any) -> Any:
    if said is None:
        return None
    block = next((block for block in blocks(setup) if isinstance(block, kind)), None)
    if block is None:
        message = f"{option} are given, but there is no {kind.__name__} in {setup!r}"
        raise CompositionError(Problem("no-rows", message, option))
    listed = _plain(said)
    if isinstance(listed, str) or not isinstance(listed, Sequence):
        message = f"{option} are a list with one name for each example, or a tensor, not {said!r}"
        raise CompositionError(Problem("unknown-row", message, option))
    numbers = [_number(block, option, _plain(item)) for item in listed]
    count = len(block.children)
    lowest = -1 if kind is Route else 0
    wrong = [number for number in numbers if not lowest <= number < count]
    if wrong:
        message = f"{option} hold {listing(map(str, dict.fromkeys(wrong)))}, but there are {count} children"
        expected = f"{lowest} to {count - 1}" + (", where -1 is none" if kind is Route else "")
        raise CompositionError(Problem("unknown-row", message, option, expected))
    return torch.tensor(numbers, dtype=torch.long, device=device)


def _plain(said: Any) -> Any:
    """Tensors and arrays, and the numbers that they hold, as Python's own."""
    return said.tolist() if hasattr(said, "tolist") else said


def _number(block: Block, option: str, item: Any) -> int:
    """The number of the child that an item names."""
    if item is None and isinstance(block, Route):
        return -1
    if isinstance(item, int) and not isinstance(item, bool):
        return item
    wanted = parse(item) if isinstance(item, str) else item
    if wanted in block.children:
        return block.children.index(wanted)
    known = [child if isinstance(child, str) else repr(child) for child in block.children]
    message = f"{option} name {item!r}, which is not among the children of {type(block).__name__}"
    hint = did_you_mean(str(item), known)
    raise CompositionError(Problem("unknown-row", message, option, f"one of {listing(known)}", hint))
