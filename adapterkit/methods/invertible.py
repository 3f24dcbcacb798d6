"""Invertible adapters: a bijection behind the embeddings, undone before the output embeddings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from adapterkit.errors import PlanError, Problem
from adapterkit.methods.activations import ACTIVATIONS
from adapterkit.methods.base import MethodConfig, Shared, Unit, Unmergeable, Words
from adapterkit.methods.flow import first, with_first
from adapterkit.methods.targets import Selection, shared_embeddings, unknown_stacks
from adapterkit.methods.weights import float_of
from adapterkit.model.blueprint import Blueprint, Slot
from adapterkit.model.embeddings import embedding_slots, unembed_slots


class InvertibleConfig(MethodConfig):
    """Invertible adapters of MAD-X (Pfeiffer et al. 2020, arXiv:2005.00052)."""

    method: ClassVar[str] = "invertible"
    place = "embeddings"
    passing = MethodConfig.passing | {"stacks"}

    coupling: Literal["nice", "glow"] = Field(default="nice", description="additive or affine coupling")
    reduction_factor: float = Field(
        default=2, gt=0, description="half the width / width of the coupling's hidden layer"
    )
    non_linearity: str = Field(default="relu", description="activation in the coupling")
    inverse: bool | None = Field(
        default=None, description="undo it before the output embeddings; None: where the class has them"
    )

    stacks: Words | None = Field(
        default=None, description="stacks whose embeddings it follows; None: those that read no other stack"
    )
    first_only: bool = Field(
        default=False,
        description="acts only where its adapter is the first of a setup, as in setups of AdapterHub",
    )

    def model_post_init(self, context: Any) -> None:
        if self.non_linearity not in ACTIVATIONS:
            raise ValueError(f"non_linearity is one of {', '.join(ACTIVATIONS)}")

    def available(self, blueprint: Blueprint) -> Mapping[str, Slot]:
        return {**embedding_slots(blueprint), **unembed_slots(blueprint)}

    def select(self, blueprint: Blueprint) -> Selection:
        """The embeddings of every stack that does not read another, and the output embeddings.

        Where the stacks that are read have no embeddings (audio), those of the others are taken.
        Raises: PlanError: the inverse has no place, or another width.
        """
        read = [name for name, info in blueprint.stacks.items() if info.reads is not None]
        named = embedding_slots(blueprint)
        usual = {a: s for a, s in named.items() if blueprint.stacks[s.stack].by_default}
        slots = {a: s for a, s in usual.items() if s.stack not in read} or usual
        missing: list[Problem] = []
        if self.stacks is not None:
            slots = {a: s for a, s in named.items() if s.stack in self.stacks}
            missing = unknown_stacks(self.stacks, [slot.stack for slot in named.values()])
        if not slots and not missing:
            message = f"no stack of this model has embeddings that are named ({blueprint.interface_name})"
            raise PlanError(
                Problem("no-embeddings", message, expected="an interface that says 'embeddings: {out: ...}'")
            )
        missing += shared_embeddings(blueprint, slots.values())
        if self.inverse is False or not slots:
            return Selection.of(list(slots.values()), missing)
        first = next(iter(slots.values())).stack
        ends = {a: s for a, s in unembed_slots(blueprint).items() if s.stack == first}
        if self.inverse and not ends:
            message = "the class has no output embeddings before which the adapter could be undone"
            raise PlanError(
                Problem("no-unembedding", message, expected="a language-model class, or inverse=False")
            )
        for address, end in ends.items():
            start = slots[f"{end.stack}.embeddings"]
            if start.shape != end.shape:
                message = f"embeddings of width {_width(start)} cannot be undone at width {_width(end)}"
                raise PlanError(Problem("other-width", message, address, "inverse=False"))
        return Selection.of([*slots.values(), *ends.values()], missing)

    def build(self, slot: Slot, shared: Shared | None, generator: torch.Generator | None) -> Unit:
        if slot.role == "unembed":
            assert isinstance(shared, Couplings)
            return Inverse(shared, slot.stack, self.first_only)
        assert isinstance(shared, Couplings)
        return Forward(shared, slot.stack, self.first_only)

    def share(self, slots: Sequence[Slot], generator: torch.Generator | None) -> Shared:
        return Couplings([slot for slot in slots if slot.role == "embeddings"], self, generator)


def _width(slot: Slot) -> int:
    return (slot.shape or (0, 0))[0]


class Couplings(Shared):
    """The bijection of each stack, used at both its ends."""

    def __init__(
        self, slots: Sequence[Slot], config: InvertibleConfig, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        kind = Nice if config.coupling == "nice" else Glow
        self.stacks = nn.ModuleDict({_key(s.stack): kind(_width(s), config, generator) for s in slots})

    def of(self, stack: str) -> Coupling:
        found: Any = self.stacks[_key(stack)]
        return found  # type: ignore[no-any-return]


def _key(stack: str) -> str:
    return stack.replace("/", "_")


class Coupling(nn.Module):
    """A bijection of the channels, from two maps between their halves."""

    def __init__(self, width: int, config: InvertibleConfig, generator: torch.Generator | None) -> None:
        super().__init__()
        if width % 2:
            message = f"embeddings of odd width {width} have no halves"
            raise PlanError(Problem("other-width", message, expected="an even width"))
        hidden = max(int(width // 2 // config.reduction_factor), 1)
        act = ACTIVATIONS[config.non_linearity]
        self.F = SubNet(width // 2, hidden, self.outputs * (width // 2), act, generator)
        self.G = SubNet(width // 2, hidden, self.outputs * (width // 2), act, generator)

    outputs = 1

    def inverse(self, y: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class SubNet(nn.Module):
    """One hidden layer between halves of the channels. Shapes: (..., D/2) -> (..., outputs)."""

    def __init__(
        self, d_in: int, hidden: int, d_out: int, act: Any, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        self.down, self.up, self.act = nn.Linear(d_in, hidden), nn.Linear(hidden, d_out), act
        with torch.no_grad():
            for linear in (self.down, self.up):
                nn.init.normal_(linear.weight, std=0.02, generator=generator)
                linear.bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.act(self.down(x)))  # type: ignore[no-any-return]


class Nice(Coupling):
    """y1 = x1 + F(x2), y2 = x2 + G(y1).

    Source: Dinh et al. 2015, arXiv:1410.8516, eq. 4; as used by Pfeiffer et al. 2020, arXiv:2005.00052,
    section 3.3.
    Shapes: (..., D) -> (..., D).
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x1, x2 = x.chunk(2, dim=-1)
        y1 = x1 + self.F(x2)
        return torch.cat([y1, x2 + self.G(y1)], dim=-1)

    def inverse(self, y: torch.Tensor) -> torch.Tensor:
        y1, y2 = y.chunk(2, dim=-1)
        x2 = y2 - self.G(y1)
        return torch.cat([y1 - self.F(x2), x2], dim=-1)


