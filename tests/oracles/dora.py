"""Float64 references of DoRA and DVoRA. The letters of the shapes are explained in `lora.py`.

Source of all: Liu et al. 2024 (arXiv 2402.09353). The vector-wise norm ||.||_c is taken over the input
dimension: one number for each output row of W (D_out, D_in).
"""

import torch

from .lora import as_float64, linear_output, lora_delta, lora_scaling
from .vera import vera_delta


def row_norms(V):
    """||V||_c: sqrt(sum_i V_oi^2). V (D_out, D_in) -> (D_out,)."""
    V = as_float64(V)
    return torch.sqrt(torch.einsum("oi,oi->o", V, V))


def dora_magnitude(W):
    """The initial magnitude m = ||W0||_c (eq. 2 and section 4.1), of the frozen weight alone.

    Shapes: W (D_out, D_in) -> (D_out,). With a zero update at the start, the adapted weight is then W.
    Where the starting update is not zero, the norm of W + delta W is what keeps W + delta W: pass that sum.
    """
    return row_norms(W)


def decomposed_weight(W, delta, m):
    """The weight of eq. 5 for any update: W' = m (W + delta W) / ||W + delta W||_c, row by row.

    Shapes: W (D_out, D_in), delta (D_out, D_in), m (D_out,) -> (D_out, D_in).
    """
    V = as_float64(W) + as_float64(delta)
    norms = row_norms(V)
    m = as_float64(m).reshape(-1)
    return torch.stack([m[o] / norms[o] * V[o] for o in range(V.shape[0])])


def dora_merged(W, A, B, m, alpha, rslora=False):
    """The merged weight of DoRA; the bias stays as it is.

    Source: eq. 5, with the update multiplied by the factor s of LoRA.
    Formula: W' = m (W + s B A) / ||W + s B A||_c.
    Shapes: W (D_out, D_in), A (R, D_in), B (D_out, R), m (D_out,) -> (D_out, D_in).
    """
    return decomposed_weight(W, lora_delta(A, B, alpha, rslora), m)


def dora_output(x, W, b, A, B, m, alpha, rslora=False):
    """The output of a linear layer with DoRA: y = W' x + b, W' of `dora_merged`. The bias is not scaled.

    Shapes: x (..., D_in), W (D_out, D_in), b (D_out,) or None, A (R, D_in), B (D_out, R), m (D_out,)
    -> (..., D_out).
    """
    return linear_output(x, dora_merged(W, A, B, m, alpha, rslora), b)


def dvora_merged(W, A, B, lambda_d, lambda_b, m):
    """The merged weight of DVoRA, the paper's combination of DoRA with VeRA: eq. 5 with the update of VeRA.

    Formula: W' = m V / ||V||_c, V = W + Lambda_b B Lambda_d A. The bias stays as it is.
    Shapes: W (D_out, D_in), A, B the shared matrices (see `vera.vera_slices`), lambda_d (R,),
    lambda_b (D_out,), m (D_out,) -> (D_out, D_in).
    """
    return decomposed_weight(W, vera_delta(A, B, lambda_d, lambda_b, as_float64(W).shape[1]), m)


def dvora_output(x, W, b, A, B, lambda_d, lambda_b, m):
    """The output of a linear layer with DVoRA: y = W' x + b, W' of `dvora_merged`. -> (..., D_out)."""
    return linear_output(x, dvora_merged(W, A, B, lambda_d, lambda_b, m), b)


def dora_grads(x, W, A, B, m, G, alpha, rslora=False, detach_norm=True):
    """The gradients of L = sum(G * y), y = `dora_output`, by hand.

    Source: section 4.3: the norm C = ||V||_c, V = W + s B A, is treated as a constant in the backward pass.
    Formula, with P = dL/dW' = sum over all tokens of G x^T, by row o:
        dL/dV_o = m_o / C_o P_o                                  (detach_norm=True, section 4.3)
        dL/dV_o = m_o / C_o (P_o - (P_o . V_o) V_o / C_o^2)      (detach_norm=False, section 4.2, exact)
        dL/dm_o = P_o . V_o / C_o                                (section 4.2, the same in both)
        dL/dB = s (dL/dV) A^T,  dL/dA = s B^T (dL/dV)
    Shapes: x (..., D_in), W (D_out, D_in), A (R, D_in), B (D_out, R), m (D_out,), G (..., D_out)
    -> dL/dA (R, D_in), dL/dB (D_out, R), dL/dm (D_out,). The bias plays no part in them.
    """
    A, B, m, G = as_float64(A), as_float64(B), as_float64(m).reshape(-1), as_float64(G)
    s = lora_scaling(alpha, A.shape[0], rslora)
    V = as_float64(W) + lora_delta(A, B, alpha, rslora)
    C = row_norms(V)
    P = torch.einsum("no,ni->oi", G.reshape(-1, V.shape[0]), as_float64(x).reshape(-1, V.shape[1]))
    dV = torch.zeros_like(V)
    dm = torch.zeros_like(m)
    for o in range(V.shape[0]):
        along = torch.dot(P[o], V[o])
        dm[o] = along / C[o]
        direction = P[o] if detach_norm else P[o] - along * V[o] / C[o] ** 2
        dV[o] = m[o] / C[o] * direction
    dA = s * torch.einsum("or,oi->ri", B, dV)
    dB = s * torch.einsum("oi,ri->or", dV, A)
    return dA, dB, dm
