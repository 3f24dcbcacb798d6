"""DoRA and DVoRA: the direction of a weight is adapted by a low-rank update, its magnitude by a vector."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from adapterkit.methods import one_weight
from adapterkit.methods.base import Shared, Unit
from adapterkit.methods.lora import LoRA, LoRAConfig, add_rows
from adapterkit.methods.vera import VeRA, VeRAConfig
from adapterkit.methods.weights import joinable, readable, refuse_quantised, slot_bias, slot_weight
from adapterkit.model.blueprint import Slot
from adapterkit.model.layouts import Rows


class DoRAConfig(LoRAConfig):
    """Weight-decomposed low-rank adaptation (Liu et al. 2024, arXiv:2402.09353)."""

    method: ClassVar[str] = "dora"

    norm_scaled: bool = Field(
        default=True, description="the norm sees alpha / R; false reproduces files of AdapterHub"
    )
    scale_bias: bool = Field(
        default=False, description="the bias is scaled too; true reproduces files of AdapterHub"
    )

    def model_post_init(self, context: Any) -> None:
        if self.gating or self.init != "lora":
            raise ValueError("DoRA has neither gating nor other starts than 'lora'")

    def build(self, slot: Slot, shared: Shared | None, generator: torch.Generator | None) -> Unit:
        return DoRA(slot, self, generator)


class DVoRAConfig(VeRAConfig):
    """DoRA whose direction is adapted by VeRA (Liu et al. 2024, arXiv:2402.09353, section 4.5)."""

    method: ClassVar[str] = "dvora"

    norm_scaled: bool = Field(
        default=True, description="the norm sees alpha / R; false reproduces files of AdapterHub"
    )
    scale_bias: bool = Field(
        default=False, description="the bias is scaled too; true reproduces files of AdapterHub"
    )

    def build(self, slot: Slot, shared: Shared | None, generator: torch.Generator | None) -> Unit:
        return DVoRA(slot, self, shared)


class Magnitude(Unit):
    """The part that DoRA and DVoRA have in common.

    y = g * (W x + D x) + b with g = m / ||W + D||, the norm of each row over the inputs; D is the low-rank
    update. The norm is a constant in the backward pass (section 4.3). m starts at ||W||, so that g is
    exactly 1 at first.
    """

    rows: Rows | None
    in_place: bool

    def decompose(self, slot: Slot, norm_scaled: bool, scale_bias: bool) -> None:
        """Add the magnitude m (D_out,) to a unit that is otherwise complete."""
        self.adds = False  # it also scales what the host gives
        self.joins = slot.rows is None and joinable(slot.module)
        self.transposed = slot.transposed
        self.norm_scaled = norm_scaled
        self.scale_bias = scale_bias
        self.m = nn.Parameter(one_weight.norms(readable(slot, "DoRA")))

    def factors(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, float]:
        """L (D_out, R), S (R, D_in) and s with D = s L S, computed in `dtype`."""
        raise NotImplementedError

    @torch.no_grad()
    def norm(self, host: nn.Module) -> torch.Tensor:
        """||W + D|| for each row (D_out,).

        Raises: PlanError: W was quantised after attach.
        """
        refuse_quantised(host)
        weight = slot_weight(host, self.transposed, self.rows)
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        left, right, scaling = self.factors(weight.dtype)
        return one_weight.norms_of_sum(weight, left, right, scaling if self.norm_scaled else 1.0)

    def gain(self, norm: torch.Tensor) -> torch.Tensor:
        """G (D_out,). A row of zeros has no direction: it stays as it is, since any g does the same."""
        return self.m.to(norm.dtype) / norm.masked_fill(norm == 0, 1)

    def adapt(self, out: torch.Tensor, delta: torch.Tensor, host: nn.Module) -> torch.Tensor:
        """From the host's output (..., D_out) and D x to the decomposed output."""
        gain = self.gain(self.norm(host).to(self.m.dtype))
        own = out if self.rows is None else self.rows.view(out).flatten(-2)
        bias = None if self.scale_bias else slot_bias(host, self.rows)
        if bias is not None:
            plain = own - bias
        else:
            # a copy of the rows: backward needs them after other units have written theirs into `out`
            plain = own if self.rows is None else own.clone()
        # written as a change of the output, so that g = 1 and D = 0 leave every bit as it is
        return add_rows(out, (gain - 1) * plain + gain * delta, self.rows, self.in_place)

    def merged(
        self, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        left, right, scaling = self.factors(weight.dtype)
        whole = torch.addmm(weight, left, right, alpha=scaling)
        with torch.no_grad():
            seen = whole if self.norm_scaled or scaling == 1 else torch.addmm(weight, left, right)
            norm = one_weight.norms(seen)
        gain = self.gain(norm)
        return gain[:, None] * whole, bias * gain if self.scale_bias and bias is not None else bias


class DoRA(Magnitude, LoRA):
    """y = m / ||W + s B A|| * (W + s B A) x + b.

    Source: Liu et al. 2024, arXiv:2402.09353, eq. 5.
    Shapes: x (..., D_in) -> (..., D_out); A (R, D_in), B (D_out, R), m (D_out,).
    """

    def __init__(self, slot: Slot, config: DoRAConfig, generator: torch.Generator | None) -> None:
        super().__init__(slot, config, generator)
        self.decompose(slot, config.norm_scaled, config.scale_bias)

    def factors(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, float]:
        return self.B.to(dtype), self.A.to(dtype), self.scaling

    def forward(self, out: torch.Tensor | None, x: torch.Tensor, host: Any) -> torch.Tensor:
        if out is None:
            if one_weight.pays(self, x, host, len(self.A), *self._parameters.values(), normed=True):
                return F.linear(x, *self.merged(host.weight, host.bias))
            out = F.linear(x, host.weight, host.bias)
        if x.dtype != self.A.dtype and not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.A.dtype)
        if self.training and self.dropout:
            return self._dropped(out, x, host)
        return self.adapt(out, self.low_rank(x), host)

    def _dropped(self, out: torch.Tensor, x: torch.Tensor, host: nn.Module) -> torch.Tensor:
        """With dropout only the update sees the thinned input; the host's own part keeps the whole one."""
        return self.adapt(out, self.low_rank(F.dropout(x, self.dropout)), host)


class DVoRA(Magnitude, VeRA):
    """y = m / ||W + D|| * (W + D) x + b with D = s diag(b) B diag(d) A.

    Source: Liu et al. 2024, arXiv:2402.09353, section 4.5, with Kopiczko et al. 2024, eq. 2.
    Shapes: as VeRA, and m (D_out,).
    """

    def __init__(self, slot: Slot, config: DVoRAConfig, shared: Shared | None) -> None:
        super().__init__(slot, config, shared)
        self.decompose(slot, config.norm_scaled, config.scale_bias)

    def factors(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, float]:
        return VeRA.factors(self, dtype)

    def forward(self, out: torch.Tensor | None, x: torch.Tensor, host: Any) -> torch.Tensor:
        if out is None:
            if self.at_once(x, host, normed=True):
                return F.linear(x, *self.merged(host.weight, host.bias))
            out = F.linear(x, host.weight, host.bias)
        return self.adapt(out, self.low_rank(self.dropped(x)), host)
