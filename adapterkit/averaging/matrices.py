"""What the strategies do with the changes of one weight, and how a change becomes two factors again."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def combined(
    deltas: Sequence[torch.Tensor],
    weights: Sequence[float],
    strategy: str,
    density: float = 1.0,
    total: float | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """One change of the shape of all the others.

    Args:
        weights: one for each change.
        strategy: `ties`, `dare`, `magnitude`; any other name is the plain weighted sum.
        density: part of the entries of every change that is kept; at 1 only `ties` differs from the sum.
        total: sum of the sizes of all weights, where some adapters do not change this weight at all.
        generator: on the CPU, draws what `dare` drops.
    """
    if strategy in ("ties", "magnitude"):
        deltas = [trimmed(delta, density) for delta in deltas]
    elif strategy == "dare":
        deltas = [dropped(delta, density, generator) for delta in deltas]
    if strategy == "ties":
        return elected(deltas, weights, total)
    result = torch.zeros_like(deltas[0])
    for weight, delta in zip(weights, deltas, strict=True):
        result += weight * delta
    return result


def trimmed(delta: torch.Tensor, density: float) -> torch.Tensor:
    """The entries that are largest in size, zero in place of the others."""
    if density >= 1:
        return delta
    kept = torch.zeros_like(delta).flatten()
    index = delta.abs().flatten().topk(int(density * delta.numel())).indices
    kept[index] = delta.flatten()[index]
    return kept.view_as(delta)


def dropped(delta: torch.Tensor, density: float, generator: torch.Generator | None) -> torch.Tensor:
    """Entries drawn at random and scaled up, so that the expectation stays; zero in place of the others.

    Source: Yu et al. 2023 (DARE), arXiv:2311.03099, eq. 2 with p = 1 - density.
    """
    if density >= 1:
        return delta
    # on the CPU, so that a seed means the same everywhere
    kept = torch.rand(delta.shape, generator=generator, dtype=torch.float64) < density
    return delta * kept.to(delta.device) / density


def elected(
    deltas: Sequence[torch.Tensor], weights: Sequence[float], total: float | None = None
) -> torch.Tensor:
    """The weighted mean of what has the sign of the weighted sum, times the sum of the weights' sizes.

    Source: Yadav et al. 2023 (TIES), arXiv:2306.01708, section 3.2: elect sign, disjoint merge; their factor
    lambda is the sum of the weights here, so that nothing changes where all signs agree. A weight turns the
    sign of its change before the election.
    """
    total = sum(map(abs, weights)) if total is None else total
    signed = [weight * delta for weight, delta in zip(weights, deltas, strict=True)]
    sign = torch.stack(signed).sum(dim=0).sign()
    result, votes = torch.zeros_like(signed[0]), torch.zeros_like(signed[0])
    for weight, delta in zip(weights, signed, strict=True):
        agrees = ((delta.sign() == sign) & (sign != 0)).to(delta.dtype)
        result += delta * agrees
        votes += abs(weight) * agrees
    return torch.where(votes > 0, total * result / votes.clamp_min(torch.finfo(votes.dtype).tiny), 0.0)


Factors = tuple[torch.Tensor, torch.Tensor]
"""B (D_out, R) and A (R, D_in)."""


def factored(matrix: torch.Tensor, rank: int | None) -> Factors:
    """The best approximation B A of this rank; None: the smallest rank that is exact up to rounding."""
    u, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
    return _cut(u, sigma, vh, rank, max(matrix.shape))


def reduced(left: torch.Tensor, right: torch.Tensor, rank: int | None) -> Factors:
    """The same for the product left (D_out, R) right (R, D_in), which is never formed."""
    q, r = torch.linalg.qr(left)
    p, s = torch.linalg.qr(right.t())
    u, sigma, vh = torch.linalg.svd(r @ s.t(), full_matrices=False)
    return _cut(q @ u, sigma, vh @ p.t(), rank, max(left.shape[0], right.shape[1]))


def _cut(u: torch.Tensor, sigma: torch.Tensor, vh: torch.Tensor, rank: int | None, size: int) -> Factors:
    if rank is None:
        least = sigma[0] * size * torch.finfo(sigma.dtype).eps
        rank = max(int((sigma > least).sum()), 1)
    missing = rank - sigma.shape[0]
    root = sigma[:rank].sqrt()
    b, a = u[:, :rank] * root, root[:, None] * vh[:rank]
    if missing > 0:
        b, a = torch.nn.functional.pad(b, (0, missing)), torch.nn.functional.pad(a, (0, 0, 0, missing))
    return b, a
