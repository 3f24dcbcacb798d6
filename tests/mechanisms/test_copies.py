"""deepcopy, pickle, torch.save and torch.export of an adapted model."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

import adapterkit as ak
from tests.mechanisms.scene import FEW, METHODS, attach, run, same, tensors
from tests.models import tiny

Copier = Callable[[nn.Module], nn.Module]


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def _saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


copies = pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled, _saved])


@copies
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("row", ["bert", "gpt2"])
def test_a_copy_is_equal_and_works_alone(row: str, method: str, duplicate: Copier) -> None:
    model, given = tiny.build(row), tiny.inputs(row)
    bare = run(model, given)
    kit = attach(model, method)
    adapted, before = run(model, given), tensors(kit)
    twin = duplicate(model)
    other = ak.of(twin)
    assert other is not kit and other.model is twin and other.active == "a"
    assert torch.equal(run(twin, given), adapted) and same(tensors(other), before)

    with torch.no_grad():
        for parameter in other["a"].parameters():
            parameter.add_(1)
    assert not torch.allclose(run(twin, given), adapted, atol=1e-2)
    assert torch.equal(run(model, given), adapted) and same(tensors(kit), before)

    other.activate(None)
    assert torch.equal(run(twin, given), bare) and torch.equal(run(model, given), adapted)
    other.detach()
    assert torch.equal(run(twin, given), bare) and torch.equal(run(model, given), adapted)
    assert "adapterkit" not in str(twin) and type(twin) is type(model)
    with pytest.raises(ak.errors.NotAttachedError):
        ak.of(twin)
    kit.detach()
    assert torch.equal(run(model, given), bare)


@copies
def test_a_copy_takes_further_adapters_and_checkpoints(duplicate: Copier) -> None:
    model, given = tiny.build("bert"), tiny.inputs("bert")
    kit = attach(model)
    twin = duplicate(model)
    attach(twin, "ia3", "b")
    assert set(ak.of(twin)) == {"a", "b"} and set(kit) == {"a"}
    ak.of(twin).detach("b")
    ak.of(twin).activate("a")
    changed = {key: value + 1 for key, value in model.state_dict().items() if "__manifest" not in key}
    twin.load_state_dict(changed, strict=False)
    model.load_state_dict(changed, strict=False)
    assert torch.equal(run(twin, given), run(model, given))


@copies
def test_a_copy_of_a_merged_model_can_be_unmerged(duplicate: Copier) -> None:
    model, given = tiny.build("bert"), tiny.inputs("bert")
    bare = run(model, given)
    kit = attach(model)
    kit.merge("a")
    twin = duplicate(model)
    assert torch.equal(run(twin, given), run(model, given))
    ak.of(twin).detach()
    assert torch.equal(run(twin, given), bare) and not torch.equal(run(model, given), bare)


@copies
def test_a_copy_made_while_another_adapter_is_used_has_the_default(duplicate: Copier) -> None:
    model, given = tiny.build("bert"), tiny.inputs("bert")
    kit = attach(model, name="a", seed=1)
    attach(model, name="b", seed=2)
    kit.activate("a")
    adapted = run(model, given)
    with kit.using("b"):
        twin = duplicate(model)
        assert ak.of(twin).active == "a" and torch.equal(run(twin, given), adapted)
        assert not torch.equal(run(model, given), adapted)


@copies
def test_a_layer_that_was_compiled_in_place_can_be_copied(duplicate: Copier) -> None:
    model, given = tiny.build("bert"), tiny.inputs("bert")
    attach(model)
    model.encoder.layer[0].compile(backend="eager")
    model.encoder.layer[1].attention.self.query.compile(backend="eager")
    assert torch.equal(run(duplicate(model), given), run(model, given))


@pytest.mark.parametrize("method", FEW)
@pytest.mark.parametrize("row", ["bert", "llama", "gpt2"])
def test_export(row: str, method: str) -> None:
    without_cache = {} if row == "bert" else {"use_cache": False}
    model, given = tiny.build(row, **without_cache), tiny.inputs(row)
    bare = run(model, given)
    attach(model, method)
    exported = torch.export.export(model, (), given).module()
    assert torch.allclose(run(exported, given), run(model, given), atol=1e-5)
    assert not torch.allclose(run(exported, given), bare, atol=1e-2)
