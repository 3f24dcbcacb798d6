"""LoRA: low-rank updates of linear maps, with the variants that change only rank, scale, start or gate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from adapterkit.errors import ConfigError, Problem
from adapterkit.methods.base import Shared, SlotConfig, Unit, per_slot
from adapterkit.methods.flow import record_of
from adapterkit.methods.weights import PLAIN, in_rows, is_plain, joinable, readable
from adapterkit.model.blueprint import Slot
from adapterkit.model.layouts import Rows


def add_rows(out: torch.Tensor, delta: torch.Tensor, rows: Rows | None, in_place: bool) -> torch.Tensor:
    """Out (..., D) plus delta (..., rows.total) in the rows of a role; all rows if `rows` is None."""
    delta = delta.to(out.dtype)
    if rows is None:
        return out + delta
    out = out if in_place else out.clone()
    # adding never needs the old value in backward, so that writing into a view is safe
    rows.view(out).add_(delta.unflatten(-1, (rows.groups, rows.length)))
    return out


def uniform(shape: tuple[int, ...], fan_in: int, generator: torch.Generator | None) -> nn.Parameter:
    """Kaiming-uniform with a = sqrt(5), as in nn.Linear: U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    bound = 1 / math.sqrt(fan_in)
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound, generator=generator))


