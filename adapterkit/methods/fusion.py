"""AdapterFusion: attention over the outputs of several bottleneck adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from adapterkit.errors import PlanError, Problem
from adapterkit.methods.base import Helper, MethodConfig, Shared, Unit, Unmergeable
from adapterkit.methods.bottleneck import Bottleneck
from adapterkit.methods.flow import flow_of
from adapterkit.methods.targets import Selection
from adapterkit.model.blueprint import Blueprint, Slot
from adapterkit.model.branches import branches


class FusionConfig(MethodConfig):
    """AdapterFusion (Pfeiffer et al. 2021, arXiv:2005.00247); made by `kit.fuse`."""

    method: ClassVar[str] = "fusion"

    children: tuple[str, ...] = Field(min_length=2, description="names of the adapters that are fused")
    places: tuple[str, ...] = Field(default=(), description="branches at which all of them have a unit")
    query: bool = Field(default=True, description="project what the adapters read")
    key: bool = Field(default=True, description="project the outputs of the adapters for the scores")
    value: bool = Field(default=True, description="project the outputs of the adapters that are added up")
    query_before_ln: bool = Field(
        default=False, description="the query is the branch, not what the adapters read"
    )
    regularization: bool = Field(
        default=True, description="`kit.fusion_loss()` keeps the values near the identity"
    )
    residual_before: bool = Field(default=False, description="the residual is part of each key and value")
    value_before_softmax: bool = Field(default=True, description="project before adding up, not after")
    value_initialized: bool = Field(default=True, description="the value projection starts near the identity")
    temperature: float = Field(default=1.0, gt=0, description="the scores are divided by it")
    adds_stream: bool = Field(
        default=False,
        description="what is fused of parallel adapters has the stream for its residual, and is added to it",
    )
    branch: Literal["after_norm", "before_norm"] = Field(
        default="after_norm", description="where the fused adapters act, see `bottleneck`"
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout on the scores, in training")

    def available(self, blueprint: Blueprint) -> Mapping[str, Slot]:
        return branches(blueprint, self.branch == "before_norm")

    def select(self, blueprint: Blueprint) -> Selection:
        slots = self.available(blueprint)
        return Selection.of([slots[address] for address in self.places if address in slots])

    def check(self, slots: Sequence[Slot]) -> None:
        if not slots:
            message = f"{', '.join(self.children)} have no branch in common at which they could be fused"
            raise PlanError(
                Problem("nothing-selected", message, expected="bottleneck adapters at the same places")
            )

    def build(self, slot: Slot, shared: Shared | None, generator: torch.Generator | None) -> Unit:
        return Fusion(slot, self, generator)

    def helpers(self, slots: Sequence[Slot], blueprint: Blueprint) -> list[Helper]:
        return []  # those of the adapters serve


PRESETS: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"value": False, "regularization": False, "value_initialized": False},
}
"""Configs of fusions by name."""


class Fusion(Unmergeable):
    """sum_i softmax_i(q . k_i) v_i + r, with q from what the adapters read, k_i and v_i from their outputs.

    Input, residual and what follows are those of the last adapter.
    Source: Pfeiffer et al. 2021, arXiv:2005.00247, eq. 3-5; dot products are not scaled.
    Shapes: h, x (B, T, D) -> (B, T, D); N adapters: keys and values (B, T, N, D), weights (B, T, N).
    """

    phase = 2
    per_position = True
    reason = "attention over adapters is no change of a weight"

    def __init__(self, slot: Slot, config: FusionConfig, generator: torch.Generator | None) -> None:
        super().__init__()
        d_model = (slot.shape or (1, 1))[0]
        self.config = config
        self.branch = slot.address
        self.children_keys: tuple[str, ...] = ()
        """Keys of the adapters' units at the same site; set when the fusion is activated."""
        if config.query:
            self.query = _projection(d_model, True, generator)
        if config.key:
            self.key = _projection(d_model, True, generator)
        if config.value:
            self.value = _projection(d_model, False, generator)
            if config.value_initialized:
                with torch.no_grad():
                    self.value.weight.fill_(1e-6).fill_diagonal_(1.0)

    @property
    def per_example(self) -> tuple[str, ...]:
        return self.branch, f"{self.branch}~", f"{self.branch}+"

    @property
    def leaves(self) -> str:
        return self.branch

    def forward(self, out: Any, x: Any, host: nn.Module) -> Any:
        flow = flow_of(host)
        if not flow.get(f"{self.branch}!"):
            return out
        site: Any = host.adapterkit
        units: list[Bottleneck] = [site._modules[key] for key in self.children_keys]
        last = units[-1]
        h = last.takes(out, flow)
        residual = last.residual(flow, h)
        before = residual if last.config.swapped else h
        z, own = last.reads(before, h if last.config.swapped else residual)
        outputs = torch.stack([unit.up_output(z) for unit in units], dim=-2)
        if last.config.is_parallel and self.config.adds_stream:
            fused, weights = self.attend(z, outputs, z)
            fused = fused + own
        else:
            fused, weights = self.attend(before if self.config.query_before_ln else z, outputs, own)
        record = site.runtime.override.record
        if record is not None:
            record.fusion.setdefault(self.branch, []).append(weights.detach())
        if last.config.swapped and last.config.original_ln_after:
            fused = fused + h - residual  # as in `Bottleneck`
        return last.gives(out, fused, residual, flow)

    def attend(
        self, query: torch.Tensor, outputs: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The weighted sum with the residual (B, T, D), and the weights (B, T, N)."""
        config = self.config
        if config.residual_before:
            outputs = outputs + residual.unsqueeze(-2)
        q = self.query(query) if config.query else query
        k = self.key(outputs) if config.key else outputs
        v = self.value(outputs) if config.value and config.value_before_softmax else outputs
        scores = (k @ q.unsqueeze(-1)).squeeze(-1)
        if self.training and config.dropout:
            scores = F.dropout(scores, config.dropout)
        weights = F.softmax(scores / config.temperature, dim=-1)
        summed = (weights.unsqueeze(-2) @ v).squeeze(-2)
        if config.value and not config.value_before_softmax:
            summed = self.value(summed)
        return (summed if config.residual_before else summed + residual), weights

    def loss(self) -> torch.Tensor:
        """0.01 ||V - I||^2, which keeps the value projection near the identity."""
        weight: torch.Tensor = self.value.weight
        return 0.01 * (weight - torch.eye(weight.shape[0], device=weight.device)).square().sum()


def _projection(width: int, bias: bool, generator: torch.Generator | None) -> nn.Linear:
    linear = nn.Linear(width, width, bias=bias)
    with torch.no_grad():
        nn.init.normal_(linear.weight, std=0.02, generator=generator)
        if bias:
            linear.bias.zero_()
    return linear
