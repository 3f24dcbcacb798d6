"""Positions that are put into a sequence and taken out of it again.

What passes between the two ends is a `Span` in the flow of the forward pass, under `key(stack)`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from adapterkit.methods.flow import Flow, flow_of

Index = int | torch.Tensor


@dataclass(frozen=True)
class Span:
    """Inserted positions: where (a number, or one for each row (B,)), how many, length with them."""

    index: Index
    count: int
    total: int
    fresh: bool = True
    """Whether they are in the queries; under a cache, later steps see them among the keys alone."""
    static: bool = False
    """Whether no entry has said where: the same place in every pass."""


def key(stack: str) -> str:
    return f"{stack}.prompt"


def start(mask: torch.Tensor | None, offset: int, hides: bool = False) -> Index:
    """Where the prompt goes: `offset` behind the first position that the mask (B, T) does not hide.

    Args: hides: a position is hidden by a one, else by a zero.
    """
    return offset if mask is None else ((mask != 0) ^ hides).long().argmax(dim=1) + offset


def widened(mask: torch.Tensor, count: int, index: Index, hides: bool = False) -> torch.Tensor:
    """A mask (B, T) with a prompt that it shows: (B, P + T); axes of one between stay where they are."""
    rows = mask.flatten(1)
    wide = insert(rows, rows.new_full((1, count), not hides), index)
    return wide.view(*mask.shape[:-1], -1)


def as_rows(mask: torch.Tensor, length: int) -> torch.Tensor | None:
    """A mask of T keys as (B, T): it may have axes of one between, for heads and queries; else None.

    Numbers with more axes are added to scores, and what one query sees of more keys is a mask of pairs.
    """
    if mask.ndim == 2:
        return mask
    plain = 2 < mask.ndim < 5 and not mask.is_floating_point() and length > 1
    return mask.flatten(1) if plain and mask.shape[1:] == (*[1] * (mask.ndim - 2), length) else None


def insert(x: torch.Tensor, new: torch.Tensor, index: Index) -> torch.Tensor:
    """Put `new` into x at an index. Shapes: x (B, T, ...), new (B or 1, P, ...) -> (B, T + P, ...)."""
    new = new.to(x.device, x.dtype).expand(x.shape[0], *new.shape[1:])
    if isinstance(index, int):
        return torch.cat([x[:, :index], new, x[:, index:]], dim=1)
    length, count = x.shape[1], new.shape[1]
    at, index = torch.arange(length + count, device=x.device), index.to(x.device)[:, None]
    source = torch.where(at < index, at, at - count)
    source = torch.where((at >= index) & (at < index + count), length + at - index, source)
    return _take(torch.cat([x, new], dim=1), source, 1)


def remove(x: torch.Tensor, index: Index, count: int, dim: int) -> torch.Tensor:
    """Undo `insert` along an axis."""
    length = x.shape[dim] - count
    if isinstance(index, int):
        rest = x.narrow(dim, index + count, length - index)
        return torch.cat([x.narrow(dim, 0, index), rest], dim=dim) if index else rest
    at, index = torch.arange(length, device=x.device), index.to(x.device)[:, None]
    return _take(x, torch.where(at < index, at, at + count), dim)


def _take(x: torch.Tensor, source: torch.Tensor, dim: int) -> torch.Tensor:
    """Take other positions of x along one axis, in each row its own: source (B, L)."""
    shape = [1] * x.ndim
    shape[0], shape[dim] = source.shape
    size = list(x.shape)
    size[dim] = source.shape[1]
    return x.gather(dim, source.view(shape).expand(size))


def shifted(positions: torch.Tensor, index: Index, count: int, offset: int, rows: int) -> torch.Tensor:
    """Positions (B, T) with those of a prompt: it begins where the first token that it pushes away was.

    A grid (axes, B, T) is moved along each of its axes, as a text in front of an image moves it.
    """
    if positions.ndim > 2:
        return torch.stack([shifted(axis, index, count, offset, rows) for axis in positions])
    positions = positions.expand(rows, -1)
    at = torch.arange(positions.shape[1], device=positions.device)
    if isinstance(index, int):
        begin = positions[:, :1]
    else:
        index = index.to(positions.device)[:, None]
        begin = positions.gather(1, index - offset)
    moved = positions + count * (at >= index)
    own = begin + offset + torch.arange(count, device=positions.device)
    return insert(moved, own, index if isinstance(index, int) else index[:, 0])


class Strip(nn.Module):
    """Where a stack is left: take the inserted positions out of states (B, T, D) and attentions (B, H, T, T).

    They are told by their length, in tensors, tuples and outputs of models; what has been stripped before is
    left as it is. As an output unit it strips what its host gives, as an entry unit what its host gets.
    """

    def __init__(self, stack: str) -> None:
        super().__init__()
        self.stack = stack

    def forward(self, out: Any, x: Any, host: Any, flow: Flow | None = None) -> Any:
        if flow is not None:
            span = flow.get(key(self.stack))
            return strip(out, span), {name: strip(value, span) for name, value in x.items()}
        return strip(out, flow_of(host).get(key(self.stack)))


class StripRead(nn.Module):
    """Where a stack is left that reads another: take the other's prompt out of attentions."""

    def __init__(self, stack: str) -> None:
        super().__init__()
        self.stack = stack

    def forward(self, out: Any, x: Any, host: Any) -> Any:
        span = flow_of(host).get(key(self.stack))
        found = out.get("cross_attentions") if isinstance(out, dict) else None
        if span is not None and found is not None:
            out["cross_attentions"] = strip(found, replace(span, fresh=False))
        return out


def strip(value: Any, span: Span | None) -> Any:
    """A value without the inserted positions."""
    if span is None:
        return value
    if isinstance(value, torch.Tensor):
        if value.ndim == 3 and span.fresh and value.shape[1] == span.total:
            return remove(value, span.index, span.count, 1)
        if value.ndim == 4 and value.shape[3] == span.total:
            if span.fresh and value.shape[2] == span.total:
                value = remove(value, span.index, span.count, 2)
            return remove(value, span.index, span.count, 3)
        return value
    if type(value) is tuple:
        return tuple(strip(item, span) for item in value)
    if isinstance(value, dict):
        for name in list(value):
            value[name] = strip(value[name], span)
    return value
