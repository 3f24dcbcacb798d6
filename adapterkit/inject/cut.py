"""How the lanes of a block take their parts of a tensor, and how these are put together again.

Each cut has `take(lane, tensor)` for what the units of a lane act on, `part(lane, value)` for what they read
besides, and `join(parts)`. Parts may be views; what is put together is never written by others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch

from adapterkit.errors import CompositionError, Problem
from adapterkit.methods.positions import Span

T = torch.Tensor


class Cut:
    """Lanes that take a slice each along one axis."""

    def __init__(self, axis: int, sizes: Sequence[int]) -> None:
        self.axis = axis
        self.sizes = sizes
        self.starts = [0, *accumulate(sizes)]

    def empty(self, lane: int) -> bool:
        return not self.sizes[lane]

    def take(self, lane: int, tensor: T) -> T:
        found = self._slice(lane, tensor)
        # one tensor for each lane: autograd would chain what is written into views of one
        return found.clone() if torch.is_grad_enabled() else found

    def part(self, lane: int, value: Any) -> Any:
        return mapped(value, lambda tensor: self._slice(lane, tensor) if self._fits(tensor) else tensor)

    def _fits(self, tensor: T) -> bool:
        size = tensor.shape[self.axis] if tensor.ndim > self.axis else 0
        # one row for all: a mask or positions that are broadcast
        return size > 0 and size % self.starts[-1] == 0 and (self.axis == 0 or size == self.starts[-1])

    def _slice(self, lane: int, tensor: T) -> T:
        each = tensor.shape[self.axis] // self.starts[-1]
        return tensor.narrow(self.axis, self.starts[lane] * each, self.sizes[lane] * each)

    def join(self, parts: Sequence[T]) -> T:
        return torch.cat(list(parts), dim=self.axis)


def rows(numbers: Sequence[float], tensor: T, place: str) -> Cut:
    """Groups of examples. A model may see each as several rows, which are together then.

    Raises: CompositionError: the rows do not divide into the groups.
    """
    sizes = [int(number) for number in numbers]
    if not tensor.ndim or tensor.shape[0] % sum(sizes):
        message = (
            f"{place} is called with {tuple(tensor.shape)}, which do not divide into {sum(sizes)} examples"
        )
        raise CompositionError(Problem("batch-mismatch", message))
    return Cut(0, sizes)


def segments(numbers: Sequence[float], tensor: T, place: str) -> Cut:
    """Segments of the sequence.

    Raises: CompositionError: the sequence has another length.
    """
    sizes = [int(number) for number in numbers]
    if tensor.ndim < 3 or tensor.shape[1] != sum(sizes):
        message = f"{place} is called with {tuple(tensor.shape)}, but Split cuts {sum(sizes)} positions"
        expected = "splits that add up to the length of the sequence, in every stack where the adapters act"
        raise CompositionError(Problem("split-mismatch", message, expected=expected))
    return Cut(1, sizes)


class Pick(Cut):
    """Lanes that take the examples that an index names; those of no lane (-1) are left as they are."""

    def __init__(self, groups: Sequence[T], order: T) -> None:
        self.groups = groups
        """Positions of the examples of each lane, and last of those of none."""
        self.order = order

    def empty(self, lane: int) -> bool:
        return not self.groups[lane].shape[0]

    def take(self, lane: int, tensor: T) -> T:
        return tensor.index_select(0, self.groups[lane])

    def part(self, lane: int, value: Any) -> Any:
        return mapped(value, lambda tensor: self.take(lane, tensor) if self._fits(tensor) else tensor)

    def _fits(self, tensor: T) -> bool:
        return tensor.ndim > 0 and tensor.shape[0] == self.order.shape[0]

    def join(self, parts: Sequence[T]) -> T:
        return torch.cat(list(parts), dim=0).index_select(0, self.order)


class Mask(Cut):
    """The same in a compiled graph, which must not depend on the index: each lane acts on all examples."""

    def __init__(self, index: T, lanes: int) -> None:
        self.index = index
        self.lanes = lanes

    def empty(self, lane: int) -> bool:
        return lane == self.lanes  # what is left as it is has nothing to compute

    def take(self, lane: int, tensor: T) -> T:
        return tensor.clone()

    def part(self, lane: int, value: Any) -> Any:
        return value

    def join(self, parts: Sequence[T]) -> T:
        result = parts[-1]
        for lane, part in enumerate(parts[: self.lanes]):
            where = (self.index == lane).view(-1, *[1] * (part.ndim - 1))
            result = torch.where(where, part, result)
        return result


class Mean(Cut):
    """Lanes that all act on everything; put together is their weighted mean.

    What is missing to a sum of 1 is the weight of the value itself.
    """

    def __init__(self, shares: Sequence[float], value: T) -> None:
        self.shares = shares
        self.value = value
        rest = 1.0 - sum(shares)
        self.rest = rest if abs(rest) > 1e-9 else 0.0

    def empty(self, lane: int) -> bool:
        return False

    def take(self, lane: int, tensor: T) -> T:
        return tensor.clone()

    def part(self, lane: int, value: Any) -> Any:
        return value

    def join(self, parts: Sequence[T]) -> T:
        total = self.value * self.rest if self.rest else None
        for share, part in zip(self.shares, parts, strict=True):
            weighted = part if share == 1 else part * share
            total = weighted if total is None else total + weighted
        assert total is not None
        return total


def mapped(value: Any, function: Any) -> Any:
    """A value with its tensors changed, in tuples, lists and maps; the same object if none is."""
    if isinstance(value, T):
        return function(value)
    if isinstance(value, Span):
        index = value.index
        return replace(value, index=function(index)) if isinstance(index, T) else value
    if isinstance(value, tuple | list):
        found = [mapped(item, function) for item in value]
        if all(new is old for new, old in zip(found, value, strict=True)):
            return value
        return type(value)(found) if type(value) in (tuple, list) else type(value)(*found)
    if isinstance(value, Mapping):
        changed = {key: mapped(item, function) for key, item in value.items()}
        if all(changed[key] is item for key, item in value.items()):
            return value
        return type(value)(**changed) if hasattr(value, "to_tuple") else changed
    return value
