"""Float64 references of LoRA and of its relatives that share the factors A and B.

Letters of all shapes in this folder: B batch, T tokens, D_in, D_out, R rank, H heads, K key/value heads,
E head dimension. `...` stands for any leading dimensions, usually (B, T). A weight W is stored as torch
stores it, (D_out, D_in), so that y = W x + b; a bias may be None. Every result is float64 (inputs are cast),
and the computation is differentiable, so autograd through a reference is a reference gradient.
"""

import math

import torch


def as_float64(value):
    """A float64 tensor of the same values (still connected to the autograd graph of a tensor input)."""
    return torch.as_tensor(value, dtype=torch.float64)


def linear_output(x, W, b=None):
    """y_o = sum_i W_oi x_i + b_o. x (..., D_in), W (D_out, D_in), b (D_out,) or None -> (..., D_out)."""
    y = torch.einsum("...i,oi->...o", as_float64(x), as_float64(W))
    return y if b is None else y + as_float64(b)


def lora_scaling(alpha, R, rslora=False):
    """The factor of the low-rank update.

    Source: Hu et al. 2021 (arXiv 2106.09685), section 4.1: alpha / R.
    rslora: Kalajdzievski 2023 (arXiv 2312.03732), the rank-stabilised factor: alpha / sqrt(R).
    """
    return alpha / math.sqrt(R) if rslora else alpha / R


def lora_delta(A, B, alpha, rslora=False):
    """The weight update of LoRA.

    Source: Hu et al. 2021 (arXiv 2106.09685), eq. 3, with the factor of `lora_scaling`.
    Formula: delta W = s B A.
    Shapes: A (R, D_in), B (D_out, R) -> (D_out, D_in).
    """
    A, B = as_float64(A), as_float64(B)
    return lora_scaling(alpha, A.shape[0], rslora) * torch.einsum("or,ri->oi", B, A)


def lora_output(x, W, b, A, B, alpha, rslora=False):
    """The output of a linear layer with LoRA.

    Source: Hu et al. 2021 (arXiv 2106.09685), eq. 3: h = W0 x + delta W x = W0 x + B A x.
    Formula: y = W x + b + s B (A x), the two factors applied one after the other.
    Shapes: x (..., D_in), W (D_out, D_in), b (D_out,) or None, A (R, D_in), B (D_out, R) -> (..., D_out).
    """
    A, B = as_float64(A), as_float64(B)
    down = torch.einsum("...i,ri->...r", as_float64(x), A)
    up = torch.einsum("...r,or->...o", down, B)
    return linear_output(x, W, b) + lora_scaling(alpha, A.shape[0], rslora) * up


def lora_merged(W, A, B, alpha, rslora=False):
    """The merged weight W + s B A (Hu et al. 2021, section 4.1); the bias stays as it is. (D_out, D_in)."""
    return as_float64(W) + lora_delta(A, B, alpha, rslora)


def lora_gate(x, w_g, b_g):
    """The gate of one example.

    Source: Mao et al. 2022, UniPELT (arXiv 2110.07577), the gating mechanism: the gate is a sigmoid of a
    linear map of the layer's input; it is computed per token and averaged over all tokens of the example.
    Formula: g_n = 1/T sum_t sigmoid(w_g . x_nt + b_g). Every token counts, padding too.
    Shapes: x (B, T, D_in), w_g (D_in,) or (1, D_in), b_g a number or (1,) -> (B,).
    """
    x, w_g, b_g = as_float64(x), as_float64(w_g).reshape(-1), as_float64(b_g).reshape(())
    n_tokens = x.shape[1]
    gates = []
    for example in x:
        total = torch.zeros((), dtype=torch.float64)
        for token in example:
            total = total + 1.0 / (1.0 + torch.exp(-(torch.dot(w_g, token) + b_g)))
        gates.append(total / n_tokens)
    return torch.stack(gates)


def gated_lora_output(x, W, b, A, B, w_g, b_g):
    """The output of a linear layer with gated LoRA.

    Source: Mao et al. 2022, UniPELT (arXiv 2110.07577), LoRA with a gate.
    Formula: y = W x + b + g B A x, with g of `lora_gate`: one number per example. The gate replaces the
    factor alpha / R, so that factor does not appear.
    Shapes: x (B, T, D_in), W (D_out, D_in), b (D_out,) or None, A (R, D_in), B (D_out, R), w_g (D_in,) or
    (1, D_in), b_g a number or (1,) -> (B, T, D_out).
    """
    down = torch.einsum("bti,ri->btr", as_float64(x), as_float64(A))
    up = torch.einsum("btr,or->bto", down, as_float64(B))
    return linear_output(x, W, b) + torch.einsum("b,bto->bto", lora_gate(x, w_g, b_g), up)


def pissa_factors(W, r, scaling=1.0):
    """The factors and the residual weight of PiSSA.

    Source: Meng et al. 2024 (arXiv 2404.02948), eq. 2-4. The paper writes Y = X W with row vectors: its W, A
    and B are the transposes of those here.
    Formula, with W = U diag(S) V^T, S decreasing:
        B = U[:, :r] diag(S[:r])^(1/2), A = diag(S[:r])^(1/2) V[:, :r]^T,
        residual = sum_{k >= r} S_k u_k v_k^T,
    so that W = residual + B A. For a layer that multiplies the update by `scaling`, the kept singular values
    are divided by it first: W = residual + scaling B A.
    Not unique: the sign of a pair (column of B, row of A) is free, and more where singular values are equal.
    The product B A and the residual are unique where S[r-1] > S[r].
    Shapes: W (D_out, D_in), 1 <= r <= min(D_out, D_in) -> A (r, D_in), B (D_out, r), residual (D_out, D_in).
    """
    W = as_float64(W)
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    A = torch.zeros(r, W.shape[1], dtype=torch.float64)
    B = torch.zeros(W.shape[0], r, dtype=torch.float64)
    residual = torch.zeros_like(W)
    for k in range(len(S)):
        if k < r:
            root = torch.sqrt(S[k] / scaling)
            B[:, k] = U[:, k] * root
            A[k, :] = root * Vt[k, :]
        else:
            residual = residual + S[k] * torch.outer(U[:, k], Vt[k, :])
    return A, B, residual


def olora_factors(W, r, scaling=1.0):
    """The factors and the residual weight of OLoRA.

    Source: Büyükakyüz 2024 (arXiv 2406.01775), the QR initialisation.
    Formula, with W = Q R (Q orthonormal columns, R upper triangular): B = Q[:, :r], A = R[:r, :],
    residual = W - scaling B A. The factor divides nothing here (unlike `pissa_factors`): the residual has it.
    Not unique: the sign of a pair (column of B, row of A) is free. The product B A and the residual are
    unique where the first r columns of W are linearly independent.
    Shapes: W (D_out, D_in), 1 <= r <= min(D_out, D_in) -> A (r, D_in), B (D_out, r), residual (D_out, D_in).
    """
    W = as_float64(W)
    Q, R = torch.linalg.qr(W, mode="reduced")
    A, B = R[:r, :].clone(), Q[:, :r].clone()
    return A, B, W - scaling * torch.einsum("or,ri->oi", B, A)
