"""Bottleneck adapters in float64, written from the papers' figures.

Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2020, arXiv:2005.00247; He et al. 2022,
arXiv:2110.04366 (parallel, scaled); Steitz and Roth 2024, arXiv:2406.06820 (one factor for each channel);
Mao et al. 2022, arXiv:2110.07577 (gate). h is the output of a sublayer, x the residual stream that it read,
`add` what the model makes of both: h + x, normed in models whose norm follows the sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Add = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Form:
    """The options of a bottleneck that decide what is added to what."""

    parallel: bool = False
    reads_sum: bool = False
    """It reads what the model makes of branch and residual, not the branch alone."""
    residual: str = "branch"
    """Its own residual: 'branch', 'read' (what it reads) or 'sum' (branch + x, without the norm)."""
    residual_first: bool = False
    """Its own residual is added before its own last norm."""
    model_adds: bool = True
    """The model's residual add (and norm) follows."""


def relu(x: Tensor) -> Tensor:
    return x * (x > 0)


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.special.erf(x / math.sqrt(2)))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": relu,
    "gelu": gelu,
    "gelu_new": gelu_tanh,
    "silu": silu,
    "swish": silu,
    "tanh": lambda x: 1 - 2 / (torch.exp(2 * x) + 1),
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "leakyrelu": lambda x: relu(x) - 0.01 * relu(-x),
    "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
    "mish": lambda x: x * torch.tanh(torch.log(1 + torch.exp(x))),
    "relu6": lambda x: torch.minimum(relu(x), torch.full_like(x, 6.0)),
    "relu2": lambda x: relu(x) ** 2,
    "linear": lambda x: x,
}


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps) * weight + bias


def update(z: Tensor, t: Mapping[str, Tensor], act: str = "relu", scale: Tensor | float = 1.0) -> Tensor:
    """s * up(act(down(LN(z)))), with the norm and the gate where t has them.

    Shapes: z (B, T, D); t: down.weight (R, D), up.weight (D, R) and biases, maybe norm_before.*, gate.*.
    """
    inner = layer_norm(z, t["norm_before.weight"], t["norm_before.bias"]) if "norm_before.weight" in t else z
    inner = ACTIVATIONS[act](inner @ t["down.weight"].T + t["down.bias"])
    u = scale * (inner @ t["up.weight"].T + t["up.bias"])
    if "gate.weight" in t:
        scores = 1 / (1 + torch.exp(-(z @ t["gate.weight"].T + t["gate.bias"])))
        u = u * scores.mean(1, keepdim=True)
    return u


def sublayer(
    h: Tensor,
    x: Tensor,
    t: Mapping[str, Tensor],
    form: Form,
    add: Add,
    act: str = "relu",
    scale: Tensor | float = 1.0,
) -> Tensor:
    """The stream behind a sublayer with a bottleneck: (B, T, D)."""
    if form.parallel:
        z, own = x, h
    else:
        z = add(h, x) if form.reads_sum else h
        own = {"branch": h, "read": z, "sum": h + x}[form.residual]
    u = update(z, t, act, scale)
    first = form.residual_first and not form.parallel
    if first:
        u = u + own
    if "norm_after.weight" in t:
        u = layer_norm(u, t["norm_after.weight"], t["norm_after.bias"])
    out = u if first else u + own
    return add(out, x) if form.model_adds else out
