"""VeRA: shared frozen random matrices, trained scaling vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from adapterkit.errors import ConfigError, PlanError, Problem
from adapterkit.methods import one_weight
from adapterkit.methods.base import Shared, SlotConfig, Unit
from adapterkit.methods.lora import add_rows, uniform
from adapterkit.methods.weights import is_plain, joinable
from adapterkit.model.blueprint import Slot

_TOGETHER = "all targets on one device, without offloading"


class VeRAConfig(SlotConfig):
    """Vector-based random matrix adaptation (Kopiczko et al. 2024, arXiv:2310.11454)."""

    method: ClassVar[str] = "vera"
    passing = SlotConfig.passing | {"d_initial"}

    r: int = Field(default=256, ge=1, description="rank R of the shared matrices")
    alpha: float | None = Field(default=None, description="scale alpha / R; None: 1, as in the paper")
    d_initial: float = Field(default=0.1, description="start of the vector d; b starts at zero")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout on the input, in training")

    @property
    def scaling(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.r

    def check(self, slots: Sequence[Slot]) -> None:
        weights = [getattr(slot.module, "weight", None) for slot in slots]
        devices = {weight.device for weight in weights if isinstance(weight, torch.Tensor)}
        hooked = any("_hf_hook" in slot.module.__dict__ for slot in slots)
        if len(devices) > 1 or (hooked and torch.device("meta") in devices):
            names = ", ".join(sorted(map(str, devices)))
            message = f"the shared matrices cannot be on {names} at once, nor be offloaded"
            raise PlanError(Problem("shared-apart", message, expected=_TOGETHER))

    def share(self, slots: Sequence[Slot], generator: torch.Generator | None) -> Shared:
        return SharedVeRA(self.r, [slot.shape or (1, 1) for slot in slots], generator)

    def build(self, slot: Slot, shared: Shared | None, generator: torch.Generator | None) -> Unit:
        return VeRA(slot, self, shared)


class SharedVeRA(Shared):
    """The frozen matrices A (R, max D_in) and B (max D_out, R); a slot uses their leading columns and rows.

    They are parameters that are never trained, so that they follow the model's dtype and device.
    """

    trained = False

    def __init__(
        self, rank: int, shapes: Sequence[tuple[int, int]], generator: torch.Generator | None
    ) -> None:
        super().__init__()
        d_out, d_in = (max(sizes) for sizes in zip(*shapes, strict=True))
        self.A = uniform((rank, d_in), d_in, generator)
        self.B = uniform((d_out, rank), rank, generator)
        self.requires_grad_(False)


class VeRA(Unit):
    """y = W x + b + s diag(b) B diag(d) A x with A and B frozen and shared.

    Source: Kopiczko et al. 2024, arXiv:2310.11454, eq. 2; b starts at zero: the output is unchanged at first.
    Shapes: x (..., D_in) -> (..., D_out); d (R,), b (D_out,).
    """

    per_position = True
    adds = True
    signed = ("b",)

    def __init__(self, slot: Slot, config: VeRAConfig, shared: Shared | None) -> None:
        super().__init__()
        if shared is None:
            raise ConfigError(Problem("internal", "VeRA was built without its shared matrices"))
        self.d_out, self.d_in = slot.shape or (0, 0)
        self.scaling = config.scaling
        self.dropout = config.dropout
        self.rows = slot.rows
        self.in_place = is_plain(slot.module)
        self.joins = slot.rows is None and joinable(slot.module)
        self.d = nn.Parameter(torch.full((config.r,), config.d_initial))
        self.b = nn.Parameter(torch.zeros(self.d_out))
        # in a tuple, so that the shared matrices are registered at their owner alone
        self.owner = (shared,)

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A (R, D_in) and B (D_out, R) of this slot."""
        shared = self.owner[0]
        return shared.A[:, : self.d_in], shared.B[: self.d_out]  # type: ignore[index]

    def low_rank(self, x: torch.Tensor) -> torch.Tensor:
        """Scaled update s diag(b) B diag(d) A x: (..., D_in) -> (..., D_out)."""
        a, b = self.matrices()
        if a.device != x.device or type(a) not in (torch.Tensor, type(x)):
            message = "the shared matrices were moved, offloaded or sharded away from a unit after attach"
            raise PlanError(Problem("shared-apart", message, expected=_TOGETHER))
        return F.linear(F.linear(x, a) * self.d, b) * (self.b * self.scaling)

    def added(self, x: torch.Tensor) -> torch.Tensor:
        return self.low_rank(x if torch.is_autocast_enabled(x.device.type) else x.to(self.d.dtype))

    def dropped(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != self.d.dtype and not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.d.dtype)
        return F.dropout(x, self.dropout) if self.training and self.dropout else x

    def at_once(self, x: torch.Tensor, host: nn.Module, normed: bool = False) -> bool:
        """Whether host and unit run as one weight."""
        tensors = *self._parameters.values(), *self.owner[0]._parameters.values()
        return one_weight.pays(self, x, host, len(self.d), *tensors, normed=normed)

    def forward(self, out: torch.Tensor | None, x: torch.Tensor, host: Any) -> torch.Tensor:
        if out is None:
            if self.at_once(x, host):
                return F.linear(x, *self.merged(host.weight, host.bias))
            out = F.linear(x, host.weight, host.bias)
        return add_rows(out, self.low_rank(self.dropped(x)), self.rows, self.in_place)

    def factors(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, float]:
        a, b = (matrix.to(dtype) for matrix in self.matrices())
        return self.b.to(dtype)[:, None] * b * self.d.to(dtype), a, self.scaling

    def delta(self, dtype: torch.dtype) -> torch.Tensor:
        """(D_out, D_in): what the unit adds to the weight."""
        left, right, scaling = self.factors(dtype)
        return left @ right * scaling

    def merged(
        self, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        left, right, scaling = self.factors(weight.dtype)
        return torch.addmm(weight, left, right, alpha=scaling), bias
