"""Invertible couplings in float64.

NICE: Dinh et al. 2015, arXiv:1410.8516, equation 4, as in MAD-X (arXiv:2005.00052, section 3.3). GLOW:
Kingma and Dhariwal 2018, arXiv:1807.03039, table 1, with the log scale clamped to +-5 by an arctangent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from tests.oracles.bottleneck import ACTIVATIONS

CLAMP = 5.0


def subnet(x: Tensor, t: Mapping[str, Tensor], name: str, act: str) -> Tensor:
    inner = ACTIVATIONS[act](x @ t[f"{name}.down.weight"].T + t[f"{name}.down.bias"])
    return inner @ t[f"{name}.up.weight"].T + t[f"{name}.up.bias"]


def nice(x: Tensor, t: Mapping[str, Tensor], act: str) -> Tensor:
    half = x.shape[-1] // 2
    first = x[..., :half] + subnet(x[..., half:], t, "F", act)
    second = x[..., half:] + subnet(first, t, "G", act)
    return torch.cat([first, second], -1)


def glow(x: Tensor, t: Mapping[str, Tensor], act: str) -> Tensor:
    half = x.shape[-1] // 2
    first = _affine(x[..., :half], subnet(x[..., half:], t, "F", act))
    second = _affine(x[..., half:], subnet(first, t, "G", act))
    return torch.cat([first, second], -1)


def _affine(x: Tensor, given: Tensor) -> Tensor:
    half = given.shape[-1] // 2
    log_scale = CLAMP * 0.636619772367581 * torch.atan(given[..., :half] / CLAMP)  # 2 / pi
    assert math.isclose(0.636619772367581, 2 / math.pi, rel_tol=1e-12)
    return torch.exp(log_scale) * x + given[..., half:]
