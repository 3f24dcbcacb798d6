"""The adapters that a model itself has, silenced while an adapter of ours acts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn

from adapterkit.methods.base import MethodConfig, Shared, Unit
from adapterkit.methods.targets import Selection
from adapterkit.model.blueprint import Blueprint, Slot


class SilenceConfig(MethodConfig):
    """Without the model's own adapters, such as those of its languages; nothing is trained.

    Beside another method in a union it makes the base that the other one was trained on: files of
    AdapterHub have it where their library takes such adapters out of the model.
    """

    method: ClassVar[str] = "silence"
    trains = False

    def available(self, blueprint: Blueprint) -> Mapping[str, Slot]:
        found = {}
        for address, place in blueprint.places.items():
            if place.role != "own_adapter":
                continue
            group = isinstance(place.module, nn.ModuleDict | nn.ModuleList)
            for name, module in place.module.named_children() if group else (("", place.module),):
                own, path = (f"{text}.{name}".rstrip(".") for text in (address, place.path))
                # it belongs to the whole model: it is silent in layers that are skipped, too
                found[own] = replace(place, address=own, module=module, path=path, layer=None)
        return found

    def select(self, blueprint: Blueprint) -> Selection:
        return Selection.of(list(self.available(blueprint).values()))

    def build(self, slot: Slot, shared: Shared | None, generator: torch.Generator | None) -> Unit:
        return Silence()


class Silence(Unit):
    """y = 0 in place of what the host gives. Shapes: out (...) -> (...)."""

    per_position = True

    def forward(self, out: Any, x: Any, host: nn.Module) -> Any:
        return torch.zeros_like(out)

    def refuses_merge(self) -> str | None:
        return "the model's own adapters are silent beside it, and act when it is merged"

    def merged(
        self, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        raise NotImplementedError("refused by refuses_merge")
