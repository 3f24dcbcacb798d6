"""Layers that are skipped (AdapterDrop, Rueckle et al. 2021): as if the adapter had no unit there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import adapterkit as ak
from adapterkit.composition import Average, BatchSplit, Parallel, Route, Stack
from adapterkit.errors import ConfigError, PlanError
from tests.laws.branch_cases import randomise
from tests.laws.composition_cases import METHODS, SetupCase, assert_rows, fields
from tests.laws.matrix import loss, run
from tests.models import tiny
from tests.unit.kit_scene import refused

EVERYWHERE = ("prompt_tuning",)
"""Methods that belong to no layer."""
ROWS = ("bert", "llama", "t5", "vit")


def layer(kit: ak.Kit, number: int) -> str:
    """A layer of the stack that is adapted first."""
    return f"{next(iter(kit.blueprint.stacks))}.{number}"


def twins(row: str, method: str) -> tuple[ak.Kit, str]:
    """Adapters a and b, and beside each one with the same tensors that has no unit at a layer: a_, b_."""
    case = SetupCase(row, tiny.classes(row)[0], method)
    model = case.model()
    for seed, name in enumerate("ab"):
        kit = ak.attach(model, case.config, name=name, seed=seed)
        randomise(kit, name, seed=seed)
        config, left_out = kit[name].config, layer(kit, 0)
        if method not in EVERYWHERE:
            config = leaving_out(config, left_out)
        kit = kit.attach(config, name=f"{name}_", seed=seed)
        given = kit[name].state_dict()
        with torch.no_grad():
            for key, tensor in kit[f"{name}_"].state_dict().items():
                tensor.copy_(given[key])
    return kit, left_out


def leaving_out(config: Any, left_out: str) -> Any:
    """A config that selects no slot of a layer; members of unions that are of no layer stay as they are."""
    if config.method == "union":
        return config.replace(configs=tuple(leaving_out(member, left_out) for member in config.configs))
    return config.replace(leave_out=(left_out,)) if "leave_out" in type(config).model_fields else config


def assert_same(
    kit: ak.Kit, found: Any, expected: Any, skipped: Any, inputs: dict[str, Any], **rows: Any
) -> None:
    with kit.using(expected, **rows):
        wanted = fields(kit, inputs)
    with kit.using(found, skip_layers=skipped, **rows):
        got = fields(kit, inputs)
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("row", [ROWS[0], *(pytest.param(row, marks=pytest.mark.full) for row in ROWS[1:])])
def test_a_layer_that_is_skipped_has_no_unit(row: str, method: str) -> None:
    kit, skipped = twins(row, method)
    inputs = tiny.inputs(row, tiny.classes(row)[0], batch=4)
    with kit.using("a"):
        whole = fields(kit, inputs)
    assert_same(kit, "a", "a_", [skipped], inputs)
    with kit.using("a", skip_layers=[skipped]):
        part = fields(kit, inputs)
    assert any(not torch.equal(whole[name], part[name]) for name in whole) == (method not in EVERYWHERE)
    blocks = [Stack("a", "b"), Parallel("a", "b"), BatchSplit("a", "b", batch_sizes=[1, 3])]
    twin = [Stack("a_", "b_"), Parallel("a_", "b_"), BatchSplit("a_", "b_", batch_sizes=[1, 3])]
    for found, expected in zip(blocks, twin, strict=True):
        assert_same(kit, found, expected, [skipped], inputs)
    if method not in (*EVERYWHERE, "prefix_tuning", "prefix_tuning_flat", "seq_bn_inv", "mam", "unipelt"):
        assert_same(kit, Average("a", "b"), Average("a_", "b_"), [skipped], inputs)
    rows = [1, 0, 0, 1]
    assert_same(kit, Route("a", "b"), Route("a_", "b_"), [skipped], inputs, rows=rows)


@pytest.mark.parametrize("method", ["lora", "seq_bn", "prefix_tuning_flat", "loreft", "compacter", "ia3"])
def test_with_all_layers_skipped_the_model_is_as_it_was(method: str) -> None:
    kit, _ = twins("bert", method)
    inputs = tiny.inputs("bert", "BertModel")
    with kit.disabled():
        plain = run(kit.model, inputs)
    layers = [layer(kit, number) for number in range(2)]
    with kit.using("a", skip_layers=layers):
        assert torch.equal(run(kit.model, inputs), plain)
    kit.activate(Stack("a", "b"), skip_layers=layers)
    assert torch.equal(run(kit.model, inputs), plain)


def test_fused_adapters_are_skipped_together() -> None:
    model = tiny.build("bert", "BertModel")
    for seed, name in enumerate("ab"):
        kit = ak.attach(model, "double_seq_bn[reduction_factor=4]", name=name, seed=seed)
        randomise(kit, name, seed=seed)
        kit = kit.attach("double_seq_bn[reduction_factor=4, leave_out=0]", name=f"{name}_")
        for address, unit in kit[f"{name}_"].units.items():
            unit.load_state_dict(kit[name].units[address].state_dict())
    kit.fuse("a", "b", seed=3).fuse("a_", "b_", seed=4)
    for address, unit in kit["a_+b_"].units.items():
        unit.load_state_dict(kit["a+b"].units[address].state_dict())
    inputs = tiny.inputs("bert", "BertModel", batch=4)
    assert_same(kit, ak.Fuse("a", "b"), ak.Fuse("a_", "b_"), [0], inputs)
    assert_same(kit, Parallel(ak.Fuse("a", "b"), "a"), Parallel(ak.Fuse("a_", "b_"), "a_"), [0], inputs)


def test_what_is_skipped_is_not_trained_in_that_step() -> None:
    kit = ak.attach(tiny.build("bert", "BertModel"), "lora", seed=0)
    inputs = tiny.inputs("bert", "BertModel")
    for skipped, trained in ((0, "encoder.1"), (1, "encoder.0")):
        with kit.using("default", skip_layers=[skipped]):
            loss(kit.model, inputs).backward()
        with_grad = {key for key, p in kit["default"].named_parameters() if p.grad is not None}
        assert with_grad and all(key.startswith(trained) for key in with_grad)
        kit.model.zero_grad()


def test_rows_hold_where_layers_are_skipped() -> None:
    kit, skipped = twins("bert", "lora")
    kit.activate(Parallel("a", "b"), skip_layers=[skipped])
    inputs = tiny.inputs("bert", "BertModel", batch=4)
    both = fields(kit, inputs)["last_hidden_state"]
    for name, rows in (("a", slice(0, 4)), ("b", slice(4, 8))):
        with kit.using(name, skip_layers=[skipped]):
            alone = fields(kit, inputs)["last_hidden_state"]
        torch.testing.assert_close(both[rows], alone, rtol=1e-6, atol=1e-6)
    assert_rows(kit, Parallel("a", "b"), inputs)  # an override skips nothing unless it says so


def test_layers_that_are_not_there() -> None:
    kit, _ = twins("t5", "lora")
    refused(PlanError, "no-such-layer", kit.activate, "a", skip_layers=["encoder.9"])
    refused(PlanError, "ambiguous-layer", kit.activate, "a", skip_layers=[0])
    kit.activate("a", skip_layers=["decoder.0", "encoder.1"])


@pytest.mark.parametrize("layers", [lambda: iter([0]), lambda: (n for n in [0]), lambda: numpy.arange(1)])
def test_what_is_skipped_stays_so_in_files(layers: Any, tmp_path: Path) -> None:
    """An iterator was empty by the time the setup was saved."""
    kit, _ = twins("bert", "lora")
    inputs = tiny.inputs("bert")
    kit.activate("a", [0])
    expected = run(kit.model, inputs)
    kit.activate("a", layers())
    assert torch.equal(run(kit.model, inputs), expected)
    kit.save(tmp_path, setup="a")
    kit.load(tmp_path, replace=True)
    assert torch.equal(run(kit.model, inputs), expected)
    with kit.using("a"):
        assert not torch.equal(run(kit.model, inputs), expected)


def test_a_list_that_changes_later_changes_nothing() -> None:
    kit, _ = twins("bert", "lora")
    inputs, skipped = tiny.inputs("bert"), [0]
    kit.activate("a", skipped)
    expected = run(kit.model, inputs)
    skipped.append(1)
    with kit.using("a", iter([1])):
        second = run(kit.model, inputs)
    with kit.using("a", iter([0])):  # iterators are told apart by what they hold, not by where they lie
        assert torch.equal(run(kit.model, inputs), expected)
    assert not torch.equal(second, expected)
    kit.attach("lora", name="c", activate=False, head=False)
    kit.detach("c")
    assert torch.equal(run(kit.model, inputs), expected)


@pytest.mark.parametrize("layers", [0, None, "encoder.0", [0.0], [True], [None]])
def test_what_names_no_layers(layers: Any) -> None:
    kit, _ = twins("bert", "lora")
    refused(ConfigError, "bad-option", kit.activate, "a", layers)
