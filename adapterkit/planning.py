"""Blueprint + config -> Plan: what attach will do, countable and printable before anything is changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from adapterkit.errors import ConfigError, PlanError, Problem
from adapterkit.methods.base import MethodConfig, Shared, Unit
from adapterkit.methods.targets import Selection
from adapterkit.model.blueprint import Blueprint, Head, Slot
from adapterkit.model.walk import parameters


@dataclass(frozen=True)
class Plan:
    """Which unit goes to which slot.

    `missing` lists what was asked for and is not there; only `strict=False` lets it be non-empty.
    """

    name: str
    config: MethodConfig
    interface: str
    slots: tuple[Slot, ...]
    heads: tuple[Head, ...]
    missing: tuple[Problem, ...]
    parameters: int
    """Numbers that are trained, without heads."""
    head_parameters: int
    blueprint: Blueprint = field(repr=False, compare=False)

    @property
    def base_parameters(self) -> int:
        """Numbers of the model itself."""
        return self.blueprint.parameters

    @property
    def counts(self) -> dict[str, int]:
        """Adapted slots by 'stack.sublayer.role'."""
        return dict(
            Counter(f"{s.stack}.{s.sublayer}.{s.role}" if s.sublayer else s.address for s in self.slots)
        )

    @property
    def percent(self) -> float:
        """Trained numbers (with heads) per hundred numbers of the base model."""
        return 100 * (self.parameters + self.head_parameters) / max(self.base_parameters, 1)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "config": self.config.to_dict(),
            "interface": self.interface,
            "slots": {
                slot.address: {"path": slot.path, "shape": list(slot.shape or ())} for slot in self.slots
            },
            "counts": self.counts,
            "heads": [head.path for head in self.heads],
            "missing": [problem.to_dict() for problem in self.missing],
            "parameters": self.parameters,
            "head_parameters": self.head_parameters,
            "base_parameters": self.base_parameters,
        }

    def __str__(self) -> str:
        wide = max((len(key) for key in self.counts), default=0)
        rows = [f"{self.config.method} {self.name!r} on {self.interface}: {len(self.slots)} slots"]
        rows += [f"  {key:<{wide}}  {number:>4} x  {self._shape(key)}" for key, number in self.counts.items()]
        rows += [f"  head  {head.path}" for head in self.heads]
        rows += [f"  missing  {problem.message}" for problem in self.missing]
        total = f"  {self.parameters:,} parameters"
        total += f" + {self.head_parameters:,} in heads" if self.heads else ""
        return "\n".join([*rows, f"{total} ({self.percent:.2f} % of {self.base_parameters:,})"])

    def _shape(self, key: str) -> str:
        shapes = {
            s.shape for s in self.slots if s.shape and key in (f"{s.stack}.{s.sublayer}.{s.role}", s.address)
        }
        return " or ".join(f"{shape[1]} -> {shape[0]}" for shape in sorted(shapes))

    __repr__ = __str__


@dataclass(frozen=True)
class Draft:
    """Units of one adapter before they are put into the model."""

    units: dict[str, Unit]
    shared: Shared | None

    def modules(self) -> dict[str, torch.nn.Module]:
        """All that carries tensors, by address; the shared tensors under 'shared'."""
        return {**({"shared": self.shared} if self.shared is not None else {}), **self.units}


def choose(blueprint: Blueprint, config: MethodConfig, strict: bool) -> Selection:
    """Slots for a method.

    Raises: PlanError: the family says that it cannot have the method, or (if strict) something asked for is
    missing.
    """
    _refuse(config, blueprint.interface_name, blueprint.unsupported)
    selection = config.select(blueprint)
    for stack in dict.fromkeys(slot.stack for slot in selection.slots):
        _refuse(config, stack, blueprint.stacks[stack].interface.unsupported)
    if selection.missing and (strict or not selection.slots):
        raise PlanError(selection.missing)
    config.check(selection.slots)
    return selection


def _refuse(config: MethodConfig, who: str, unsupported: Mapping[str, str]) -> None:
    reason = unsupported.get(config.method)
    if reason is not None:
        raise PlanError(Problem("unsupported", f"{who} has no {config.method}: {reason}"))


def build(config: MethodConfig, slots: tuple[Slot, ...], generator: torch.Generator | None) -> Draft:
    """The units of a plan, in float32 on the CPU (or under the device context of the caller)."""
    shared = config.share(slots, generator)
    return Draft({slot.address: config.build(slot, shared, generator) for slot in slots}, shared)


def describe(
    blueprint: Blueprint,
    config: MethodConfig,
    name: str,
    selection: Selection,
    heads: tuple[Head, ...],
    draft: Draft,
) -> Plan:
    """The plan of units that were built."""
    trained = sum(
        parameter.numel()
        for module in draft.modules().values()
        for *_, parameter in parameters(module)
        if parameter.requires_grad
    )
    return Plan(
        name=name,
        config=config,
        interface=blueprint.interface_name,
        slots=selection.slots,
        heads=heads,
        missing=selection.missing,
        parameters=trained,
        head_parameters=sum(
            parameter.numel()
            for head in heads
            for *_, parameter in parameters(head.module)  # without the copies of other adapters
        ),
        blueprint=blueprint,
    )


def seeded(seed: int | None) -> torch.Generator | None:
    """A generator on the CPU, so that the device does not matter; None: numbers come from torch's own.

    Raises: ConfigError: it is no seed.
    """
    if seed is None:
        return None
    if not isinstance(seed, int) or not -(2**63) <= seed < 2**64:  # what torch takes
        raise ConfigError(Problem("bad-option", f"{seed!r} is no seed", "seed", "a whole number of 64 bits"))
    return torch.Generator().manual_seed(seed)


def prepare(
    blueprint: Blueprint,
    config: MethodConfig,
    name: str,
    heads: tuple[Head, ...],
    strict: bool,
    seed: int | None = None,
) -> tuple[Plan, Draft]:
    """The plan of a method and its units, built from a seed or from torch's own numbers.

    Raises: PlanError, ConfigError: as `choose`.
    """
    selection, generator = choose(blueprint, config, strict), seeded(seed)
    # modules of torch draw numbers when they are made, which ours then replace
    with nullcontext() if generator is None else torch.random.fork_rng(devices=[]):
        draft = build(config, selection.slots, generator)
    return describe(blueprint, config, name, selection, heads, draft), draft
