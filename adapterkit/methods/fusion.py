"""AdapterFusion: attention over the outputs of several adapters, bottlenecks or updates of weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from adapterkit.errors import ConfigError, PlanError, Problem
from adapterkit.methods.base import Helper, MethodConfig, Shared, Unit, Unmergeable
from adapterkit.methods.bottleneck import Bottleneck
from adapterkit.methods.flow import Flow, flow_of, record_of
from adapterkit.methods.lora import add_rows
from adapterkit.methods.targets import Selection
from adapterkit.methods.weights import is_plain
from adapterkit.model.blueprint import Blueprint, Slot
from adapterkit.model.branches import Branch, branches
from adapterkit.model.walk import is_sharded


class FusionConfig(MethodConfig):
    """AdapterFusion (Pfeiffer et al. 2021, arXiv:2005.00247); made by `kit.fuse`."""

    method: ClassVar[str] = "fusion"
    has_head: ClassVar[bool] = False

    children: tuple[str, ...] = Field(
        default=(), min_length=2, description="names of the adapters that are fused; `kit.fuse` fills them in"
    )
    places: tuple[str, ...] = Field(
        default=(), description="branches and linear maps at which all of them have a unit"
    )
    partial: bool = Field(
        default=False, description="also fuse where some of them have no unit, over those that have one"
    )
    query: bool = Field(default=True, description="project what the adapters read")
    key: bool = Field(default=True, description="project the outputs of the adapters for the scores")
    value: bool = Field(default=True, description="project the outputs of the adapters that are added up")
    query_before_ln: bool = Field(
        default=False,
        description="the query is the branch (the output of the map), not what the adapters read",
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
        return {**branches(blueprint, self.branch == "before_norm"), **blueprint.slots}

    def select(self, blueprint: Blueprint) -> Selection:
        if not self.children:
            raise ConfigError(
                Problem("bad-option", "a fusion needs adapters", "children", "kit.fuse('a', 'b')")
            )
        slots = self.available(blueprint)
        return Selection.of([slots[address] for address in self.places if address in slots])

    def check(self, slots: Sequence[Slot]) -> None:
        if not slots:
            message = f"{', '.join(self.children)} have no place in common at which they could be fused"
            raise PlanError(
                Problem("nothing-selected", message, expected="bottlenecks or LoRAs at the same places")
            )
        for slot in slots:
            d_out, d_in = slot.shape or (0, 0)
            if d_out != d_in and not (self.query or self.query_before_ln or isinstance(slot, Branch)):
                message = f"without its projection the query has {d_in} numbers, but the outputs have {d_out}"
                expected = "query=True, query_before_ln=True, or adapters of square maps"
                raise ConfigError(Problem("bad-option", message, slot.address, expected))

    def build(self, slot: Slot, shared: Shared | None, generator: torch.Generator | None) -> Unit:
        return (BranchFusion if isinstance(slot, Branch) else UpdateFusion)(slot, self, generator)

    def helpers(self, slots: Sequence[Slot], blueprint: Blueprint) -> list[Helper]:
        return []  # those of the adapters serve


PRESETS: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"value": False, "regularization": False, "value_initialized": False},
}
"""Configs of fusions by name."""


Children = Sequence[Sequence[str]]
"""Keys of units at one site: of each child the one that is fused, behind those that act before it. A child
that has none is left out."""


class Fusion(Unmergeable):
    """sum_i softmax_i(q . k_i) v_i with q = Q x, k_i = K o_i and v_i = V o_i for the outputs o_i of adapters.

    Source: Pfeiffer et al. 2021, arXiv:2005.00247, eq. 3-5; dot products are not scaled.
    Shapes: x (B, T, D_in), outputs (B, T, N, D), residual (B, T, D) -> sum (B, T, D), weights (B, T, N).
    """

    per_position = True
    reason = "attention over adapters is no change of a weight"

    def __init__(self, slot: Slot, config: FusionConfig, generator: torch.Generator | None) -> None:
        super().__init__()
        d_out, d_in = slot.shape or (1, 1)
        self.config = config
        self.address = slot.address
        self.children_keys: tuple[str, ...] = ()
        """Keys of the adapters' units at the same site; set when the fusion is put into the model."""
        if config.query:
            self.query = _projection(d_out if config.query_before_ln else d_in, d_out, True, generator)
        if config.key:
            self.key = _projection(d_out, d_out, True, generator)
        if config.value:
            self.value = _projection(d_out, d_out, False, generator)
            if config.value_initialized:
                with torch.no_grad():
                    self.value.weight.fill_(1e-6).fill_diagonal_(1.0)

    def fused(self, out: Any, x: Any, host: nn.Module, children: Children) -> Any:
        """What the host gives, with the mixture of what the children give."""
        raise NotImplementedError

    def forward(self, out: Any, x: Any, host: nn.Module) -> Any:
        return self.fused(out, x, host, [(key,) for key in self.children_keys])

    def mixture(
        self, query: torch.Tensor, outputs: Sequence[torch.Tensor], residual: torch.Tensor, site: Any
    ) -> torch.Tensor:
        """The weighted sum (B, T, D); the residual is in it with `residual_before`."""
        config, own = self.config, next(self.parameters(), outputs[0])
        o = torch.stack([given.to(own.dtype) for given in outputs], dim=-2)
        if config.residual_before:
            o = o + residual.to(own.dtype).unsqueeze(-2)
        q = self.query(query.to(own.dtype)) if config.query else query.to(own.dtype)
        k = self.key(o) if config.key else o
        v = self.value(o) if config.value and config.value_before_softmax else o
        scores = (k @ q.unsqueeze(-1)).squeeze(-1)
        if self.training and config.dropout:
            scores = F.dropout(scores, config.dropout)
        weights = F.softmax(scores / config.temperature, dim=-1)
        record = record_of(site.runtime)
        if record is not None:
            record.fusion.setdefault(self.address, []).append(weights.detach())
        summed: torch.Tensor = (weights.unsqueeze(-2) @ v).squeeze(-2)
        summed = self.value(summed) if config.value and not config.value_before_softmax else summed
        return summed.to(residual.dtype)

    def loss(self) -> torch.Tensor:
        """0.01 ||V - I||^2, which keeps the value projection near the identity."""
        weight: Any = self.value.weight
        if is_sharded(weight):
            weight = weight.full_tensor()  # in every process, as each has the loss
        loss: torch.Tensor = 0.01 * (weight - torch.eye(weight.shape[0], device=weight.device)).square().sum()
        return loss


