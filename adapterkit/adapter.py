"""One adapter of a kit: its config, its plan, its tensors by address."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import nn

from adapterkit.inject.injector import Injection
from adapterkit.methods.base import MethodConfig, Shared, Unit
from adapterkit.model.blueprint import Head
from adapterkit.model.walk import parameters
from adapterkit.planning import Draft, Plan


@dataclass(eq=False)
class Adapter:
    """An adapter that is attached to a model."""

    name: str
    plan: Plan
    units: dict[str, Unit]
    shared: Shared | None
    heads: dict[str, nn.Module]
    """Address of the head -> the adapter's own copy of it."""
    poolers: dict[str, nn.Module]
    """Address of a pooler inside the base -> a frozen copy, where a file brought one that differs."""
    injection: Injection = field(init=False)
    trainable: bool = True
    merged: bool = field(default=False)

    @classmethod
    def made(
        cls,
        plan: Plan,
        draft: Draft,
        heads: Mapping[Head, nn.Module],
        poolers: Mapping[Head, nn.Module],
    ) -> Self:
        """What was planned and built, with copies of heads and poolers."""
        own, inside = ({place.address: m for place, m in found.items()} for found in (heads, poolers))
        return cls(plan.name, plan, draft.units, draft.shared, own, inside)

    @property
    def config(self) -> MethodConfig:
        return self.plan.config

    def modules(self) -> dict[str, nn.Module]:
        """Everything the adapter owns, by address."""
        shared = {"shared": self.shared} if self.shared is not None else {}
        return {**shared, **self.units, **self.heads, **self.poolers}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for address, module in self.modules().items():
            for name, parameter in module.named_parameters():
                yield f"{address}.{name}", parameter

    def named_trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Tensors that the adapter trains when it is trained."""
        frozen = {
            *self.poolers,
            *(("shared",) if self.shared is not None and not self.shared.trained else ()),
        }
        for address, module in self.modules().items():
            if address not in frozen:
                for name, parameter in module.named_parameters():
                    yield f"{address}.{name}", parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for _, parameter in self.named_parameters())

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Tensors by slot address, detached."""
        return {
            f"{address}.{name}": tensor.detach()
            for address, module in self.modules().items()
            for name, tensor in module.state_dict().items()
        }

    @property
    def num_parameters(self) -> int:
        """Numbers that the adapter trains, its heads included."""
        return self.plan.parameters + self.plan.head_parameters

    def require_grad(self, wanted: bool) -> None:
        """Switch training on or off; tensors that are frozen by their method stay so."""
        self.trainable = wanted
        for module in (*self.units.values(), *self.heads.values()):
            for *_, parameter in parameters(module):
                parameter.requires_grad_(wanted)
        for module in self.poolers.values():
            module.requires_grad_(False)
        if self.shared is not None:
            self.shared.requires_grad_(wanted and self.shared.trained)

    def __repr__(self) -> str:
        return repr(self.plan)
