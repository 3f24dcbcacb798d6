"""MTL-LoRA: LoRA with a matrix of the task's own and several up-projections."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from adapterkit.methods.base import Shared, Unit
from adapterkit.methods.lora import LoRAConfig, add_rows, uniform
from adapterkit.methods.weights import is_plain
from adapterkit.model.blueprint import Slot


class MTLLoRAConfig(LoRAConfig):
    """Low-rank adaptation for several tasks (Yang et al. 2024, arXiv:2410.09437); one adapter is one task."""

    method: ClassVar[str] = "mtl_lora"

    n_up: int = Field(default=1, ge=1, description="number of up-projections that are mixed")
    sharpness: float = Field(default=0.05, gt=0, description="temperature of the softmax over up-projections")
    task_matrix: str = Field(
        default="diagonal", pattern="^(diagonal|full)$", description="shape of the task's own matrix"
    )

    def model_post_init(self, context: Any) -> None:
        if self.gating or self.init != "lora":
            raise ValueError("MTL-LoRA has neither gating nor other starts than 'lora'")

    def build(self, slot: Slot, shared: Shared | None, generator: torch.Generator | None) -> Unit:
        return MTLLoRA(slot, self, generator)


class MTLLoRA(Unit):
    """y = W x + b + s sum_k softmax(w / tau)_k B_k L A x.

    Source: Yang et al. 2024, arXiv:2410.09437, eq. 4-6; L (the task's own R x R matrix) starts at the
    identity, every B_k at zero, so the output is unchanged at first.
    Shapes: x (..., D_in) -> (..., D_out); A (R, D_in), B (K, D_out, R), L (R,) or (R, R), w (K,).
    """

    per_position = True
    adds = True
    signed = ("B",)
    common = ("A", "B")

    def __init__(self, slot: Slot, config: MTLLoRAConfig, generator: torch.Generator | None) -> None:
        super().__init__()
        d_out, d_in = slot.shape or (0, 0)
        rank = config.rank(slot)
        self.scaling = config.scaling(slot)
        self.dropout = config.dropout
        self.sharpness = config.sharpness
        self.rows = slot.rows
        self.in_place = is_plain(slot.module)
        self.A = uniform((rank, d_in), d_in, generator)
        self.L = nn.Parameter(torch.ones(rank) if config.task_matrix == "diagonal" else torch.eye(rank))
        self.B = nn.Parameter(torch.zeros(config.n_up, d_out, rank))
        self.w: torch.Tensor
        if config.n_up > 1:
            self.w = nn.Parameter(torch.zeros(config.n_up))
        else:
            self.register_buffer("w", torch.zeros(1))  # the softmax of one number is 1, whatever the number

    def up(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The mixed up-projection (D_out, R), in `dtype` or its own."""
        dtype = dtype or self.B.dtype
        mix = torch.softmax(self.w.to(dtype) / self.sharpness, dim=0)
        return torch.einsum("k,kor->or", mix, self.B.to(dtype))

    def factors(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, float]:
        own = torch.diag(self.L) if self.L.ndim == 1 else self.L
        return self.up(dtype), own.to(dtype) @ self.A.to(dtype), self.scaling

    def added(self, x: torch.Tensor) -> torch.Tensor:
        low = F.linear(x if torch.is_autocast_enabled(x.device.type) else x.to(self.A.dtype), self.A)
        low = low * self.L if self.L.ndim == 1 else F.linear(low, self.L)
        return F.linear(low, self.up()) * self.scaling

    def forward(self, out: torch.Tensor, x: torch.Tensor, host: nn.Module) -> torch.Tensor:
        if self.training and self.dropout:
            x = F.dropout(x, self.dropout)
        return add_rows(out, self.added(x), self.rows, self.in_place)

    def merged(
        self, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        left, right, scaling = self.factors(weight.dtype)
        return weight + left @ right * scaling, bias
