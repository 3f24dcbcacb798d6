"""LoRA of many adapters on one batch by stacked matrices: y = W x + b + s_i B_i A_i x for lane i."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from adapterkit.methods.lora import LoRA, add_rows

T = torch.Tensor
WIDE_TOKENS = 2
"""Up to so many tokens for each example, all lanes at once cost less than the matrices of each example."""


class Stacked(NamedTuple):
    """Matrices of N lanes, and of one that does nothing; shorter ranks are filled up with zeros.

    Shapes: a (N + 1, R, D_in), b (N + 1, R, D_out), which holds the scale.
    """

    a: T
    b: T

    @property
    def lanes(self) -> int:
        return self.a.shape[0] - 1


class Rows(NamedTuple):
    """Which lane the examples take. Shapes: lane (B,), N for none; chosen (B, N, 1) of ones and zeros."""

    lane: T
    chosen: T


def rows_of(index: T, lanes: int, dtype: torch.dtype) -> Rows:
    """From indices (B,) with -1 for none."""
    chosen = index[:, None] == torch.arange(lanes, device=index.device)
    return Rows(torch.where(index < 0, lanes, index), chosen.to(dtype)[..., None])


def fit(units: Sequence[Any]) -> bool:
    """Whether units, None where a lane has none, can act by stacked matrices as they would alone."""
    real = [unit for unit in units if unit is not None]
    first = real[0]
    return all(
        type(unit) is LoRA
        and unit.gate is None
        and unit.A0 is None
        and unit.in_place
        and not (unit.dropout and unit.training)
        and unit.rows == first.rows
        and unit.A.dtype == first.A.dtype
        and type(unit.A) is torch.nn.Parameter
        and "_hf_hook" not in unit.__dict__
        for unit in real
    )


def tensors(units: Sequence[Any]) -> list[T]:
    """What the stacked matrices are made of."""
    return [tensor for unit in units if unit is not None for tensor in (unit.A, unit.B)]


def stack(units: Sequence[Any]) -> Stacked:
    """The matrices of all lanes."""
    real = [unit for unit in units if unit is not None]
    rank = max([unit.A.shape[0] for unit in real])
    none = real[0].A.new_zeros(rank, real[0].A.shape[1]), real[0].A.new_zeros(rank, real[0].B.shape[0])
    found = [none if unit is None else _filled(unit, rank) for unit in units]
    return Stacked(torch.stack([a for a, _ in (*found, none)]), torch.stack([b for _, b in (*found, none)]))


def _filled(unit: LoRA, rank: int) -> tuple[T, T]:
    missing = rank - unit.A.shape[0]
    a, b = unit.A, unit.B.t()
    if unit.scaling != 1:
        b = b * unit.scaling
    return (F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, 0, 0, missing))) if missing else (a, b)


def equal(out: T, x: T, unit: LoRA, stacked: Stacked) -> T:
    """Lanes that have the same number of examples each, one after another. Shapes: out (N B, T, D_out)."""
    n = stacked.lanes
    low = torch.bmm(x.reshape(n, -1, x.shape[-1]), stacked.a[:n].transpose(1, 2))
    if unit.rows is None and out.is_contiguous() and out.dtype == low.dtype:
        out.view(n, -1, out.shape[-1]).baddbmm_(low, stacked.b[:n])
        return out
    delta = torch.bmm(low, stacked.b[:n])
    return add_rows(out, delta.view(*x.shape[:-1], -1), unit.rows, unit.in_place)


def chosen(out: T, x: T, unit: LoRA, stacked: Stacked, rows: Rows) -> T:
    """Examples that take any lane or none. Shapes: out (B, ..., D_out), x (B, ..., D_in)."""
    n, count = stacked.lanes, x.shape[0]
    flat = x.reshape(count, -1, x.shape[-1])
    fresh = unit.rows is None and out.is_contiguous() and out.dtype == x.dtype
    if flat.shape[1] <= WIDE_TOKENS:
        low = F.linear(flat, stacked.a[:n].flatten(0, 1)).view(count, -1, n, stacked.a.shape[1])
        wide = (low * rows.chosen[:, None]).view(-1, n * stacked.a.shape[1])
        b = stacked.b[:n].flatten(0, 1)
        if fresh:
            out.view(-1, out.shape[-1]).addmm_(wide, b)
            return out
        return add_rows(out, (wide @ b).view(*x.shape[:-1], -1), unit.rows, unit.in_place)
    low = torch.bmm(flat, stacked.a[rows.lane].transpose(1, 2))
    b = stacked.b[rows.lane]
    if fresh:
        out.view(count, -1, out.shape[-1]).baddbmm_(low, b)
        return out
    return add_rows(out, torch.bmm(low, b).view(*x.shape[:-1], -1), unit.rows, unit.in_place)