class Glow(Coupling):
    """y1 = e(s) * x1 + t with (s, t) = F(x2); y2 = e(s') * x2 + t' with (s', t') = G(y1).

    Source: Kingma and Dhariwal 2018, arXiv:1807.03039, table 1; the log scale is softly clamped to +-5 by an
    arctangent, as in the authors of MAD-X's framework.
    Shapes: (..., D) -> (..., D).
    """

    outputs = 2
    clamp = 5.0

    def scale(self, s: torch.Tensor) -> torch.Tensor:
        return torch.exp(self.clamp * (2 / math.pi) * torch.atan(s / self.clamp))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x1, x2 = x.chunk(2, dim=-1)
        s, t = self.F(x2).chunk(2, dim=-1)
        y1 = self.scale(s) * x1 + t
        s, t = self.G(y1).chunk(2, dim=-1)
        return torch.cat([y1, self.scale(s) * x2 + t], dim=-1)

    def inverse(self, y: torch.Tensor) -> torch.Tensor:
        y1, y2 = y.chunk(2, dim=-1)
        s, t = self.G(y1).chunk(2, dim=-1)
        x2 = (y2 - t) / self.scale(s)
        s, t = self.F(x2).chunk(2, dim=-1)
        return torch.cat([(y1 - t) / self.scale(s), x2], dim=-1)


class _End(Unmergeable):
    """One end of a bijection; its tensors belong to the shared couplings."""

    phase = 5
    per_position = True
    averages = False  # a mean of bijections may be none
    reason = "a bijection of embeddings is no change of a weight"

    def __init__(self, couplings: Couplings, stack: str, first_only: bool = False) -> None:
        super().__init__()
        # in a tuple, so that the couplings are registered at their owner alone
        self.owner = (couplings,)
        self.stack = stack
        self.first_only = first_only

    @property
    def coupling(self) -> Coupling:
        return self.owner[0].of(self.stack)


class Forward(_End):
    """Behind the embeddings: x (B, T, D) -> (B, T, D)."""

    def forward(self, out: Any, x: Any, host: nn.Module) -> Any:
        value = first(out)
        dtype = float_of(self.coupling)
        return with_first(out, self.coupling(value.to(dtype)).to(value.dtype))


class Inverse(_End):
    """Before the output embeddings: the states back into the space of the embeddings."""

    acts_on = "input"
    undoes = True

    def forward(self, x: torch.Tensor, host: nn.Module) -> torch.Tensor:
        dtype = float_of(self.coupling)
        return self.coupling.inverse(x.to(dtype)).to(x.dtype)