class BranchFusion(Fusion):
    """Of bottlenecks: h' = sum_i p_i v_i + r, with q from what they read and o_i what they give.

    Input, residual and what follows are those of the last adapter. Behind others of a Stack an adapter reads
    what these leave.
    Shapes: h, x (B, T, D) -> (B, T, D).
    """

    phase = 2

    @property
    def per_example(self) -> tuple[str, ...]:
        return self.address, f"{self.address}~", f"{self.address}+"

    @property
    def leaves(self) -> str:
        return self.address

    def fused(self, out: Any, x: Any, host: nn.Module, children: Children) -> Any:
        flow = flow_of(host)
        site: Any = host.adapterkit
        units: list[list[Bottleneck]] = [[site._modules[key] for key in keys] for keys in children if keys]
        if not units or not flow.get(f"{self.address}!"):
            return out
        marks = [f"{self.address}{mark}" for mark in "=?^"]
        left = {mark: flow[mark] for mark in marks if mark in flow}  # by adapters before the fusion
        last = units[-1][-1]
        h, residual, z, own = _read(last, out, flow)
        outputs = []
        for *before, unit in units:
            read = z
            if before:
                flow.update(left)
                result = out
                for other in before:
                    result = other(result, x, host)
                _, _, read, _ = _read(unit, result, flow)
            outputs.append(unit.up_output(read))
        if last.config.is_parallel and self.config.adds_stream:
            result = self.mixture(z, outputs, z, site)
            result = (result if self.config.residual_before else result + z) + own
        else:
            query = residual if last.config.swapped else h
            result = self.mixture(query if self.config.query_before_ln else z, outputs, own, site)
            result = result if self.config.residual_before else result + own
        if last.config.swapped and last.config.original_ln_after:
            result = result + h - residual  # as in `Bottleneck`
        return last.gives(out, result, residual, flow)


def _read(unit: Bottleneck, out: Any, flow: Flow) -> tuple[torch.Tensor, ...]:
    """The branch h, its residual x, what a bottleneck reads of them, and its own residual."""
    h = unit.takes(out, flow)
    residual = unit.residual(flow, h)
    return h, residual, *(unit.reads(residual, h) if unit.config.swapped else unit.reads(h, residual))


class UpdateFusion(Fusion):
    """Of updates of one linear map: y = W x + b + sum_i p_i v_i, with q from x and o_i = B_i A_i x, say.

    What a Stack gives is the sum of its updates. With `query_before_ln` the query is W x + b, and with
    `residual_before` W x + b is a part of every o_i.
    Shapes: x (B, T, D_in) -> (B, T, D_out).
    """

    phase = 0

    def __init__(self, slot: Slot, config: FusionConfig, generator: torch.Generator | None) -> None:
        super().__init__(slot, config, generator)
        self.rows = slot.rows
        self.in_place = is_plain(slot.module)

    def fused(self, out: torch.Tensor, x: torch.Tensor, host: nn.Module, children: Children) -> torch.Tensor:
        site: Any = host.adapterkit
        units: list[list[Unit]] = [[site._modules[key] for key in keys] for keys in children if keys]
        if not units:
            return out
        outputs = []
        for first, *others in units:
            given = first.added(x)
            for unit in others:
                given = given + unit.added(x)
            outputs.append(given)
        h = out if self.rows is None else self.rows.view(out).flatten(-2)
        h = h.to(outputs[0].dtype)
        query = h if self.config.query_before_ln else x.to(h.dtype)
        summed = self.mixture(query, outputs, h, site)
        delta = summed - h if self.config.residual_before else summed
        return add_rows(out, delta, self.rows, self.in_place)


def _projection(d_in: int, d_out: int, bias: bool, generator: torch.Generator | None) -> nn.Linear:
    linear = nn.Linear(d_in, d_out, bias=bias)
    with torch.no_grad():
        nn.init.normal_(linear.weight, std=0.02, generator=generator)
        if bias:
            linear.bias.zero_()
    return linear
