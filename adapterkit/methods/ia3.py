"""(IA)^3: one learned factor for each channel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from adapterkit.errors import ConfigError, Problem
from adapterkit.methods.base import Shared, SlotConfig, Targets, Unit, per_slot
from adapterkit.methods.lora import Gate
from adapterkit.model.blueprint import Slot
from adapterkit.model.layouts import Rows


class IA3Config(SlotConfig):
    """Infused adapter by inhibiting and amplifying inner activations (Liu et al. 2022, arXiv:2205.05638)."""

    method: ClassVar[str] = "ia3"

    targets: Targets = ("k", "v", "down")
    alpha: float = Field(default=1.0, description="constant factor beside the learned ones")
    sides: dict[str, Literal["input", "output"]] = Field(
        default_factory=dict,
        description="what is scaled, by role or address; the paper's: the input of down, else the output",
    )
    gating: bool = Field(default=False, description="a learned gate in place of alpha; not in the paper")

    def side(self, slot: Slot) -> Literal["input", "output"]:
        found: Literal["input", "output"] = per_slot(
            self.sides, slot, "input" if slot.role == "down" else "output"
        )
        return found

    def check(self, slots: Sequence[Slot]) -> None:
        problems = []
        roles = {slot.role for slot in slots}
        for role in sorted(self.sides.keys() - roles - {slot.address for slot in slots}):
            message = f"sides names {role!r}, which is not among the targets"
            problems.append(Problem("unknown-role", message, "sides", f"targets: {', '.join(sorted(roles))}"))
        for slot in slots:
            if slot.rows is not None and self.side(slot) == "input":
                message = f"{slot.role} shares the input of {slot.path} with other roles"
                problems.append(
                    Problem("shared-input", message, slot.address, "the side 'output', or the target 'fused'")
                )
        if problems:
            raise ConfigError(problems)

    def build(self, slot: Slot, shared: Shared | None, generator: torch.Generator | None) -> Unit:
        kind = ScaleInput if self.side(slot) == "input" else ScaleOutput
        return kind(slot, self, generator)


class Scale(Unit):
    """A learned vector; ones at first, so that the output is unchanged."""

    def __init__(self, slot: Slot, config: IA3Config, generator: torch.Generator | None) -> None:
        super().__init__()
        d_out, d_in = slot.shape or (0, 0)
        self.alpha = config.alpha
        self.per_position = not config.gating
        self.rows: Rows | None = slot.rows
        self.scale = nn.Parameter(torch.ones(d_in if self.acts_on == "input" else d_out))
        self.gate = Gate(d_in, generator) if config.gating else None

    def factor(self, x: torch.Tensor) -> torch.Tensor:
        """The factors for the input x (B, T, D_in): (D,), or (B, 1, D) with a gate."""
        if self.gate is not None:
            gated: torch.Tensor = self.scale * self.gate(x.to(self.scale.dtype))
            return gated
        return self.scale if self.alpha == 1 else self.scale * self.alpha

    def refuses_merge(self) -> str | None:
        return "its gate depends on the input" if self.gate is not None else None


class ScaleInput(Scale):
    """Scale what a linear map reads: y = W (l * x) + b.

    Source: Liu et al. 2022, arXiv:2205.05638, section 3.3: the input of the second matrix of the MLP.
    Shapes: x (..., D_in), l (D_in,).
    """

    acts_on = "input"

    def forward(self, x: torch.Tensor, host: nn.Module) -> torch.Tensor:
        return (x * self.factor(x)).to(x.dtype)

    def merged(
        self, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return weight * (self.scale.to(weight.dtype) * self.alpha), bias


class ScaleOutput(Scale):
    """Scale what a linear map gives, bias included: y = l * (W x + b).

    Source: Liu et al. 2022, arXiv:2205.05638, section 3.3: keys and values.
    Shapes: x (..., D_in) -> (..., D_out), l (D_out,).
    """

    def forward(self, out: torch.Tensor, x: torch.Tensor, host: nn.Module) -> torch.Tensor:
        factor = self.factor(x)
        if self.rows is not None:
            # ones for the rows of the other roles: the product needs its old input, so a view cannot be
            # written
            whole = factor.new_ones((*factor.shape[:-1], self.rows.groups * self.rows.width))
            self.rows.view(whole).copy_(factor.unflatten(-1, (self.rows.groups, self.rows.length)))
            factor = whole
        return (out * factor).to(out.dtype)

    def merged(
        self, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        factor = self.scale.to(weight.dtype) * self.alpha
        return weight * factor[:, None], None if bias is None else bias * factor
