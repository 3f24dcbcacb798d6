"""Float64 reference of attention with a prefix, one score at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Visible = Callable[[int, int, int], bool]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix: tuple[Tensor, Tensor] | None,
    scale: float,
    visible: Visible,
    bias: Tensor | None = None,
    cap: float | None = None,
) -> Tensor:
    """Attention of every query to the keys of the prefix and to those of the tokens that it sees.

    Source: Li and Liang 2021 (arXiv 2101.00190), section 4.2, for one layer: the prefix is P further places
    that every query sees. They have no position of their own: no rotation, no bias. `cap` is a soft cap.
    Formula: s_p = cap(scale q . K_p), s_j = cap(scale q . k_j) + bias_ij; out_i = sum softmax(s) [V; v].
    Shapes: q (B, H, Q, E), k (B, K, T, E), v (B, K, T, F), prefix (P, K, E), (P, K, F), bias (B or 1, H or 1,
    Q, T) -> (B, Q, H F). Query head h reads key/value head h // (H / K). A row that sees nothing is zero.
    """
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    groups = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            g = h // groups
            for i in range(q.shape[2]):
                scores, values = [], []
                for own_key, own_value in zip(*prefix, strict=True) if prefix is not None else ():
                    scores.append(_capped(scale * (own_key[g].double() @ q[b, h, i]), cap))
                    values.append(own_value[g].double())
                for j in range(k.shape[2]):
                    if visible(b, i, j):
                        score = _capped(scale * (k[b, g, j] @ q[b, h, i]), cap)
                        if bias is not None:
                            score = score + bias.double()[b % len(bias), h % bias.shape[1], i, j]
                        scores.append(score)
                        values.append(v[b, g, j])
                if scores:
                    weights = torch.stack(scores).exp()
                    out[b, h, i] = (weights / weights.sum()) @ torch.stack(values)
    return out.transpose(1, 2).flatten(2)


def _capped(score: Tensor, cap: float | None) -> Tensor:
    return score if cap is None else cap * torch.tanh(score / cap)
