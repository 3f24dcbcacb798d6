"""References of fused query/key/value projections, by explicit row indices.

The letters of the shapes are explained in `lora.py`. Q has H*E rows, K and V have K*E rows each, and the rows
of a role are ordered head by head: row h*E + e belongs to head h. A weight is (rows, D_in), a bias (rows,):
both are joined and split along the first dimension (transpose a weight stored as (D_in, rows) first).
The dtype is kept: rows are only moved. An update of a fused weight is joined like a weight, with zeros for a
role that has no update.

Layouts, for order = (q, k, v); another order permutes the roles in each unit:
    blocks     [all Q rows; all K rows; all V rows]; K may be less than H.
    per_head   for each head h: E rows of its q, E of its k, E of its v; needs K = H.
    per_group  for each key/value head g: the rows of its H/K query heads (g*H/K ... (g+1)*H/K - 1), then E
               rows of its k, then E of its v; K divides H.
"""

import torch

ROLES = ("q", "k", "v")
LAYOUTS = ("blocks", "per_head", "per_group")


def check_layout(layout, H, K, order):
    """ValueError where the layout cannot be."""
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}")
    if sorted(order) != sorted(ROLES):
        raise ValueError(f"order must name q, k and v once each: {order!r}")
    if H % K != 0:
        raise ValueError(f"{K} key/value heads do not divide {H} heads")
    if layout == "per_head" and H != K:
        raise ValueError("per_head needs as many key/value heads as heads")


def join(q, k, v, layout, H, K, E, order=ROLES):
    """The fused weight (or bias) of the three roles.

    Formula: the rows are appended one after the other as the layout's text above reads them aloud.
    Shapes: q (H*E, ...), k (K*E, ...), v (K*E, ...) -> ((H + 2K)*E, ...).
    """
    check_layout(layout, H, K, order)
    parts = {"q": q, "k": k, "v": v}
    heads = {"q": H, "k": K, "v": K}
    for role in ROLES:
        if parts[role].shape[0] != heads[role] * E:
            raise ValueError(f"{role} has {parts[role].shape[0]} rows, not {heads[role]} heads of {E}")
    rows = []
    if layout == "blocks":
        for role in order:
            for h in range(heads[role]):
                for e in range(E):
                    rows.append(parts[role][h * E + e])
    elif layout == "per_head":
        for h in range(H):
            for role in order:
                for e in range(E):
                    rows.append(parts[role][h * E + e])
    else:
        for g in range(K):
            for role in order:
                heads_in_group = H // K if role == "q" else 1
                for i in range(heads_in_group):
                    for e in range(E):
                        rows.append(parts[role][(g * heads_in_group + i) * E + e])
    return torch.stack(rows)


def fused_row(role, h, e, layout, H, K, E, order=ROLES):
    """The row of the fused weight that holds row e of head h of the role, in closed form.

    h counts query heads (0 ... H-1) for q, key/value heads (0 ... K-1) for k and v.
    """
    check_layout(layout, H, K, order)
    position = list(order).index(role)
    if layout == "blocks":
        before = sum((H if r == "q" else K) * E for r in order[:position])
        return before + h * E + e
    if layout == "per_head":
        return (3 * h + position) * E + e
    per_group = H // K
    before = sum((per_group if r == "q" else 1) * E for r in order[:position])
    group, inside = divmod(h, per_group) if role == "q" else (h, 0)
    return group * (per_group + 2) * E + before + inside * E + e


def role_rows(role, layout, H, K, E, order=ROLES):
    """The fused rows of a role, in the role's own row order: a list of H*E (q) or K*E (k, v) numbers."""
    heads = H if role == "q" else K
    return [fused_row(role, h, e, layout, H, K, E, order) for h in range(heads) for e in range(E)]


def split(fused, layout, H, K, E, order=ROLES):
    """The three roles of a fused weight (or bias): the inverse of `join`, by `fused_row`.

    Shapes: fused ((H + 2K)*E, ...) -> q (H*E, ...), k (K*E, ...), v (K*E, ...).
    """
    if fused.shape[0] != (H + 2 * K) * E:
        raise ValueError(f"fused has {fused.shape[0]} rows, not {(H + 2 * K) * E}")
    return tuple(
        torch.stack([fused[row] for row in role_rows(role, layout, H, K, E, order)]) for role in ROLES
    )
