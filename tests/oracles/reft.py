"""ReFT in float64: Wu et al. 2024, arXiv:2404.03592, equations 1 to 3, by loops over examples and tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Act = Callable[[Tensor], Tensor]


def edited(
    h: Tensor, R: Tensor, W: Tensor, b: Tensor, *, subtract: bool = True, act: Act | None = None
) -> Tensor:
    """h + R^T (act(W h + b) - R h), without R h in DiReFT. Shapes: h (D,), R and W (r, D), b (r,)."""
    source = W @ h + b
    source = source if act is None else act(source)
    return h + R.T @ (source - R @ h if subtract else source)


def positions(mask: Tensor | None, length: int, prefix: int, suffix: int) -> tuple[list[int], list[int]]:
    """The tokens of one example that prefix and suffix edit; where both would, it is the suffix."""
    real = [i for i in range(length) if mask is None or bool(mask[i])]
    last = real[len(real) - suffix :] if suffix < len(real) else real
    last = last if suffix else []
    return [i for i in real[:prefix] if i not in last], last


def reft(
    h: Tensor,
    mask: Tensor | None,
    units: Mapping[str, Mapping[str, Tensor]],
    prefix: int,
    suffix: int,
    *,
    subtract: bool = True,
    act: Act | None = None,
) -> Tensor:
    """h (B, T, D) edited behind one layer. units: 'prefix' and 'suffix' with R (r, D), W (r, D), b (r,)."""
    result = h.clone()
    for row in range(h.shape[0]):
        own = None if mask is None else mask[row]
        for name, found in zip(("prefix", "suffix"), positions(own, h.shape[1], prefix, suffix), strict=True):
            for i in found:
                result[row, i] = edited(h[row, i], **units[name], subtract=subtract, act=act)
    return result


def orthonormal(P: Tensor) -> Tensor:
    """Rows of P (r, D) made orthonormal one after the other, by Gram and Schmidt."""
    rows: list[Tensor] = []
    for row in P:
        rest = row - sum((row @ other) * other for other in rows) if rows else row
        rows.append(rest / torch.sqrt(rest @ rest))
    return torch.stack(rows)
