"""LoRA of many adapters on one batch by stacked matrices: y = W x + b + s_i B_i A_i x for lane i."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from adapterkit.methods.lora import LoRA, add_rows

T = torch.Tensor
WIDE = 64
"""Up to so many tokens of an example times ranks of all lanes, all lanes at once cost less than the matrices
of each example."""
MANY_ROWS = 16
"""From so many rows on, a product with few rows is faster than one with few columns."""


class Stacked(NamedTuple):
    """Matrices of N lanes, and of one more that does nothing; shorter ranks are filled up with zeros.

    b holds the scale. The other fields are views of a and b.
    Shapes: a (N + 1, R, D_in), b (N + 1, R, D_out); lanes_a (N, R, D_in), lanes_b (N, R, D_out); wide_a
    (N R, D_in), wide_b (N R, D_out).
    """

    a: T
    b: T
    lanes_a: T
    lanes_b: T
    wide_a: T
    wide_b: T
    finite: bool = True
    """No lane has a B that would reach the examples of others as 0 * inf."""


class Rows(NamedTuple):
    """Which lane the examples take, and which columns are those of other lanes.

    Shapes: lane (B,), N for none; others (B, 1, N R).
    """

    lane: T
    others: T


def rows_of(index: T, stacked: Stacked) -> Rows:
    """From indices (B,) with -1 for none."""
    lanes, rank, _ = stacked.lanes_a.shape
    others = index[:, None] != torch.arange(lanes, device=index.device).repeat_interleave(rank)
    return Rows(torch.where(index < 0, lanes, index), others[:, None])


def fit(units: Sequence[Any]) -> bool:
    """Whether units, None where a lane has none, can act by stacked matrices as they would alone."""
    real = [unit for unit in units if unit is not None]
    first = real[0]
    return all(
        [
            type(unit) is LoRA
            and unit.gate is None
            and unit.A0 is None
            and unit.in_place
            and not (unit.dropout and unit.training)
            and unit.rows == first.rows
            and unit.A.dtype == first.A.dtype
            and type(unit.A) is nn.Parameter
            and "_hf_hook" not in unit.__dict__
            for unit in real
        ]
    )


def stack(units: Sequence[Any], looked_at: bool = False) -> Stacked:
    """The matrices of all lanes.

    Args: looked_at: whether they are finite is seen, for which a device is waited for.
    """
    real = [unit for unit in units if unit is not None]
    rank = max([unit.A.shape[0] for unit in real])
    none = real[0].A.new_zeros(rank, real[0].A.shape[1]), real[0].A.new_zeros(rank, real[0].B.shape[0])
    found = [none if unit is None else _filled(unit, rank) for unit in units]
    n = len(units)
    a, b = torch.stack([a for a, _ in (*found, none)]), torch.stack([b for _, b in (*found, none)])
    finite = not looked_at or b.is_meta or bool(torch.isfinite(b).all())
    return Stacked(a, b, a[:n], b[:n], a[:n].flatten(0, 1), b[:n].flatten(0, 1), finite)


def _filled(unit: LoRA, rank: int) -> tuple[T, T]:
    missing = rank - unit.A.shape[0]
    a, b = unit.A, unit.B.t()
    if unit.scaling != 1:
        b = b * unit.scaling
    return (F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, 0, 0, missing))) if missing else (a, b)


def _lowered(x: T, a: T) -> T:
    """A x, matrix by matrix. Shapes: x (N, M, D_in), a (N, R, D_in) -> (N, M, R)."""
    if x.shape[1] < MANY_ROWS:
        return torch.bmm(x, a.transpose(1, 2))
    return torch.bmm(a, x.transpose(1, 2)).transpose(1, 2)


def equal(out: T, x: T, unit: LoRA, stacked: Stacked) -> T:
    """Lanes that have the same number of examples each, one after another. Shapes: out (N B, ..., D_out)."""
    n = stacked.lanes_a.shape[0]
    low = _lowered(x.reshape(n, -1, x.shape[-1]), stacked.lanes_a)
    if unit.rows is None and out.is_contiguous() and out.dtype == low.dtype:
        out.view(n, -1, out.shape[-1]).baddbmm_(low, stacked.lanes_b)
        return out
    delta = torch.bmm(low, stacked.lanes_b)
    return add_rows(out, delta.view(*x.shape[:-1], -1), unit.rows, unit.in_place)


def chosen(out: T, x: T, unit: LoRA, stacked: Stacked, rows: Rows) -> T:
    """Examples that take any lane or none. Shapes: out (B, ..., D_out), x (B, ..., D_in)."""
    count, width = x.shape[0], x.shape[-1]
    fresh = unit.rows is None and out.is_contiguous() and out.dtype == x.dtype
    if x.numel() * stacked.wide_a.shape[0] <= WIDE * count * width and stacked.finite:
        # filled, not multiplied: what overflows in another lane is no business of this one
        wide = F.linear(x.reshape(count, -1, width), stacked.wide_a).masked_fill(rows.others, 0)
        wide = wide.view(-1, wide.shape[-1])
        if fresh:
            out.view(-1, out.shape[-1]).addmm_(wide, stacked.wide_b)
            return out
        return add_rows(out, (wide @ stacked.wide_b).view(*x.shape[:-1], -1), unit.rows, unit.in_place)
    low = _lowered(x.reshape(count, -1, width), stacked.a.index_select(0, rows.lane))
    b = stacked.b.index_select(0, rows.lane)
    if fresh:
        out.view(count, -1, out.shape[-1]).baddbmm_(low, b)
        return out
    return add_rows(out, torch.bmm(low, b).view(*x.shape[:-1], -1), unit.rows, unit.in_place)
