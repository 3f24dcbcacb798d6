"""Float64 references of VeRA. The letters of the shapes are explained in `lora.py`."""

import torch

from .lora import as_float64, linear_output


def vera_slices(A, B, D_in, D_out, R):
    """The part of the shared random matrices that one layer uses: leading rows and columns.

    Source: Kopiczko et al. 2024 (arXiv 2310.11454), section 3.1: one pair A, B is shared by all layers. For
    layers of different sizes the pair is as large as the largest layer, and a layer takes A[:R, :D_in] and
    B[:D_out, :R] (the convention of the peft library).
    Shapes: A (>= R, >= D_in), B (>= D_out, >= R) -> (R, D_in), (D_out, R).
    """
    A, B = as_float64(A), as_float64(B)
    if A.shape[0] < R or A.shape[1] < D_in or B.shape[0] < D_out or B.shape[1] < R:
        raise ValueError(f"shared matrices {tuple(A.shape)}, {tuple(B.shape)} are smaller than the layer")
    return A[:R, :D_in], B[:D_out, :R]


def vera_delta(A, B, lambda_d, lambda_b, D_in):
    """The weight update of VeRA.

    Source: Kopiczko et al. 2024 (arXiv 2310.11454), eq. 2.
    Formula: delta W_oi = lambda_b_o sum_r B_or lambda_d_r A_ri. No other factor.
    Shapes: A, B the shared matrices (see `vera_slices`), lambda_d (R,), lambda_b (D_out,) -> (D_out, D_in).
    """
    lambda_d, lambda_b = as_float64(lambda_d), as_float64(lambda_b)
    A, B = vera_slices(A, B, D_in, lambda_b.shape[0], lambda_d.shape[0])
    return torch.einsum("o,or,r,ri->oi", lambda_b, B, lambda_d, A)


def vera_output(x, W, b, A, B, lambda_d, lambda_b):
    """The output of a linear layer with VeRA.

    Source: Kopiczko et al. 2024 (arXiv 2310.11454), eq. 2: h = W0 x + Lambda_b B Lambda_d A x.
    Formula: y = W x + b + lambda_b * (B (lambda_d * (A x))), with * elementwise.
    Shapes: x (..., D_in), W (D_out, D_in), b (D_out,) or None, A, B the shared matrices (see `vera_slices`),
    lambda_d (R,), lambda_b (D_out,) -> (..., D_out).
    """
    lambda_d, lambda_b = as_float64(lambda_d), as_float64(lambda_b)
    D_out, D_in = as_float64(W).shape
    A, B = vera_slices(A, B, D_in, D_out, lambda_d.shape[0])
    down = torch.einsum("r,ri,...i->...r", lambda_d, A, as_float64(x))
    up = torch.einsum("o,or,...r->...o", lambda_b, B, down)
    return linear_output(x, W, b) + up


def vera_merged(W, A, B, lambda_d, lambda_b):
    """The merged weight W + Lambda_b B Lambda_d A; the bias stays as it is. (D_out, D_in)."""
    W = as_float64(W)
    return W + vera_delta(A, B, lambda_d, lambda_b, W.shape[1])
