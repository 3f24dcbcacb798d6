"""What a method is: a config that selects slots and builds one unit for each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from torch import nn

from adapterkit.methods import flow
from adapterkit.methods.targets import Selection, select, select_branches
from adapterkit.model.blueprint import Blueprint, Slot
from adapterkit.model.branches import Branch, branches
from adapterkit.model.cores import apart
from adapterkit.spec.schema import Kernel
from adapterkit.spec.terms import hash_of


def _as_tuple(value: Any) -> Any:
    """One word or number stands for a tuple of one; 'all' is a word of its own."""
    if isinstance(value, list | set):
        return tuple(value)
    return (value,) if isinstance(value, int | str) and value != "all" else value


Words = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
Layers = Annotated[tuple[int | str, ...], BeforeValidator(_as_tuple)]
Targets = Annotated[tuple[str, ...] | Literal["all"], BeforeValidator(_as_tuple)]


class Unit(nn.Module, ABC):
    """The trained part of a method at one slot.

    An `input` unit maps the input of its host: forward(x, host) -> x. An `output` unit maps its output:
    forward(out, x, host) -> out; it may write into `out` where `in_place` says so. A `held` unit waits at its
    host until a helper asks for it. A `kernel` unit gives the attention
    that its host computes keys and values of its own: forward(x) -> (key, value).
    """

    acts_on: ClassVar[Literal["held", "input", "output", "kernel"]] = "output"
    phase: ClassVar[int] = 0
    """Order among the units of one host: 0 changes the linear map, 2 the branch that it ends."""
    first_only: bool = False
    """It acts only where its adapter is the first of a setup."""
    per_position: bool = False
    """What it does at one position of an example depends on that position alone."""
    adds: bool = False
    """Its host gives y = W x + b, and with it y + added(x)."""
    joins: bool = False
    """An output unit that can also compute its host, an nn.Linear: forward(None, x, host) -> out of both."""
    averages: ClassVar[bool] = True
    """A mean of what several such units give is the result of a mean."""
    undoes: ClassVar[bool] = False
    """Of several in a Stack the last comes first."""
    signed: ClassVar[tuple[str, ...]] = ()
    """Tensors of which the sign of the whole update can be turned; the others stay as they are then."""
    kernel: Kernel | None = None
    """The method of the host that computes attention, where the interface names one."""
    eager: str | None = None
    """Name of the host's eager attention function, where the interface says it."""
    bias_method: str | None = None
    """The method of the host whose bias of relative positions the unit changes."""

    @property
    def per_example(self) -> tuple[str, ...]:
        """Entries of the flow that have a row for each example."""
        return ()

    @property
    def leaves(self) -> str | None:
        """The branch of which it may leave more than its output, see methods/flow.py."""
        return None

    common: ClassVar[tuple[str, ...] | None] = None
    """Tensors that adapters which share have in common; None: all of them."""

    def added(self, x: torch.Tensor) -> torch.Tensor:
        """What a unit that `adds` gives, without dropout: (..., D_in) -> (..., D_out)."""
        raise NotImplementedError("asked of units that add")

    def refuses_merge(self) -> str | None:
        """Why the unit cannot be folded into the weight exactly, None if it can."""
        return None

    def factors(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        """L (D_out, R), S (R, D_in), s of the update s L S before gate and magnitude; None: there is none."""
        return None

    @abstractmethod
    def merged(
        self, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight (D_out, D_in) and bias (D_out,) of the linear map that equals host and unit together."""


class Unmergeable(Unit):
    """A unit that is no change of a weight."""

    reason: ClassVar[str]
    """Why, for messages."""

    def refuses_merge(self) -> str | None:
        return self.reason

    def merged(
        self, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        raise NotImplementedError("refused by refuses_merge")


class Shared(nn.Module):
    """Tensors that all units of one adapter use. Registered once, at the first site."""

    trained: ClassVar[bool] = True
    """False: they stay as they started."""


class Helper(NamedTuple):
    """A module without tensors that units need elsewhere in the model; adapters share it."""

    place: Slot
    key: str
    make: Callable[[], Any]
    """Gives the module; None where there only needs to be a site."""
    acts_on: Literal["input", "output", "entry", "around"]
    phase: int
    of: str = ""
    """Address of the slot without whose unit it does nothing; empty: it looks at what is there."""


def no_module() -> None:
    """What makes a site of a module that is called one lane at a time, or again in backward."""


def run_again(blueprint: Blueprint, places: Sequence[Slot]) -> list[Helper]:
    """Make sites of the layers around these places that may be checkpointed.

    Setup and flow may be another one's by the time such a layer runs again; its site keeps them.
    """
    around = dict.fromkeys((place.stack, place.layer) for place in places if place.layer)  # 0 is an entry
    layers = [blueprint.places[f"{stack}.{index}.layer"] for stack, index in around]
    return [
        Helper(layer, "again", no_module, "around", 0)
        for layer in layers
        if hasattr(layer.module, "gradient_checkpointing")
    ]


class MethodConfig(BaseModel, ABC):
    """Options of a method. Immutable; unknown options are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False)
    method: ClassVar[str]
    trains: ClassVar[bool] = True
    """False: it has no tensors, and makes sense beside another method alone."""
    has_head: ClassVar[bool] = True
    """False: it acts with others, and the head is theirs."""
    place: ClassVar[Literal["core", "embeddings"] | None] = None
    """A place of the interface without which the method acts nowhere."""
    passing: ClassVar[frozenset[str]] = frozenset({"targets", "locations", "layers", "leave_out", "dropout"})
    """Options that say nothing about what the tensors at given slots mean once training is over."""

    @abstractmethod
    def available(self, blueprint: Blueprint) -> Mapping[str, Slot]:
        """Every slot the method could act on, by address."""

    @abstractmethod
    def select(self, blueprint: Blueprint) -> Selection:
        """The slots that are asked for, and what is missing."""

    def check(self, slots: Sequence[Slot]) -> None:
        """Raise ConfigError or PlanError where the options do not fit the slots."""

    def share(self, slots: Sequence[Slot], generator: torch.Generator | None) -> Shared | None:
        """Tensors that all units use together, on the CPU."""
        return None

    @abstractmethod
    def build(self, slot: Any, shared: Shared | None, generator: torch.Generator | None) -> Unit:
        """The unit for one slot, in float32 on the CPU; reads the host's weight at most."""

    def helpers(self, slots: Sequence[Slot], blueprint: Blueprint) -> list[Helper]:
        """What the units need elsewhere."""
        return []

    def flattened(
        self, slots: Sequence[Slot], units: Mapping[str, Unit], shared: Shared | None
    ) -> tuple[MethodConfig, dict[str, Unit], Shared | None] | None:
        """Config, units and shared tensors without the reparametrisation; None if it has none."""
        return None

    def replace(self, **changes: Any) -> Self:
        """The same config with some options changed (and checked)."""
        return type(self).model_validate({**dict(self), **changes})

    def __hash__(self) -> int:
        return hash_of(self)

    def to_dict(self) -> dict[str, Any]:
        return {"method": self.method, **self.model_dump(mode="json")}


class SlotConfig(MethodConfig):
    """Options of a method that acts on linear slots."""

    targets: Targets = Field(
        default=("q", "v"), description="roles, extra names, 'sublayer.role', addresses, or 'all'"
    )
    layers: Layers | None = Field(
        default=None,
        description="numbers (one stack) or addresses such as 'decoder.3', which also reach parts that words "
        "without an address do not; None: all",
    )
    leave_out: Layers = Field(default=(), description="layers that are left out, as in `layers`")

    def available(self, blueprint: Blueprint) -> Mapping[str, Slot]:
        return blueprint.slots

    def select(self, blueprint: Blueprint) -> Selection:
        return select(blueprint, self.targets, self.layers, self.leave_out)

    def helpers(self, slots: Sequence[Slot], blueprint: Blueprint) -> list[Helper]:
        found = (apart(blueprint, slot) for slot in slots)
        return [Helper(core, "apart", no_module, "around", 0) for core in found if core is not None]


class BranchConfig(MethodConfig):
    """Options of a method that acts on branches of the residual stream."""

    locations: Words = Field(
        default=("attention", "mlp"), description="sublayers: attention, cross_attention, mlp, or addresses"
    )
    layers: Layers | None = Field(
        default=None,
        description="numbers (one stack) or addresses such as 'decoder.3', which also reach parts that words "
        "without an address do not; None: all",
    )
    leave_out: Layers = Field(default=(), description="layers that are left out, as in `layers`")
    branch: Literal["after_norm", "before_norm"] = Field(
        default="after_norm",
        description="before or after the norm that some models have before the residual add",
    )

    def available(self, blueprint: Blueprint) -> Mapping[str, Slot]:
        return branches(blueprint, self.branch == "before_norm")

    def select(self, blueprint: Blueprint) -> Selection:
        found = self.available(blueprint)
        return select_branches(blueprint, found, self.locations, self.layers, self.leave_out)

    def helpers(self, slots: Sequence[Slot], blueprint: Blueprint) -> list[Helper]:
        found = []
        for branch in slots:
            if not isinstance(branch, Branch):
                continue
            address = branch.address
            norm = None if branch.own_adapter else branch.after_residual
            layer = blueprint.places[f"{branch.stack}.{branch.layer}.layer"] if branch.own_adapter else None
            for place, kind, acts_on, phase in (
                (branch.start, flow.Capture, "input", -1),
                (branch.projection, flow.Arm, "output", 1),
                (branch, flow.Release, "output", 3),
                (norm, flow.Override, "output", 3),
                (layer, flow.Forget, "output", 3),
            ):
                if place is not None:
                    key = f"{kind.__name__.lower()}__{address.replace('.', '_').replace('/', '_')}"
                    found.append(Helper(place, key, partial(kind, address), acts_on, phase))  # type: ignore[arg-type]
        return found


def per_slot(value: Any, slot: Slot, default: Any = None) -> Any:
    """An option that is one value, or one for each role or address; the address goes first."""
    return value.get(slot.address, value.get(slot.role, default)) if isinstance(value, dict) else value
