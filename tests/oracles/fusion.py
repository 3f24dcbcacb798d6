"""AdapterFusion in float64, token by token: Pfeiffer et al. 2021, arXiv:2005.00247, equations 3 to 5."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def fuse(
    query: Tensor,
    outputs: Sequence[Tensor],
    residual: Tensor,
    t: Mapping[str, Tensor],
    *,
    residual_before: bool = False,
    value_before_softmax: bool = True,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The mixture with its residual (B, T, D), and the weights of the N adapters (B, T, N).

    Shapes: query, residual and each output (B, T, D); t holds those of query, key and value that are used.
    """
    result = torch.empty_like(residual)
    weights = torch.empty(*residual.shape[:2], len(outputs), dtype=torch.float64)
    for b in range(residual.shape[0]):
        for i in range(residual.shape[1]):
            said = [out[b, i] + residual[b, i] * residual_before for out in outputs]
            q = query[b, i]
            if "query.weight" in t:
                q = t["query.weight"] @ q + t["query.bias"]
            scores = [float(q @ _projected(t, "key", each)) / temperature for each in said]
            powers = [math.exp(score - max(scores)) for score in scores]
            shares = [power / sum(powers) for power in powers]
            if value_before_softmax:
                mixed = sum(s * _projected(t, "value", e) for s, e in zip(shares, said, strict=True))
            else:
                mixed = _projected(t, "value", sum(s * e for s, e in zip(shares, said, strict=True)))
            result[b, i] = mixed if residual_before else mixed + residual[b, i]
            weights[b, i] = torch.tensor(shares, dtype=torch.float64)
    return result, weights


def _projected(t: Mapping[str, Tensor], name: str, value: Tensor) -> Tensor:
    if f"{name}.weight" not in t:
        return value
    return t[f"{name}.weight"] @ value + t.get(f"{name}.bias", 0)


def loss(values: Sequence[Tensor]) -> float:
    """0.01 times the squared distance of the value matrices from the identity."""
    return sum(
        0.01 * (float(value[i, j]) - (i == j)) ** 2
        for value in values
        for i in range(value.shape[0])
        for j in range(value.shape[1])
    )
