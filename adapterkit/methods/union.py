"""Several methods in one adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field, field_serializer, field_validator
from torch import nn

from adapterkit.errors import ConfigError, Problem
from adapterkit.methods.base import Helper, MethodConfig, Shared, Unit
from adapterkit.methods.targets import Selection
from adapterkit.model.blueprint import Blueprint, Slot


class UnionConfig(MethodConfig):
    """Several methods attached, saved and activated as one; MAM is one (He et al. 2022, arXiv:2110.04366)."""

    method: ClassVar[str] = "union"

    configs: tuple[MethodConfig, ...] = Field(min_length=1, description="the methods, in order")

    @field_validator("configs", mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        from adapterkit.methods.names import parse  # the table of methods holds this class

        return tuple(parse(item) for item in value) if isinstance(value, list | tuple) else value

    @field_serializer("configs")
    def _named(self, configs: tuple[MethodConfig, ...]) -> list[dict[str, Any]]:
        return [config.to_dict() for config in configs]

    def available(self, blueprint: Blueprint) -> Mapping[str, Slot]:
        return self._together([list(config.available(blueprint).values()) for config in self.configs])

    def select(self, blueprint: Blueprint) -> Selection:
        chosen = [config.select(blueprint) for config in self.configs]
        slots = self._together([list(selection.slots) for selection in chosen])
        missing = [problem for selection in chosen for problem in selection.missing]
        return Selection(tuple(slots.values()), tuple(missing))

    def _together(self, groups: list[list[Slot]]) -> dict[str, Slot]:
        """All slots under addresses that tell which member they are for: '0:encoder.1.mlp'."""
        return {
            f"{index}:{slot.address}": slot.moved(address=f"{index}:{slot.address}")
            for index, group in enumerate(groups)
            for slot in group
        }

    def members(self, slots: Sequence[Slot]) -> list[tuple[MethodConfig, list[Slot]]]:
        """Each method with its own slots under their own addresses."""
        groups: list[list[Slot]] = [[] for _ in self.configs]
        for slot in slots:
            index, _, address = slot.address.partition(":")
            groups[int(index)].append(slot.moved(address=address))
        return list(zip(self.configs, groups, strict=True))

    def check(self, slots: Sequence[Slot]) -> None:
        for config, own in self.members(slots):
            config.check(own)

    def share(self, slots: Sequence[Slot], generator: torch.Generator | None) -> Shared | None:
        found = {
            str(index): shared
            for index, (config, own) in enumerate(self.members(slots))
            if (shared := config.share(own, generator)) is not None
        }
        return SharedUnion(found) if found else None

    def flattened(
        self, slots: Sequence[Slot], units: Mapping[str, Unit], shared: Shared | None
    ) -> tuple[MethodConfig, dict[str, Unit], Shared | None] | None:
        configs, all_units, kept, changed = [], dict(units), {}, False
        for index, (config, own) in enumerate(self.members(slots)):
            theirs = {slot.address: units[f"{index}:{slot.address}"] for slot in own}
            has = isinstance(shared, SharedUnion) and str(index) in shared.members
            part: Any = shared.members[str(index)] if has and isinstance(shared, SharedUnion) else None
            found = config.flattened(own, theirs, part)
            if found is not None:
                config, theirs, part = found
                all_units |= {f"{index}:{address}": unit for address, unit in theirs.items()}
                changed = True
            configs.append(config)
            if part is not None:
                kept[str(index)] = part
        whole = UnionConfig(configs=tuple(configs))
        return (whole, all_units, SharedUnion(kept) if kept else None) if changed else None

    def build(self, slot: Slot, shared: Shared | None, generator: torch.Generator | None) -> Unit:
        index, _, address = slot.address.partition(":")
        own: Any = (
            shared.members[index] if isinstance(shared, SharedUnion) and index in shared.members else None
        )
        return self.configs[int(index)].build(slot.moved(address=address), own, generator)

    def helpers(self, slots: Sequence[Slot], blueprint: Blueprint) -> list[Helper]:
        return [helper for config, own in self.members(slots) for helper in config.helpers(own, blueprint)]


class SharedUnion(Shared):
    """Shared tensors of the members that have some."""

    def __init__(self, members: Mapping[str, Shared]) -> None:
        super().__init__()
        self.members = nn.ModuleDict(dict(members))

    def of(self, index: int) -> Shared | None:
        """What the units of one member use together."""
        if str(index) not in self.members:
            return None
        found = self.members[str(index)]
        assert isinstance(found, Shared)
        return found

    def requires_grad_(self, requires_grad: bool = True) -> SharedUnion:
        for member in self.members.values():
            member.requires_grad_(requires_grad and getattr(member, "trained", True))
        return self


def union(parts: Sequence[MethodConfig]) -> MethodConfig:
    """One method as it is, several as their union.

    Raises: ConfigError: there is none.
    """
    if not parts:
        raise ConfigError(Problem("unknown-method", "a union needs at least one method"))
    return parts[0] if len(parts) == 1 else UnionConfig(configs=tuple(parts))
