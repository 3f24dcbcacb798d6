"""What happens where the stream enters a stack."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

KEY = "input_grad"


class InputGrad(nn.Module):
    """Let the stream require a gradient when layers are checkpointed the reentrant way.

    Reentrant checkpointing runs a layer without autograd unless one of its inputs requires a gradient. With a frozen base
    none does, and the adapters of the layer would silently never train.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        # in a tuple, so that the layer is not registered a second time
        self.layer = (layer,)

    def forward(self, out: Any, x: Any, host: nn.Module) -> Any:
        layer = self.layer[0]
        if not (layer.training and getattr(layer, "gradient_checkpointing", False) and torch.is_grad_enabled()):
            return out
        run = getattr(layer, "_gradient_checkpointing_func", None)
        if getattr(run, "keywords", {}).get("use_reentrant") is False:
            return out
        if isinstance(out, torch.Tensor) and not out.requires_grad:
            out.requires_grad_(True)
        return out
