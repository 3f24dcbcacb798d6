"""A linear map and a low-rank unit on it as one weight W + s L S, made anew in every pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from adapterkit.methods.weights import in_rows

PASS = 12
"""A number that is written to memory and read again costs about as much as so many multiplications."""
CACHED = 2**20
"""Up to so many numbers a matrix stays in the cache, where a pass over it costs next to nothing."""
SMALL = 2**14
"""Below so many numbers nothing is won that would be worth other last digits than beside other adapters."""
MANY = 2**16
"""A number of tokens at which that of products counts, whatever the widths."""


def norms(weight: torch.Tensor) -> torch.Tensor:
    """||W|| for each row, squared and rooted as in `norms_of_sum`, so that both have the same bits."""
    found: torch.Tensor = torch.linalg.vector_norm(weight.contiguous(), dim=1).square().sqrt()
    return found


def norms_of_sum(
    weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scaling: float
) -> torch.Tensor:
    """||W + s L S|| for each row (D_out,): of the sum, or without a second matrix of the weight's size.

    The second form has R^2 (D_in + D_out) more products. Its terms cancel where W and s L S do.
    """
    (d_out, d_in), rank = weight.shape, right.shape[0]
    if weight.numel() <= CACHED or rank**2 * (d_in + d_out) >= PASS * weight.numel():
        return norms(torch.addmm(weight, left, right, alpha=scaling))
    own = torch.linalg.vector_norm(weight.contiguous(), dim=1)
    cross = (weight @ right.t() * left).sum(dim=1)
    square = (left @ (right @ right.t()) * left).sum(dim=1)
    total: torch.Tensor = own.square() + 2 * scaling * cross + scaling**2 * square
    return total.clamp_min(0).sqrt()


def pays(unit: Any, x: torch.Tensor, host: nn.Module, rank: int, *tensors: Any, normed: bool = False) -> bool:
    """Whether one product with the sum is exact here and costs less than three: with W, S and L.

    Args: rank: R.  tensors: what L and S are made of.  normed: the norm of the sum is asked for in any case.
    """
    dropped = unit.training and unit.dropout
    weight: Any = host._parameters.get("weight")
    if dropped or weight is None or x.numel() == 0 or not _fits((weight, *tensors), x):
        return False
    d_out, d_in = weight.shape
    if weight.numel() < SMALL:
        return False
    # a graph is for any number of tokens
    tokens = MANY if torch.compiler.is_compiling() else x.numel() // d_in
    whole, apart = d_out * d_in, tokens * rank * (d_in + d_out)
    # where the norm is asked for, R products for each number of the sum are made either way
    made = (0 if whole <= CACHED else PASS) * whole if normed else (rank + PASS) * whole
    # a checkpointed layer runs without gradients first, and should give the same then as later
    if unit.training or torch.is_grad_enabled():
        # backward by the sum makes the gradient of a whole weight, and L's of it; by L and S what forward did
        return bool(made + (tokens + rank) * whole < 2 * apart)
    return bool(made <= apart + PASS * tokens * d_out)


def _fits(tensors: tuple[Any, ...], x: torch.Tensor) -> bool:
    """Whether the sum loses nothing, as in half precision it would a small update, and is where x is.

    Sharding and offloading may have put other tensors into the place of those that were there at first.
    """
    wide = x.dtype in (torch.float32, torch.float64)
    if not wide or torch.is_autocast_enabled(x.device.type) or not in_rows(x):
        return False
    return all(
        [
            type(t) in (nn.Parameter, torch.Tensor)
            and t.dtype is x.dtype
            and t.device == x.device
            and t.is_contiguous()
            for t in tensors
        ]
    )
