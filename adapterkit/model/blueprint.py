"""What a model is, in the words of its interface: slots and places bound to modules."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

from torch import nn

from adapterkit.model.layouts import Rows
from adapterkit.model.walk import parameters
from adapterkit.spec.schema import Inputs, Interface, Kernel, Reads


@dataclass(frozen=True)
class Slot:
    """A linear map that methods may adapt, or a named place of the forward pass (`shape` None)."""

    address: str
    role: str
    stack: str
    layer: int | None
    sublayer: str | None
    module: nn.Module
    path: str
    shape: tuple[int, int] | None = None
    """(D_out, D_in) of the role alone."""
    rows: Rows | None = None
    """Where the role lies in a fused host, None if the host is the role."""
    transposed: bool = False
    """The host keeps its weight as (D_in, D_out)."""
    batch: str = "first"
    was: tuple[str, ...] = ()
    """Module paths under which foreign files know the host."""

    @property
    def sublayer_address(self) -> str:
        return self.address.rpartition(".")[0]

    def moved(self, **changes: Any) -> Self:
        """As `dataclasses.replace`, several times faster: every layer has a dozen."""
        there = object.__new__(type(self))
        there.__dict__.update(self.__dict__, **changes)
        return there


Scale = float | tuple[nn.Module, str]
"""A factor: a number, or a module and the name of the attribute that holds it."""


@dataclass(frozen=True)
class StackInfo:
    """One stack of the model and what the entry of it is told."""

    address: str
    interface: Interface
    """The interface that describes the stack: that of the model, or of the part it lies in."""
    root: nn.Module
    path: str
    num_layers: int
    layers: tuple[nn.Module, ...]
    inputs: Inputs
    parallel: bool
    reads: Reads | None
    by_default: bool
    kernels: Mapping[str, Kernel | None]
    eager: Mapping[str, str | None]
    sizes: Mapping[str, tuple[int | None, int | None]]
    """sublayer, and address of one -> (query heads, key/value heads), as far as known."""
    head_dims: Mapping[str, tuple[int | None, int | None]] = field(default_factory=dict)
    """Likewise the width of one head, and of one of the values, where the interface says it."""


@dataclass(frozen=True)
class Head:
    """A task head of the model: a module outside everything that the interface claims."""

    address: str
    path: str
    module: nn.Module


@dataclass(frozen=True)
class Blueprint:
    """An interface resolved on one model."""

    interface: Interface
    interface_name: str
    model: nn.Module
    slots: Mapping[str, Slot]
    places: Mapping[str, Slot]
    stacks: Mapping[str, StackInfo]
    heads: tuple[Head, ...]
    poolers: tuple[Head, ...]
    loose: tuple[str, ...] = ()
    """Parameters around the base model that belong to no module of a head."""
    unsupported: Mapping[str, str] = field(default_factory=dict)
    scales: Mapping[str, Scale] = field(default_factory=dict)
    """Address of a sublayer -> factor of its branch at the residual add."""
    without: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Address of a sublayer -> what it does without, and why."""
    between: tuple[str, ...] = ()
    """Paths of modules below the base model that belong to no stack."""
    apart: tuple[str, ...] = ()
    """Paths of parts whose type has no interface, and which are left as they are."""

    def __iter__(self) -> Iterator[Slot]:
        return iter(self.slots.values())

    @cached_property
    def parameters(self) -> int:
        """Numbers of the model itself, without adapters; tied ones count once."""
        return sum(parameter.numel() for *_, parameter in parameters(self.model))

    def roles(self, stacks: Collection[str] | None = None) -> tuple[str, ...]:
        """Every role and extra name that some slot has, in order of appearance, without `fused`.

        Args: stacks: only those of these.
        """
        slots = (slot for slot in self if stacks is None or slot.stack in stacks)
        return tuple(dict.fromkeys(slot.role for slot in slots if slot.role != "fused"))

    def why_without(self, what: str, sublayer: str = "") -> str:
        """Why no sublayer (of this kind) has a role or a branch, as far as the interface says; with ': '."""
        said = (
            reasons[what]
            for address, reasons in self.without.items()
            if what in reasons and address.endswith(sublayer)
        )
        reason = next(said, "")
        return f": {reason}" if reason else ""

    def to_dict(self) -> dict[str, Any]:
        return {
            "interface": self.interface_name,
            "slots": {a: {"path": s.path, "shape": s.shape} for a, s in self.slots.items()},
            "places": {a: {"path": s.path} for a, s in self.places.items()},
            "heads": [head.path for head in self.heads],
        }
