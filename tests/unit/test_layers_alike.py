"""Layers that are made alike are bound after the first one, in later models too; one that differs is seen."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import adapterkit as ak
from adapterkit.model import repeat
from adapterkit.model.blueprint import Blueprint, Slot
from adapterkit.model.resolve import resolve
from adapterkit.spec import registry
from tests.models import tiny
from tests.unit.kit_scene import refused


def facts(slots: dict[str, Slot]) -> list[tuple[Any, ...]]:
    names = [name for name in Slot.__dataclass_fields__ if name != "module"]
    return [(id(slot.module), *(getattr(slot, name) for name in names)) for slot in slots.values()]


def everything(blueprint: Blueprint) -> tuple[Any, ...]:
    infos = [(i.address, i.sizes, i.kernels, i.eager, i.head_dims) for i in blueprint.stacks.values()]
    return facts(dict(blueprint.slots)), facts(dict(blueprint.places)), infos


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeat, "_known", {})


def alone(model: nn.Module, interface: Any = None) -> tuple[Any, ...]:
    """What binding finds in each layer by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repeat.Pattern, "fits", lambda *given, **more: False)
        return everything(resolve(model, interface))


def scenes(row: str) -> list[nn.Module]:
    """Every class of a family in every variant of its config."""
    variants = ({}, *tiny.ROWS[row].variants.values())
    return [tiny.build(row, cls, **variant) for cls in tiny.classes(row) for variant in variants]


@pytest.mark.parametrize("row", [row for row in tiny.ROWS if row != "custom"])
def test_a_pattern_finds_what_binding_each_layer_finds(row: str) -> None:
    """In whatever order models of a family come: the patterns of all that were before are known."""
    models = scenes(row)
    expected = [alone(model) for model in models]
    for given in (models, models[::-1]):
        found = [everything(resolve(model)) for model in given]
        assert found == (expected if given is models else expected[::-1])


def noted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For every layer whose outline is known: whether it was bound by the pattern."""
    seen: list[bool] = []
    fits = repeat.Pattern.fits

    def noting(pattern: repeat.Pattern, *given: Any, **more: Any) -> bool:
        seen.append(fits(pattern, *given, **more))
        return seen[-1]

    monkeypatch.setattr(repeat.Pattern, "fits", noting)
    return seen


def test_a_later_model_is_bound_by_the_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = noted(monkeypatch)
    resolve(tiny.build("bert"))
    count = len(seen)
    assert all(seen) and count == len(layers(tiny.build("bert"))) - 1
    resolve(tiny.build("bert"))
    assert all(seen) and len(seen) == 2 * count + 1


def test_no_model_is_kept_alive() -> None:
    for row in ("bert", "gptj", "bart"):
        model = tiny.build(row)
        resolve(model)
        gone = [weakref.ref(module) for module in model.modules()]
        del model
        gc.collect()
        assert not any(ref() is not None for ref in gone)


def test_what_the_config_decides_is_asked_again() -> None:
    """Two models of the same classes and names: only their configs tell which option a layer is."""
    option = {"path": "b", "when": {"second": True}}
    first = {"path": "a", "when": {"second": False}}
    attention = {"core": ".", "q": {"any_of": [first, option]}, "v": "v", "out": "."}
    attention["sizes"] = {"heads": "many"}
    spec = registry.load(
        {"adapterkit": 1, "stacks": {"encoder": {"layers": "layers", "attention": attention}}}
    )

    def build(second: bool, many: int) -> nn.Module:
        model, layer = nn.Module(), nn.Module()
        model.config = SimpleNamespace(second=second, many=many)
        layer.a, layer.b, layer.v = (nn.Linear(4, 4) for _ in range(3))
        model.layers = nn.ModuleList([layer])
        return model

    for second, many in ((False, 2), (True, 2), (True, 4), (False, 4)):
        model = build(second, many)
        blueprint = resolve(model, spec)
        assert blueprint.slots["encoder.0.attention.q"].path == ("layers.0.b" if second else "layers.0.a")
        assert blueprint.stacks["encoder"].sizes["encoder.0.attention"] == (many, many)


def test_one_is_not_true() -> None:
    spec = registry.load(
        {
            "adapterkit": 1,
            "stacks": {
                "encoder": {
                    "layers": "layers",
                    "attention": {
                        "core": ".",
                        "q": {"path": "q", "when": {"own": True}},
                        "v": "v",
                        "out": ".",
                    },
                }
            },
        }
    )

    def build(own: Any) -> nn.Module:
        model, layer = nn.Module(), nn.Module()
        model.config = SimpleNamespace(own=own)
        layer.q, layer.v = nn.Linear(4, 4), nn.Linear(4, 4)
        model.layers = nn.ModuleList([layer])
        return model

    assert "encoder.0.attention.q" in resolve(build(True), spec).slots
    refused(ak.errors.ResolveError, "present", resolve, build(1), spec)


def test_a_factor_is_that_of_the_layer_at_hand() -> None:
    attention = {"core": ".", "q": "q", "v": "v", "out": ".", "scale": "factor"}
    spec = registry.load(
        {"adapterkit": 1, "stacks": {"encoder": {"layers": "layers", "attention": attention}}}
    )

    def build(**given: Any) -> nn.Module:
        model = nn.Module()
        model.layers = nn.ModuleList(nn.Module() for _ in range(2))
        for layer in model.layers:
            layer.q, layer.v = nn.Linear(4, 4), nn.Linear(4, 4)
            for name, value in given.items():
                setattr(layer, name, value)
        return model

    assert not resolve(build(factor=None), spec).scales, "it says that it has none"
    for model in (build(factor=2.0), build(factor=nn.Parameter(torch.ones(4))), build(factor=3.0)):
        scales = resolve(model, spec).scales
        for index, layer in enumerate(model.layers):
            assert scales[f"encoder.{index}.attention"] == (layer, "factor")
    assert not resolve(build(factor=None), spec).scales
    refused(ak.errors.ResolveError, "unknown-config-field", resolve, build(), spec)
    refused(ak.errors.ResolveError, "unknown-config-field", resolve, build(factor="no number"), spec)


def layers(model: nn.Module) -> nn.ModuleList:
    found: nn.ModuleList = model.encoder.layer  # type: ignore[assignment, union-attr]
    return found


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
    def form(module: nn.Module) -> object:
        return repeat.outline(module)[0]

    assert form(Alike(False)) == form(Alike(False)) and form(Alike(True)) == form(Alike(True))
    # one module under two names here, two modules there
    assert form(Alike(True)) != form(Alike(False))
    other = Alike(False)
    other.c = nn.Identity()
    assert form(Alike(False)) != form(other) and form(nn.Linear(2, 2)) != form(nn.Identity())
    # the same names in the same order, at other depths
    flat, deep = nn.Module(), nn.Module()
    flat.a, flat.b = nn.Module(), nn.Module()
    deep.a = nn.Module()
    deep.a.b = nn.Module()
    assert form(flat) != form(deep)
    model = Alike(True)
    assert repeat.outline(model)[1] == [model, model.a]


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
