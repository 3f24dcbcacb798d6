"""Float64 references of MTL-LoRA, for one task. The letters of the shapes are explained in `lora.py`.

Source of all: Yang et al. 2024 (arXiv 2410.09437), the output of task t:
    h_t = W x_t + sum_k [exp(w_t^k / tau) / sum_j exp(w_t^j / tau)] B^k Lambda_t A x_t
with A and the N up-projections B^k shared by all tasks, Lambda_t and w_t the task's own.
"""

import torch

from .lora import as_float64, linear_output


def mtl_mixing(w, tau):
    """The mixing weights p_k = exp(w_k / tau) / sum_j exp(w_j / tau). w (N,), tau > 0 -> (N,)."""
    logits = as_float64(w) / tau
    powers = torch.exp(logits - logits.max())
    return powers / powers.sum()


def mtl_lambda(lam):
    """The matrix Lambda: a full (R, R) as it is, a vector (R,) as diag(values). -> (R, R)."""
    lam = as_float64(lam)
    return torch.diag(lam) if lam.dim() == 1 else lam


def mtl_lora_delta(A, Bs, lam, w, tau, scaling=1.0):
    """The weight update of the task.

    Formula: delta W = s sum_k p_k B_k Lambda A, p of `mtl_mixing`. Lambda multiplies the column A x from the
    left; for a row vector x A^T that is x A^T Lambda^T.
    Shapes: A (R, D_in), Bs (N, D_out, R) or N matrices (D_out, R), lam (R, R) or (R,) -> (D_out, D_in).
    """
    A, lam, p = as_float64(A), mtl_lambda(lam), mtl_mixing(w, tau)
    delta = torch.zeros((), dtype=torch.float64)
    for k, B in enumerate(Bs):
        delta = delta + p[k] * torch.einsum("or,rs,si->oi", as_float64(B), lam, A)
    return scaling * delta


def mtl_lora_output(x, W, b, A, Bs, lam, w, tau, scaling=1.0):
    """The output of a linear layer with MTL-LoRA, for examples of one task.

    Formula: y = W x + b + s sum_k p_k B_k (Lambda (A x)), p of `mtl_mixing`.
    Shapes: x (..., D_in), W (D_out, D_in), b (D_out,) or None, A (R, D_in), Bs (N, D_out, R) or N matrices
    (D_out, R), lam (R, R) or (R,), w (N,), tau > 0 -> (..., D_out).
    """
    p = mtl_mixing(w, tau)
    down = torch.einsum("ri,...i->...r", as_float64(A), as_float64(x))
    inner = torch.einsum("rs,...s->...r", mtl_lambda(lam), down)
    y = linear_output(x, W, b)
    for k, B in enumerate(Bs):
        y = y + scaling * p[k] * torch.einsum("or,...r->...o", as_float64(B), inner)
    return y


def mtl_lora_merged(W, A, Bs, lam, w, tau, scaling=1.0):
    """The merged weight of the task, W + delta W; the bias stays as it is. (D_out, D_in)."""
    return as_float64(W) + mtl_lora_delta(A, Bs, lam, w, tau, scaling)
