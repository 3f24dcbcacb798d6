"""Float64 references of averages of changes of one weight, entry by entry. The letters of the shapes are
explained in `lora.py`.

Sources: Yadav et al. 2023 (TIES, arXiv 2306.01708), algorithm 1; Yu et al. 2023 (DARE, arXiv 2311.03099),
equation 2; Zhang et al. 2023 (arXiv 2306.14870), equation 4, for the negation of low-rank updates.
"""

import math

import torch

from .lora import as_float64


def weighted_sum(deltas, weights):
    """Formula: sum_i w_i delta_i. Any shape, the same for all."""
    total = torch.zeros_like(as_float64(deltas[0]))
    for weight, delta in zip(weights, deltas, strict=True):
        total = total + weight * as_float64(delta)
    return total


def keep_largest(delta, density):
    """The `floor(density * numel)` entries that are largest in size, zeros elsewhere."""
    delta = as_float64(delta)
    flat = [(abs(value), index) for index, value in enumerate(delta.flatten().tolist())]
    kept = {index for _, index in sorted(flat, reverse=True)[: math.floor(density * delta.numel())]}
    result = [value if index in kept else 0.0 for index, value in enumerate(delta.flatten().tolist())]
    return torch.tensor(result, dtype=torch.float64).reshape(delta.shape)


def magnitude(deltas, weights, density):
    """The weighted sum of what is largest in each change."""
    return weighted_sum([keep_largest(delta, density) for delta in deltas], weights)


def ties(deltas, weights, density, scale):
    """Algorithm 1 for one tensor, with weights: trim, elect sign, merge what agrees.

    Formula, for each entry p: gamma = sgn(sum_i w_i tau_i), A = {i : sgn(w_i tau_i) = gamma != 0},
    scale * sum_{i in A} w_i tau_i / sum_{i in A} |w_i|, tau_i the trimmed change. With equal weights that is
    scale times the disjoint mean of the paper, whose lambda is `scale`.
    """
    trimmed = [keep_largest(delta, density) for delta in deltas]
    columns = zip(*(tau.flatten().tolist() for tau in trimmed), strict=True)
    result = []
    for column in columns:
        votes = [(weight * value, abs(weight)) for weight, value in zip(weights, column, strict=True)]
        elected = sum(value for value, _ in votes)
        agreeing = [(value, size) for value, size in votes if value * elected > 0]
        mean = sum(value for value, _ in agreeing) / sum(size for _, size in agreeing) if agreeing else 0.0
        result.append(scale * mean)
    return torch.tensor(result, dtype=torch.float64).reshape(trimmed[0].shape)


def dare(deltas, weights, density, masks):
    """The weighted sum of the changes with the entries of `masks` (0 or 1), divided by their density."""
    return weighted_sum(
        [as_float64(d) * as_float64(m) / density for d, m in zip(deltas, masks, strict=True)], weights
    )


def truncated(matrix, rank):
    """The best approximation of a matrix (D_out, D_in) of a rank, from the eigenvectors of M^T M.

    Formula: M V V^T with the columns of V (D_in, R) those of the R largest eigenvalues (Eckart and Young).
    """
    matrix = as_float64(matrix)
    _, vectors = torch.linalg.eigh(matrix.T @ matrix)
    kept = vectors[:, -rank:]
    return matrix @ kept @ kept.T


def negated(As, Bs, weights):
    """The product of averaged factors, with the sign of a weight in B alone: (sum w B)(sum |w| A)."""
    return weighted_sum(Bs, weights) @ weighted_sum(As, [abs(weight) for weight in weights])
