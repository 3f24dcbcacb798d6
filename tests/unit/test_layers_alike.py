"""Layers that are made alike are bound after the first one; each is checked, and one that differs is seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import adapterkit as ak
from adapterkit.model import repeat
from adapterkit.model.blueprint import Blueprint, Slot
from adapterkit.model.resolve import resolve
from adapterkit.model.scope import Here
from tests.models import tiny
from tests.unit.kit_scene import refused


def facts(slots: dict[str, Slot]) -> list[tuple[Any, ...]]:
    names = [name for name in Slot.__dataclass_fields__ if name != "module"]
    return [(id(slot.module), *(getattr(slot, name) for name in names)) for slot in slots.values()]


def everything(blueprint: Blueprint) -> tuple[Any, ...]:
    infos = [(i.address, i.sizes, i.kernels, i.eager, i.head_dims) for i in blueprint.stacks.values()]
    return facts(dict(blueprint.slots)), facts(dict(blueprint.places)), infos


@pytest.mark.parametrize("row", [row for row in tiny.ROWS if row != "custom"])
def test_a_pattern_finds_what_binding_each_layer_finds(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build(row)
    found = everything(resolve(model))
    monkeypatch.setattr(repeat.Pattern, "again", lambda self, here: False)
    assert everything(resolve(model)) == found


def noted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For every layer but the first: whether it was bound by the pattern."""
    seen: list[bool] = []
    again = repeat.Pattern.again

    def noting(pattern: repeat.Pattern, here: Here) -> bool:
        seen.append(again(pattern, here))
        return seen[-1]

    monkeypatch.setattr(repeat.Pattern, "again", noting)
    return seen


def layers(model: nn.Module) -> nn.ModuleList:
    found: nn.ModuleList = model.encoder.layer  # type: ignore[assignment, union-attr]
    return found


def test_the_second_layer_is_bound_by_the_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = noted(monkeypatch)
    resolve(tiny.build("bert"))
    assert seen and all(seen)


def test_a_layer_that_lacks_something_is_refused() -> None:
    model = tiny.build("bert")
    del layers(model)[-1].attention.self.query
    text = str(refused(ak.errors.ResolveError, "path-not-found", resolve, model))
    assert f"encoder.layer.{len(layers(model)) - 1}.attention" in text


def test_a_layer_of_another_width_has_its_own_shapes() -> None:
    model = tiny.build("bert")
    last = layers(model)[-1].intermediate
    last.dense = nn.Linear(last.dense.in_features, 7)
    blueprint = resolve(model)
    assert blueprint.slots[f"encoder.{len(layers(model)) - 1}.mlp.up"].shape == (7, last.dense.in_features)
    assert blueprint.slots["encoder.0.mlp.up"].shape != (7, last.dense.in_features)


def test_a_layer_with_a_map_of_another_class_is_bound_by_itself() -> None:
    class Wider(nn.Linear):
        pass

    model = tiny.build("bert")
    old = layers(model)[-1].attention.self.query
    layers(model)[-1].attention.self.query = Wider(old.in_features, old.out_features)
    last = resolve(model).slots[f"encoder.{len(layers(model)) - 1}.attention.q"]
    assert type(last.module) is Wider


class Alike(nn.Module):
    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.a = nn.Linear(2, 2)
        self.b = self.a if twice else nn.Linear(2, 2)
        self.c = None


def test_what_is_alike() -> None:
    same = repeat.alike(Alike(False), Alike(False), {})
    assert same and repeat.alike(Alike(True), Alike(True), {})
    # one module under two names here, two modules there
    assert not repeat.alike(Alike(True), Alike(False), {})
    other = Alike(False)
    other.c = nn.Identity()
    assert not repeat.alike(Alike(False), other, {}) and not repeat.alike(other, Alike(False), {})
    assert not repeat.alike(nn.Linear(2, 2), nn.Identity(), {})


def test_a_core_with_another_number_of_heads_is_bound_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the config does not tell them, heads are read off the cores: they are compared as well."""
    layer = {"core": "attn", "q": "attn.q", "k": "attn.k", "v": "attn.v", "o": "attn.o"}
    spec = {"adapterkit": 1, "stacks": {"encoder": {"layers": "layers", "attention": layer}}}

    def build(*heads: int) -> nn.Module:
        model = nn.Module()
        model.layers = nn.ModuleList(nn.Module() for _ in heads)
        for one, number in zip(model.layers, heads, strict=True):
            one.attn = nn.Module()
            one.attn.num_heads = number
            for role in "qkvo":
                setattr(one.attn, role, nn.Linear(8, 8))
        return model

    seen = noted(monkeypatch)
    resolve(build(2, 2, 4), spec)
    assert seen == [True, False]


def test_numbers_of_the_model_are_counted_without_adapters() -> None:
    model = tiny.build("bert")
    own = sum(parameter.numel() for parameter in model.parameters())
    with torch.no_grad():
        kit = ak.attach(model, "lora", name="a")
        kit.attach("seq_bn", name="b")
    assert kit["a"].plan.base_parameters == kit["b"].plan.base_parameters == own
