"""Float64 references of (IA)^3. The letters of the shapes are explained in `lora.py`.

Source of all: Liu et al. 2022 (arXiv 2205.05638), section 3.3:
    attention: softmax(Q (l_k * K^T) / sqrt(d_k)) (l_v * V), feed-forward: (l_ff * gamma(W1 x)) W2,
with * elementwise. Scaling the keys and values is scaling the outputs of their projections.
"""

import torch

from .lora import as_float64, linear_output


def ia3_scale_output(x, W, b, scale):
    """A key or value projection with its output scaled, the bias included.

    Formula: y_o = l_o (sum_i W_oi x_i + b_o).
    Shapes: x (..., D_in), W (D_out, D_in), b (D_out,) or None, scale l (D_out,) -> (..., D_out).
    """
    return torch.einsum("o,...o->...o", as_float64(scale).reshape(-1), linear_output(x, W, b))


def ia3_scale_input(x, W, b, scale):
    """A linear layer with its input scaled, the bias not.

    Formula: y_o = sum_i W_oi l_i x_i + b_o.
    Shapes: x (..., D_in), W (D_out, D_in), b (D_out,) or None, scale l (D_in,) -> (..., D_out).
    """
    return linear_output(torch.einsum("i,...i->...i", as_float64(scale).reshape(-1), as_float64(x)), W, b)


def ia3_ffn_output(x, W1, b1, W2, b2, scale, activation):
    """A feed-forward block with the input of its second matrix scaled.

    Formula: y = W2 (l_ff * gamma(W1 x + b1)) + b2. For a gated block (gamma(W1 x) * W3 x), call
    `ia3_scale_input` on the product.
    Shapes: D_ff the hidden width; x (..., D_in), W1 (D_ff, D_in), b1 (D_ff,) or None, W2 (D_out, D_ff),
    b2 (D_out,) or None, scale l_ff (D_ff,), activation gamma a function of a tensor -> (..., D_out).
    """
    return ia3_scale_input(activation(linear_output(x, W1, b1)), W2, b2, scale)


def ia3_merged_output(W, b, scale):
    """The merged weight and bias of `ia3_scale_output`: W'_oi = l_o W_oi, b'_o = l_o b_o.

    Shapes: W (D_out, D_in), b (D_out,) or None, scale (D_out,) -> (D_out, D_in), (D_out,) or None.
    """
    scale = as_float64(scale).reshape(-1)
    merged = torch.einsum("o,oi->oi", scale, as_float64(W))
    return merged, None if b is None else scale * as_float64(b)


def ia3_merged_input(W, b, scale):
    """The merged weight and bias of `ia3_scale_input`: W'_oi = W_oi l_i, b' = b.

    Shapes: W (D_out, D_in), b (D_out,) or None, scale (D_in,) -> (D_out, D_in), (D_out,) or None.
    """
    merged = torch.einsum("oi,i->oi", as_float64(W), as_float64(scale).reshape(-1))
    return merged, None if b is None else as_float64(b)
