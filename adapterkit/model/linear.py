"""Which modules are linear maps, and how they hold their weight."""

from __future__ import annotations

from typing import Any

from torch import nn


def shape(module: nn.Module) -> tuple[int, int] | None:
    """(D_out, D_in) of a linear map, None if the module is none.

    Subclasses of Linear count, quantised ones too; so does a Conv1D in the manner of GPT, which names its
    sizes nf, nx.
    """
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    sizes: Any = (getattr(module, "nf", None), getattr(module, "nx", None))
    weight = getattr(module, "weight", None)
    if isinstance(sizes[0], int) and weight is not None and weight.ndim == 2:
        return sizes[0], sizes[1] if isinstance(sizes[1], int) else int(weight.shape[0])
    out_features, in_features = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if isinstance(out_features, int) and isinstance(in_features, int) and weight is not None:
        return out_features, in_features
    return None


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is stored as (D_in, D_out)."""
    return not isinstance(module, nn.Linear) and isinstance(getattr(module, "nf", None), int)
