"""Where the rows of one role lie in a fused matrix. Pure arithmetic, no models."""

from __future__ import annotations

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
    total: int, layout: Layout, order: tuple[str, ...], heads: int | None = None, kv_heads: int | None = None
) -> dict[str, Rows]:
    """Rows of each role of a fused matrix with `total` rows.

    Args: heads, kv_heads: H query heads and K key/value heads; not needed for gate and up, nor for equal
    blocks.
    Raises: ValueError: the rows do not divide among the heads.
    """
    if set(order) & {"gate", "up"} or (layout == "blocks" and heads is None):
        return _blocks(total, {role: 1 for role in order})
    if heads is None:
        raise ValueError("the number of heads is not known")
    groups = kv_heads or heads
    if heads % groups:
        raise ValueError(f"{heads} query heads do not divide among {groups} key/value heads")
    if layout == "blocks":
        return _blocks(total, {role: heads if role == "q" else groups for role in order})
    if layout == "per_head" and groups != heads:
        raise ValueError(f"layout per_head needs as many key/value heads ({groups}) as query heads ({heads})")
    # one group for each key/value head: within it the roles lie in blocks
    if total % groups:
        raise ValueError(f"{total} rows do not divide among {groups} groups")
    per_group = _blocks(total // groups, {role: heads // groups if role == "q" else 1 for role in order})
    return {role: Rows(groups, total // groups, rows.start, rows.length) for role, rows in per_group.items()}


def _blocks(total: int, shares: dict[str, int]) -> dict[str, Rows]:
    unit, rest = divmod(total, sum(shares.values()))
    if rest:
        raise ValueError(f"{total} rows do not divide into {sum(shares.values())} equal shares")
    found, start = {}, 0
    for role, share in shares.items():
        found[role] = Rows(1, total, start, share * unit)
        start += share * unit
    return found
