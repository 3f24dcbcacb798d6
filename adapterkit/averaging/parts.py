"""Adapters as lists of methods with a weight, and the result as one method again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from adapterkit.adapter import Adapter
from adapterkit.errors import PlanError, Problem
from adapterkit.methods.base import MethodConfig, Shared, Unit
from adapterkit.methods.union import SharedUnion, UnionConfig
from adapterkit.methods.weights import wide
from adapterkit.model.blueprint import Slot


@dataclass(frozen=True)
class How:
    """What was asked for."""

    strategy: str
    rank: int | None = None
    density: float = 1.0
    generator: torch.Generator | None = None

    @property
    def is_plain(self) -> bool:
        """Whether one adapter of weight 1 is to come out as it is."""
        return self.rank is None and self.density == 1


@dataclass(frozen=True)
class Part:
    """One method of one adapter."""

    name: str
    weight: float
    config: MethodConfig
    slots: Mapping[str, Slot]
    units: Mapping[str, Unit]
    shared: Shared | None


@dataclass(frozen=True)
class Made:
    """One method of the result."""

    config: MethodConfig
    addresses: tuple[str, ...]
    tensors: Mapping[str, torch.Tensor]


def refusal(message: str, address: str = "", expected: str = "") -> PlanError:
    return PlanError(Problem("cannot-average", message, address, expected))


def split(adapter: Adapter, weight: float) -> list[Part]:
    """The methods of an adapter: the members of a union, else the one."""
    config, plan = adapter.config, adapter.plan
    if not isinstance(config, UnionConfig):
        slots = {slot.address: slot for slot in plan.slots}
        return [Part(adapter.name, weight, config, slots, adapter.units, adapter.shared)]
    found = []
    for index, (member, own) in enumerate(config.members(plan.slots)):
        units = {slot.address: adapter.units[f"{index}:{slot.address}"] for slot in own}
        shared = adapter.shared.of(index) if isinstance(adapter.shared, SharedUnion) else None
        found.append(Part(adapter.name, weight, member, {s.address: s for s in own}, units, shared))
    return found


def averaged(adapters: Sequence[tuple[Adapter, float]], average: Callable[[Sequence[Part]], Made]) -> Made:
    """The average of every method, put together.

    Raises: PlanError: some are unions and others not, or of other numbers of methods.
    """
    split_up = [split(adapter, weight) for adapter, weight in adapters]
    is_union = {isinstance(adapter.config, UnionConfig) for adapter, _ in adapters}
    if len(is_union) > 1 or len({len(found) for found in split_up}) > 1:
        names = ", ".join(repr(adapter.name) for adapter, _ in adapters)
        raise refusal(f"{names} are not made of the same methods", expected="unions of the same methods")
    made = [average(parts) for parts in zip(*split_up, strict=True)]
    return _union(made) if is_union == {True} else made[0]


def _union(members: Sequence[Made]) -> Made:
    tensors = {
        _inside(index, key): tensor
        for index, made in enumerate(members)
        for key, tensor in made.tensors.items()
    }
    addresses = tuple(f"{i}:{address}" for i, made in enumerate(members) for address in made.addresses)
    return Made(UnionConfig(configs=tuple(made.config for made in members)), addresses, tensors)


def _inside(index: int, key: str) -> str:
    """Key of a tensor in the union of which its method is a member."""
    head, _, rest = key.partition(".")
    return f"shared.members.{index}.{rest}" if head == "shared" else f"{index}:{key}"


def narrow(tensors: Iterable[torch.Tensor]) -> torch.dtype:
    """Type of the result of tensors of these types."""
    first, *others = (tensor.dtype for tensor in tensors)
    for dtype in others:
        first = torch.promote_types(first, dtype)
    return first


def mean(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Weighted sum, rounded once."""
    first = tensors[0]
    total = torch.zeros_like(first, dtype=wide(first))
    for tensor, weight in zip(tensors, weights, strict=True):
        total += weight * tensor.detach().to(device=first.device, dtype=total.dtype)
    return total.to(narrow(tensors))
