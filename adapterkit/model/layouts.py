"""Where the rows of one role lie in a fused matrix. Pure arithmetic, no models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

Layout = Literal["blocks", "per_head", "per_group"]


@dataclass(frozen=True)
class Rows:
    """Rows of one role: in each of `groups` equal groups, `length` rows from `start`.

    A fused output (..., groups * width) is seen as (..., groups, width); the role is a stretch of the last
    axis. This holds for all three layouts, so that a role is always a strided view and never an index list.
    """

    groups: int
    width: int
    start: int
    length: int

    @property
    def total(self) -> int:
        """Number of rows of the role."""
        return self.groups * self.length

    def view(self, fused: torch.Tensor) -> torch.Tensor:
        """The role's part of a fused output (..., groups * width) as a view (..., groups, length)."""
        groups: torch.Tensor = fused.unflatten(-1, (self.groups, self.width))
        return groups.narrow(-1, self.start, self.length)

    def take(self, weight: torch.Tensor) -> torch.Tensor:
        """The role's rows of a fused weight (rows, ...) as (total, ...): a view of one block, else a copy."""
        groups: torch.Tensor = weight.unflatten(0, (self.groups, self.width))
        return groups.narrow(1, self.start, self.length).flatten(0, 1)

    def put(self, weight: torch.Tensor, rows: torch.Tensor) -> None:
        """Write the role's rows (total, ...) into a fused weight in place."""
        stretch = weight.unflatten(0, (self.groups, self.width)).narrow(1, self.start, self.length)
        stretch.copy_(rows.unflatten(0, (self.groups, self.length)))


def split(
    total: int,
    layout: Layout,
    order: tuple[str, ...],
    heads: int | None = None,
    kv_heads: int | None = None,
    widths: Mapping[str, int] | None = None,
    groups: int | None = None,
) -> dict[str, Rows]:
    """Rows of each role of a fused matrix with `total` rows.

    Args: heads, kv_heads: H query heads and K key/value heads; not needed for gate and up, nor for equal
    blocks. widths: rows of one head of each role, where they differ. groups: number of equal groups that hold
    equal blocks of all roles, if not that of heads.
    Raises: ValueError: the rows do not divide among the heads.
    """
    if groups is not None:
        return _grouped(total, groups, {role: 1 for role in order})
    if widths:
        return _unequal(total, layout, order, heads, kv_heads, widths)
    if set(order) & {"gate", "up"} or (layout == "blocks" and heads is None):
        return _blocks(total, {role: 1 for role in order})
    if heads is None:
        raise ValueError("the number of heads is not known")
    kv = kv_heads or heads
    if heads % kv:
        raise ValueError(f"{heads} query heads do not divide among {kv} key/value heads")
    if layout == "blocks":
        return _blocks(total, {role: heads if role == "q" else kv for role in order})
    if layout == "per_head" and kv != heads:
        raise ValueError(f"layout per_head needs as many key/value heads ({kv}) as query heads ({heads})")
    # one group for each key/value head: within it the roles lie in blocks
    return _grouped(total, kv, {role: heads // kv if role == "q" else 1 for role in order})


def _grouped(total: int, groups: int, shares: dict[str, int]) -> dict[str, Rows]:
    """Equal groups of rows, in each of them the roles in blocks."""
    if total % groups:
        raise ValueError(f"{total} rows do not divide among {groups} groups")
    width = total // groups
    return {
        role: Rows(groups, width, rows.start, rows.length) for role, rows in _blocks(width, shares).items()
    }


def _unequal(
    total: int,
    layout: Layout,
    order: tuple[str, ...],
    heads: int | None,
    kv_heads: int | None,
    widths: Mapping[str, int],
) -> dict[str, Rows]:
    """As `split`, where the heads of different roles have different widths."""
    if heads is None:
        raise ValueError("the number of heads is not known")
    groups = 1 if layout == "blocks" else kv_heads or heads
    found, start = {}, 0
    lengths = {role: widths[role] * (heads if role == "q" else kv_heads or heads) // groups for role in order}
    for role, length in lengths.items():
        found[role] = Rows(groups, total // groups, start, length)
        start += length
    if start * groups != total:
        raise ValueError(f"{total} rows are not the {start * groups} of heads of widths {dict(widths)}")
    return found


def _blocks(total: int, shares: dict[str, int]) -> dict[str, Rows]:
    unit, rest = divmod(total, sum(shares.values()))
    if rest:
        raise ValueError(f"{total} rows do not divide into {sum(shares.values())} equal shares")
    found, start = {}, 0
    for role, share in shares.items():
        found[role] = Rows(1, total, start, share * unit)
        start += share * unit
    return found