class LoRAConfig(SlotConfig):
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685)."""

    method: ClassVar[str] = "lora"

    r: int | dict[str, int] = Field(default=8, description="rank R, one or for each role or address")
    alpha: float | dict[str, float] | None = Field(
        default=None, description="scale: alpha / R, as r; None: alpha = R"
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout on the input of A, in training")
    rslora: bool = Field(
        default=False, description="scale alpha / sqrt(R) (Kalajdzievski 2023, arXiv:2312.03732)"
    )
    init: Literal["lora", "gaussian", "pissa", "olora"] = Field(
        default="lora", description="how A and B start"
    )
    gating: bool = Field(
        default=False, description="scale by a learned gate in place of alpha / R (UniPELT, arXiv:2110.07577)"
    )

    def rank(self, slot: Slot) -> int:
        return int(per_slot(self.r, slot, 8))

    def scaling(self, slot: Slot) -> float:
        rank = self.rank(slot)
        alpha = per_slot(self.alpha, slot, None)
        return (rank if alpha is None else float(alpha)) / (math.sqrt(rank) if self.rslora else rank)

    def check(self, slots: Sequence[Slot]) -> None:
        problems = []
        roles = {slot.role for slot in slots}
        known = roles | {slot.address for slot in slots}
        for option in ("r", "alpha"):
            value = getattr(self, option)
            for role in sorted(value.keys() - known) if isinstance(value, dict) else ():
                message = f"{option} names {role!r}, which is not among the targets"
                problems.append(
                    Problem("unknown-role", message, option, f"targets: {', '.join(sorted(roles))}")
                )
        for slot in slots:
            limit = min(slot.shape or (1, 1))
            if not 1 <= self.rank(slot) <= limit:
                message = (
                    f"rank {self.rank(slot)} is not between 1 and {limit}, the smaller side of {slot.shape}"
                )
                problems.append(Problem("bad-rank", message, slot.address))
            elif self.init in ("pissa", "olora") and self.scaling(slot) <= 0:
                message = f"init={self.init!r} divides by the scale, which is {self.scaling(slot):g}"
                problems.append(Problem("bad-option", message, slot.address, "alpha > 0"))
        if problems:
            raise ConfigError(problems)

    def build(self, slot: Slot, shared: Shared | None, generator: torch.Generator | None) -> Unit:
        return LoRA(slot, self, generator)


class LoRA(Unit):
    """Low-rank update of one linear map: y = W x + b + s B A x, s = alpha / R.

    Source: Hu et al. 2021, arXiv:2106.09685, eq. 3. B starts at zero, so the output is unchanged at first.
    Differs from the paper: A is Kaiming-uniform, not Gaussian, as in the authors' code (the paper's is
    `init="gaussian"`).
    PiSSA (Meng et al. 2024, arXiv:2404.02948, eq. 2-4) and OLoRA (arXiv:2406.01775) start A and B at the
    principal part of W and train that part: y = W x + b + s (B A - B0 A0) x with frozen B0 A0, so that W
    itself is never written.
    Shapes: x (..., D_in) -> (..., D_out); A (R, D_in), B (D_out, R).
    """

    signed = ("B", "B0")
    scaling: float
    dropout: float
    rows: Rows | None
    in_place: bool
    gate: Gate | None
    A: nn.Parameter
    B: nn.Parameter
    A0: torch.Tensor | None
    B0: torch.Tensor | None

    def __init__(self, slot: Slot, config: LoRAConfig, generator: torch.Generator | None) -> None:
        super().__init__()
        d_out, d_in = slot.shape or (0, 0)
        rank = config.rank(slot)
        # at once: `nn.Module` would look at each of them for what it may be
        self.__dict__.update(
            scaling=config.scaling(slot),
            dropout=config.dropout,
            rows=slot.rows,
            in_place=is_plain(slot.module),
            joins=self._joins(slot, config),
            per_position=not config.gating,
            adds=not config.gating,
            gate=None,
            A0=None,
            B0=None,
        )
        # at once as well: a name that is new would be looked for everywhere
        self._parameters["A"] = uniform((rank, d_in), d_in, generator)
        self._parameters["B"] = nn.Parameter(torch.zeros(d_out, rank))
        if config.init == "gaussian":
            nn.init.normal_(self.A, std=1 / rank, generator=generator)
        elif config.init != "lora":
            self._principal(readable(slot, f"init={config.init!r}"), rank, config.init)
        if config.gating:
            self.gate = Gate(d_in, generator)

    def _principal(self, weight: torch.Tensor, rank: int, init: str) -> None:
        """Start at a part of W: s B A is its best rank-R part (PiSSA) or that of R columns of Q (OLoRA)."""
        root = math.sqrt(self.scaling)
        with torch.no_grad():
            if init == "pissa":
                u, sigma, vh = torch.linalg.svd(weight, full_matrices=False)
                half = sigma[:rank].sqrt()
                a, b = half[:, None] * vh[:rank] / root, u[:, :rank] * half / root
            else:
                q, r = torch.linalg.qr(weight)
                a, b = r[:rank] / root, q[:, :rank] / root
            self.A.copy_(a)
            self.B.copy_(b)
        del self.A0, self.B0  # a buffer takes no name that is an attribute
        self.register_buffer("A0", self.A.detach().clone())
        self.register_buffer("B0", self.B.detach().clone())

    def low_rank(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        """S (B A - B0 A0) x, or with a gate in place of s: (..., D_in) -> (..., D_out)."""
        factor = self.scaling if gate is None else gate

        def update(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            low = F.linear(x, a)  # R numbers for a token, so that a factor is best put here
            return F.linear(low if isinstance(factor, float) and factor == 1 else low * factor, b)

        delta = update(self.A, self.B)
        return delta if self.A0 is None or self.B0 is None else delta - update(self.A0, self.B0)

    def added(self, x: torch.Tensor) -> torch.Tensor:
        return self.low_rank(x if torch.is_autocast_enabled(x.device.type) else x.to(self.A.dtype))

    def forward(self, out: torch.Tensor | None, x: torch.Tensor, host: Any) -> torch.Tensor:
        if out is None:
            if self._accumulates(x, host):
                return self._accumulated(x, host)
            out = F.linear(x, host.weight, host.bias)
        if x.dtype != self.A.dtype and not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.A.dtype)
        gate = self.gate(x) if self.gate is not None else None
        if self.training and self.dropout:
            x = F.dropout(x, self.dropout)
        if gate is not None:
            return add_rows(out, self.low_rank(x, gate), self.rows, self.in_place)
        if self.A0 is None and self.rows is None and self.in_place and out.is_contiguous():
            # (R, N): a product with few rows is faster than one with few columns
            low = self.A @ x.reshape(-1, x.shape[-1]).t()
            if out.dtype == low.dtype == self.B.dtype:
                # one pass over `out`, no temporary of its size; the fresh output of a Linear is ours to write
                out.view(-1, out.shape[-1]).addmm_(low.t(), self.B.t(), alpha=self.scaling)
                if not torch.compiler.is_compiling():
                    # the output is a view, which torch takes for a leaf until it is asked: an activation that
                    # writes in place would be refused
                    _ = out.grad_fn
                return out
            delta = F.linear(low.t(), self.B) * self.scaling
            return out + delta.to(out.dtype).view(out.shape)
        return add_rows(out, self.low_rank(x), self.rows, self.in_place)

    def _joins(self, slot: Slot, config: LoRAConfig) -> bool:
        own = type(self).forward is LoRA.forward  # else a method that does more
        plain = config.init in ("lora", "gaussian") and not config.gating and slot.rows is None
        return own and plain and joinable(slot.module)

    def _accumulates(self, x: torch.Tensor, host: Any) -> bool:
        """Whether W x may be added to the update: where B is zero, to the bits of the host."""
        # as dictionaries: attributes of modules are slow to find; sharding may have put others there
        own, weight = self._parameters.get("A"), host._parameters.get("weight")
        if own is None or weight is None or not x.is_cpu or torch.is_autocast_enabled("cpu"):
            return False
        wide = x.dtype is torch.float32 or x.dtype is torch.float64
        alike = wide and own.dtype is x.dtype and weight.dtype is x.dtype and type(weight) in PLAIN
        return alike and x.numel() > 0 and in_rows(x)

    def _accumulated(self, x: torch.Tensor, host: Any) -> torch.Tensor:
        """Put b + s B A x first and W x onto it: on a CPU a linear map writes b first anyway."""
        own: dict[str, Any] = self._parameters
        a, b, scaling = own["A"], own["B"], self.scaling
        weight, bias = host._parameters["weight"], host._parameters["bias"]
        flat = x.reshape(-1, x.shape[-1])
        # (R, N): a product with few rows is faster than one with few columns
        low = a @ (F.dropout(flat, self.dropout) if self.training and self.dropout else flat).t()
        if bias is None:
            out = torch.mm(low.t(), b.t() if scaling == 1 else b.t() * scaling)
        else:
            out = torch.addmm(bias, low.t(), b.t(), alpha=scaling)
        return out.addmm_(flat, weight.t()).view(*x.shape[:-1], -1)

    def refuses_merge(self) -> str | None:
        return "its gate depends on the input" if self.gate is not None else None

    def factors(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, float]:
        left, right = self.B.to(dtype), self.A.to(dtype)
        if self.A0 is not None and self.B0 is not None:
            left = torch.cat([left, -self.B0.to(dtype)], dim=1)
            right = torch.cat([right, self.A0.to(dtype)])
        return left, right, self.scaling

    def delta(self, dtype: torch.dtype) -> torch.Tensor:
        """(D_out, D_in): what the unit adds to the weight."""
        delta = self.B.to(dtype) @ self.A.to(dtype)
        if self.A0 is not None and self.B0 is not None:
            delta = delta - self.B0.to(dtype) @ self.A0.to(dtype)
        return delta * self.scaling

    def merged(
        self, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return weight + self.delta(weight.dtype), bias

    def extra_repr(self) -> str:
        return f"R={self.A.shape[0]}, scaling={self.scaling:g}"


class Gate(nn.Module):
    """One scalar per example: the mean over tokens of sigmoid(w x + c).

    Source: Mao et al. 2022 (UniPELT), arXiv:2110.07577, section 3.2.
    Shapes: x (B, T, D_in) -> (B, 1, 1); x (B, D_in) -> (B, 1).
    """

    def __init__(self, d_in: int, generator: torch.Generator | None) -> None:
        super().__init__()
        self.weight = uniform((1, d_in), d_in, generator)
        self.bias = uniform((1,), d_in, generator)
        self.label = ""
        self.runtime: Any = None
        """Where the scores are kept if someone asks for them, and under which name; set in a model."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != self.weight.dtype and not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.weight.dtype)
        scores = torch.sigmoid(F.linear(x, self.weight, self.bias))
        gate = scores.mean(dim=1, keepdim=True) if scores.ndim > 2 else scores
        record = None if self.runtime is None else record_of(self.runtime)
        if record is not None:
            record.gates.setdefault(self.label, []).append(gate.detach().flatten())
        return gate
