"""The prefix of one call of an attention core."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

State = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Keys (1 or B, K, P, E_k), values (1 or B, K, P, E_v), and which an example sees (B, P); None: all."""


class Prefix:
    """P keys and values, and how often attention has taken them."""

    def __init__(self, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor | None = None) -> None:
        self.key = key
        self.value = value
        self.visible = visible
        self.shifts = False
        """Whether the model's bias of relative positions counts the prefix, too."""
        self.bias: torch.Tensor | None = None
        """That of the prefix's own columns, (1, H, Q, P)."""
        self.length = key.shape[2]
        self.columns = 0
        self.hits = 0

    def before(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (B, H, T, E) with the prefix before them; H is K or a multiple of it."""
        self.hits += 1
        self.columns = self.length + key.shape[2]
        return _before(self.key, key), _before(self.value, value)

    def extended(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """A mask (..., T) with columns for the prefix: every query of an example sees them, or none does."""
        if mask is None:
            return None
        if self.visible is None:
            return self.padded(mask, 0.0 if mask.is_floating_point() else 1.0)
        shape = torch.broadcast_shapes(mask.shape[:-1], (self.visible.shape[0], *[1] * (mask.ndim - 2)))
        own = self.visible.view(-1, *[1] * (mask.ndim - 2), self.length).to(mask.device)
        own = additive(own, mask.dtype) if mask.is_floating_point() else own.to(mask.dtype)
        return torch.cat([own.expand(*shape, -1), mask.expand(*shape, -1)], dim=-1)

    def unmasked(self, count: int, dtype: torch.dtype) -> torch.Tensor | None:
        """The mask (B, 1, 1, P + T) where the model has none; bools, or numbers that are added to scores."""
        if self.visible is None:
            return None
        mask = F.pad(self.visible, (0, count), value=True)[:, None, None, :]
        return mask if dtype == torch.bool else additive(mask, dtype)

    def biased(self, bias: torch.Tensor) -> torch.Tensor:
        """A bias (1, H, Q, T) of positions with columns for the prefix; zeros if it is not counted."""
        if self.bias is None:
            return self.padded(bias, 0.0)
        return torch.cat([self.bias.to(bias.dtype).expand(*bias.shape[:-1], -1), bias], dim=-1)

    def padded(self, columns: torch.Tensor, value: float) -> torch.Tensor:
        return F.pad(columns, (self.length, 0), value=value)

    def stripped(self, weights: Any) -> Any:
        """Attention weights (B, H, Q, P + T) without the columns of the prefix; anything else as it is."""
        if isinstance(weights, torch.Tensor) and weights.ndim == 4 and weights.shape[-1] == self.columns:
            return weights[..., self.length :]
        return weights


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where a mask of bools is true, minus infinity elsewhere.

    The model may hide all tokens from a padding position by the lowest number; columns of the prefix must
    stay below.
    """
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -torch.inf)


def after_one_another(states: Sequence[State], rows: int) -> State | None:
    """Several prefixes as one, in order; None if there is none."""
    if len(states) < 2:
        return states[0] if states else None
    single = all(state[0].shape[0] == 1 and state[1].shape[0] == 1 for state in states)
    rows = 1 if single else rows
    key, value = (torch.cat([s[:2][i].expand(rows, -1, -1, -1) for s in states], dim=2) for i in (0, 1))
    if all(state[2] is None for state in states):
        return key, value, None
    return key, value, torch.cat([_seen(state, rows) for state in states], dim=1)


def side_by_side(states: Sequence[State | None], rows: Sequence[int]) -> list[State] | None:
    """The prefixes of lanes made as long as the longest, the shorter ones padded on the left; None if empty.

    Args: rows: how many examples each lane has.
    """
    real = [state for state in states if state is not None]
    if not real:
        return None
    longest = max([state[0].shape[2] for state in real])
    even = all(state is not None and state[0].shape[2] == longest and state[2] is None for state in states)
    found: list[State] = []
    for state, count in zip(states, rows, strict=True):
        own = state or (real[0][0][:1, :, :0], real[0][1][:1, :, :0], None)
        missing = longest - own[0].shape[2]
        seen = None if even else F.pad(_seen(own, count), (missing, 0), value=False)
        key, value = (F.pad(tensor, (0, 0, missing, 0)).expand(count, -1, -1, -1) for tensor in own[:2])
        found.append((key, value, seen))
    return found


def _seen(state: State, rows: int) -> torch.Tensor:
    key, _, visible = state
    if visible is not None:
        return visible.expand(rows, -1)
    return torch.ones(rows, key.shape[2], dtype=torch.bool, device=key.device)


def _before(prefix: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    repeats = real.shape[1] // prefix.shape[1]
    if repeats > 1:
        prefix = prefix.repeat_interleave(repeats, dim=1)
    return torch.cat([prefix.to(real.dtype).expand(real.shape[0], -1, -1, -1), real], dim=2)
