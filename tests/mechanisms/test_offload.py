"""accelerate's offloading, and other libraries that replace the forward of a module on the instance."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adapterkit as ak
from adapterkit.errors import FileFormatError
from tests.mechanisms.scene import METHODS, attach, gradients, run
from tests.models import tiny

accelerate = pytest.importorskip("accelerate")

ROWS = ("bert", "gpt2", "llama")
CPU = torch.device("cpu")
WITHOUT_SHARED = ("lora", "ia3", "dora")


def reference(row: str, method: str) -> torch.Tensor:
    model = tiny.build(row)
    attach(model, method)
    return run(model, tiny.inputs(row))


def offloaded(model: nn.Module) -> nn.Module:
    return accelerate.cpu_offload(model, execution_device=CPU)


@pytest.mark.parametrize("method", ["lora", "ia3"])
@pytest.mark.parametrize("row", ROWS)
def test_offload_then_attach(row: str, method: str) -> None:
    model, given = tiny.build(row), tiny.inputs(row)
    bare = run(model, given)
    weight = next(p for p in offloaded(model).parameters())
    assert weight.is_meta
    kit = attach(model, method)
    adapted = reference(row, method)
    assert torch.equal(run(model, given), adapted) and not torch.allclose(adapted, bare, atol=1e-2)
    kit.activate(None)
    assert torch.equal(run(model, given), bare)
    kit.detach()
    assert torch.equal(run(model, given), bare) and "adapterkit" not in str(model)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert torch.equal(run(model, given), bare)


@pytest.mark.parametrize("row", ROWS)
def test_training_while_the_base_is_offloaded(row: str) -> None:
    given = tiny.inputs(row)
    plain, model = tiny.build(row), tiny.build(row)
    offloaded(model)
    attach(plain)
    attach(model)
    expected, found = gradients(plain, given), gradients(model, given)
    for key, gradient in expected.items():
        assert gradient is not None and gradient.any() and torch.allclose(found[key], gradient, atol=1e-5), (
            key
        )


@pytest.mark.parametrize("method", WITHOUT_SHARED)
@pytest.mark.parametrize("row", ROWS)
def test_attach_then_offload(row: str, method: str) -> None:
    model, given = tiny.build(row), tiny.inputs(row)
    bare = run(model, given)
    kit = attach(model, method)
    adapted = run(model, given)
    offloaded(model)
    assert torch.equal(run(model, given), adapted)
    with kit.disabled():
        assert torch.equal(run(model, given), bare)
    kit.detach()
    assert torch.equal(run(model, given), bare) and "adapterkit" not in str(model)


@pytest.mark.parametrize(
    "method", ["adapterplus", "seq_bn_inv", "double_seq_bn", "prefix_tuning", "loreft", "unipelt"]
)
def test_methods_that_read_what_the_model_keeps_away(method: str) -> None:
    """A bottleneck in a post-norm model calls the model's own norm, whose weights are offloaded too."""
    model, given = tiny.build("bert"), tiny.inputs("bert")
    kit = attach(model, method)
    adapted = run(model, given)
    offloaded(model)
    torch.testing.assert_close(run(model, given), adapted, rtol=1e-5, atol=1e-6)
    assert all(p.is_meta for p in model.encoder.layer[0].output.LayerNorm.parameters(recurse=False))
    kit.detach()

    model = tiny.build("bert")
    offloaded(model)
    attach(model, method)
    torch.testing.assert_close(run(model, given), adapted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("row", ["bert", "llama", "t5"])
def test_a_prompt_stays_beside_the_model_or_is_refused(row: str) -> None:
    given, method = tiny.inputs(row), "prompt_tuning[prompt_length=3]"
    model = tiny.build(row)
    kit = attach(model, method)
    adapted = run(model, given)
    offloaded(model)
    with pytest.raises(ak.errors.PlanError) as refused:
        run(model, given)
    assert refused.value.code == "prompt-away"
    with kit.disabled():
        assert torch.equal(run(model, given), run(tiny.build(row), given))

    model = tiny.build(row)
    offloaded(model)
    attach(model, method)
    torch.testing.assert_close(run(model, given), adapted, rtol=1e-5, atol=1e-6)


def test_several_adapters_on_one_host_and_offload() -> None:
    """accelerate's hook of a unit must not move the host, with it the units that are away just now."""
    model, given = tiny.build("bert"), tiny.inputs("bert")
    kit = attach(model, "lora", "a", seed=1)
    attach(model, "dora", "b", seed=2)
    serial = []
    for name in ("a", "b"):
        kit.activate(name)
        serial.append(run(model, given))
    offloaded(model)
    for name, expected in zip(("a", "b"), serial, strict=True):
        kit.activate(name)
        assert torch.equal(run(model, given), expected)


def test_adapters_that_were_offloaded_themselves_do_not_train_and_verify_says_so() -> None:
    model, given = tiny.build("bert"), tiny.inputs("bert")
    kit = attach(model)
    assert kit.verify(**given).ok
    offloaded(model)
    assert not kit.verify(**given).alive


@pytest.mark.parametrize("method", ["vera[r=4]", "dvora[r=4]"])
def test_shared_tensors_and_offloading_exclude_each_other(method: str) -> None:
    model, given = tiny.build("bert"), tiny.inputs("bert")
    bare = run(model, given)
    offloaded(model)
    with pytest.raises(ak.errors.PlanError) as error:
        ak.attach(model, method)
    assert error.value.code == "shared-apart"
    assert torch.equal(run(model, given), bare) and "adapterkit" not in str(model)

    model = tiny.build("bert")
    attach(model, method)
    offloaded(model)
    with pytest.raises(ak.errors.PlanError) as error:
        run(model, given)
    assert error.value.code == "shared-apart"


def test_weights_that_are_away_cannot_be_read() -> None:
    model = tiny.build("bert")
    offloaded(model)
    with pytest.raises(ak.errors.PlanError) as error:
        ak.attach(model, "dora")
    assert error.value.code == "weight-unreadable"
    kit = attach(model)
    with pytest.raises(ak.errors.PlanError) as error:
        kit.merge("a")
    assert error.value.code == "cannot-merge"


def wrap(module: nn.Module) -> None:
    """What many libraries do: hide the forward of the class behind one on the instance."""
    original = module.forward

    @functools.wraps(original)
    def forward(*args: object, **kwargs: object) -> object:
        return original(*args, **kwargs)

    module.forward = forward


@pytest.mark.parametrize("path", ["encoder.layer.1.attention.self.value", "encoder.layer.0"])
def test_a_forward_that_was_replaced_before_is_refused(path: str) -> None:
    model, given = tiny.build("bert"), tiny.inputs("bert")
    bare, keys = run(model, given), list(model.state_dict())
    wrap(model.get_submodule(path))
    with pytest.raises(ak.errors.PlanError, match=path) as error:
        ak.attach(model, "lora")
    assert error.value.code == "wrapped-forward"
    assert torch.equal(run(model, given), bare) and list(model.state_dict()) == keys
    assert "adapterkit" not in str(model) and all(p.requires_grad for p in model.parameters())
    del model.get_submodule(path).forward
    attach(model)
    assert not torch.equal(run(model, given), bare)


@pytest.mark.parametrize("path", ["encoder.layer.1.attention.self.value", "encoder.layer.0"])
@pytest.mark.parametrize("how", ["all", "one"])
def test_a_forward_that_was_replaced_after_attach_keeps_detach_from_tearing_it(path: str, how: str) -> None:
    model, given = tiny.build("bert"), tiny.inputs("bert")
    bare = run(model, given)
    kit = attach(model)
    adapted = run(model, given)
    wrap(model.get_submodule(path))
    assert torch.equal(run(model, given), adapted)
    with pytest.raises(ak.errors.PlanError, match=path) as error:
        kit.detach("a" if how == "one" else None)
    assert error.value.code == "wrapped-on-top"
    assert torch.equal(run(model, given), adapted) and list(kit) == ["a"] and ak.of(model) is kit
    del model.get_submodule(path).forward
    kit.detach()
    assert torch.equal(run(model, given), bare) and "adapterkit" not in str(model)


def test_a_class_that_was_swapped_on_top_keeps_detach_from_tearing_it() -> None:
    model = tiny.build("bert")
    kit = attach(model)
    host = model.encoder.layer[0].attention.self.query
    host.__class__ = type("Theirs", (type(host),), {})
    with pytest.raises(ak.errors.PlanError) as error:
        kit.detach()
    assert error.value.code == "wrapped-on-top" and list(kit) == ["a"]


@pytest.mark.parametrize("method", METHODS)
def test_device_map_of_one_device(method: str) -> None:
    """Hooks that only move inputs, as `device_map` sets them, are no obstacle."""
    model, given = tiny.build("bert"), tiny.inputs("bert")
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    attach(model, method)
    assert torch.equal(run(model, given), reference("bert", method))


@pytest.mark.parametrize(
    ("first", "form"), [("attach", "adapterkit"), ("offload", "adapterkit"), ("offload", "peft")]
)
def test_what_is_offloaded_is_saved_with_its_numbers(first: str, form: Any, tmp_path: Path) -> None:
    cls = "BertForSequenceClassification"
    model = tiny.build("bert", cls).eval()
    if first == "offload":
        accelerate.cpu_offload(model, "cpu")
    kit = ak.attach(model, "lora")
    if first == "attach":
        with torch.no_grad():
            for tensor in kit["default"].parameters():
                tensor.add_(0.1)
        accelerate.cpu_offload(model, "cpu")
    with torch.no_grad():
        expected = model(**tiny.inputs("bert", cls)).logits
        fresh = tiny.build("bert", cls).eval()
        ak.load(fresh, kit.save(tmp_path, format=form))
        torch.testing.assert_close(fresh(**tiny.inputs("bert", cls)).logits, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", ["adapterkit", "peft"])
def test_what_was_never_loaded_is_not_saved(form: Any, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = tiny.build("bert")
    kit = ak.attach(model, "lora")
    with pytest.raises(FileFormatError) as caught:
        kit.save(tmp_path / "a", format=form)
    assert caught.value.code == "weight-unreadable" and not (tmp_path / "a").exists()
