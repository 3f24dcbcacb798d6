"""The prefix of one call of an attention core."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


class Prefix:
    """P keys (1 or B, K, P, E_k) and values (1 or B, K, P, E_v), and how often attention has taken them."""

    def __init__(self, key: torch.Tensor, value: torch.Tensor) -> None:
        self.key = key
        self.value = value
        self.length = key.shape[2]
        self.columns = 0
        self.hits = 0

    def before(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (B, H, T, E) with the prefix before them; H is K or a multiple of it."""
        self.hits += 1
        self.columns = self.length + key.shape[2]
        return _before(self.key, key), _before(self.value, value)

    def extended(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """A mask (..., T) with columns for the prefix, which every query sees."""
        return None if mask is None else self.padded(mask, 0.0 if mask.is_floating_point() else 1.0)

    def padded(self, columns: torch.Tensor, value: float) -> torch.Tensor:
        return F.pad(columns, (self.length, 0), value=value)

    def stripped(self, weights: Any) -> Any:
        """Attention weights (B, H, Q, P + T) without the columns of the prefix; anything else as it is."""
        if isinstance(weights, torch.Tensor) and weights.ndim == 4 and weights.shape[-1] == self.columns:
            return weights[..., self.length :]
        return weights


def _before(prefix: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    repeats = real.shape[1] // prefix.shape[1]
    if repeats > 1:
        prefix = prefix.repeat_interleave(repeats, dim=1)
    return torch.cat([prefix.to(real.dtype).expand(real.shape[0], -1, -1, -1), real], dim=2)
