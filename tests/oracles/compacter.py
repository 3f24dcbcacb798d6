"""Compacter in float64: Mahabadi et al. 2021, arXiv:2106.04647, equations 3 to 6."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def matrix(rules: Tensor, factors: Tensor) -> Tensor:
    """H (D_in, D_out), the sum of the Kronecker products of rules (n, n, n) and (n, D_in / n, D_out / n)."""
    n, rows, columns = factors.shape
    H = torch.zeros(n * rows, n * columns, dtype=torch.float64)
    for i in range(n):
        for a in range(n):
            for b in range(n):
                H[a * rows : (a + 1) * rows, b * columns : (b + 1) * columns] += rules[i, a, b] * factors[i]
    return H


def product(t: Mapping[str, Tensor], whole: str) -> Tensor:
    """A tensor that is there as it is, or as two factors `left` and `right` of each of its n matrices."""
    return (
        t[whole] if whole in t else torch.stack([a @ b for a, b in zip(t["left"], t["right"], strict=True)])
    )


def phm(x: Tensor, rules: Mapping[str, Tensor], factors: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
    """x H + b."""
    y = x @ matrix(product(rules, "rule"), product(factors, "W"))
    return y if bias is None else y + bias
