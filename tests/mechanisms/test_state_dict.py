"""Adapter tensors are in the model's state dict: checkpoints of every kind load right, or are refused."""

from __future__ import annotations

import pytest
import torch

import adapterkit as ak
from adapterkit.errors import FileFormatError, PlanError
from tests.mechanisms.scene import METHODS, attach, run, same, tensors
from tests.models import tiny

CLS = "BertForSequenceClassification"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("row", ["bert", "gpt2", "t5"])
def test_a_checkpoint_with_adapters_comes_back(row: str, method: str) -> None:
    given = tiny.inputs(row)
    trained, fresh = tiny.build(row, seed=1), tiny.build(row, seed=2)
    source, target = attach(trained, method, seed=1), attach(fresh, method, seed=2)
    assert not same(tensors(source), tensors(target))
    fresh.load_state_dict(trained.state_dict(), strict=True)
    assert same(tensors(source), tensors(target)) and torch.equal(run(trained, given), run(fresh, given))


def test_a_checkpoint_of_the_base_leaves_the_adapters_alone() -> None:
    other, model = tiny.build("bert", seed=1), tiny.build("bert", seed=2)
    kit = attach(model)
    before = tensors(kit)
    result = model.load_state_dict(other.state_dict(), strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    assert same(tensors(kit), before)
    kit.detach()
    assert same(model.state_dict(), other.state_dict())


def test_a_checkpoint_with_adapters_gives_a_plain_model_its_base() -> None:
    model, plain = tiny.build("bert", seed=1), tiny.build("bert", seed=2)
    base = {key: value.clone() for key, value in model.state_dict().items()}
    attach(model)
    result = plain.load_state_dict(model.state_dict(), strict=False)
    assert not result.missing_keys and all(".adapterkit." in key for key in result.unexpected_keys)
    assert same(plain.state_dict(), base)


def test_keys_of_the_base_are_kept() -> None:
    model = tiny.build("bert", CLS)
    base = list(model.state_dict())
    attach(model)
    assert [key for key in model.state_dict() if ".adapterkit." not in key] == base


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("method", "name", "code"),
    [
        ("lora", "b", "missing-tensors"),  # another name: some lack, some are too many
        ("ia3", "a", "missing-tensors"),
        ("lora[targets=q]", "a", "missing-tensors"),
        ("lora[targets=q+k+v]", "a", "unknown-tensors"),
    ],
)
def test_a_checkpoint_with_other_adapters_is_refused(method: str, name: str, code: str, strict: bool) -> None:
    if "+" in method:
        method = {"method": "lora", "targets": ["q", "k", "v"]}
    other, model = tiny.build("bert", seed=1), tiny.build("bert", seed=2)
    attach(other, method, name)
    kit = attach(model)
    given, before, base = tiny.inputs("bert"), tensors(kit), model.state_dict()
    base = {key: value.clone() for key, value in base.items()}
    out = run(model, given)
    with pytest.raises(FileFormatError) as error:
        model.load_state_dict(other.state_dict(), strict=strict)
    assert code in {problem.code for problem in error.value.problems}
    assert same(tensors(kit), before) and same(model.state_dict(), base)
    assert torch.equal(run(model, given), out)


def test_a_part_of_a_checkpoint_with_adapters_is_refused() -> None:
    model = tiny.build("bert")
    attach(model)
    state = model.state_dict()
    state.pop(next(key for key in state if key.endswith(".B")))
    with pytest.raises(FileFormatError, match="lacks tensors"):
        model.load_state_dict(state, strict=False)


def test_renamed_modules_do_not_matter() -> None:
    """As libraries do when they save: what follows `adapterkit.` finds its place by itself."""
    trained, fresh = tiny.build("bert", seed=1), tiny.build("bert", seed=1)
    source, target = attach(trained, seed=1), attach(fresh, seed=2)
    renamed = {
        f"renamed.{key.replace('.layer.', '.blocks.')}": value for key, value in trained.state_dict().items()
    }
    fresh.load_state_dict(renamed, strict=False)
    assert same(tensors(source), tensors(target))


def test_prefixes_of_wrappers() -> None:
    trained, fresh = tiny.build("bert", seed=1), tiny.build("bert", seed=1)
    source, target = attach(trained, seed=1), attach(fresh, seed=2)
    compiled = torch.compile(trained, backend="eager")
    torch.compile(fresh, backend="eager").load_state_dict(compiled.state_dict())
    assert same(tensors(source), tensors(target))


def test_assign() -> None:
    given = tiny.inputs("bert")
    trained, fresh = tiny.build("bert", seed=1), tiny.build("bert", seed=2)
    source, target = attach(trained, "vera[r=4]", seed=1), attach(fresh, "vera[r=4]", seed=2)
    fresh.load_state_dict(trained.state_dict(), assign=True)
    assert same(tensors(source), tensors(target)) and torch.equal(run(trained, given), run(fresh, given))


@pytest.mark.parametrize("method", ["vera[r=4]", "dvora[r=4]"])
def test_shared_tensors_are_there_once(method: str) -> None:
    model = tiny.build("llama")
    kit = attach(model, method)
    own = {key: value for key, value in model.state_dict().items() if ".adapterkit." in key}
    kind = {key.rpartition(".")[2] for key in own}
    assert [key.rpartition(".")[2] for key in own if key.endswith((".A", ".B"))] == ["A", "B"]
    assert {"A", "B", "d", "b"} <= kind
    shared = [p for p in model.parameters() if p is kit["a"].shared.A]
    assert len(shared) == 1 and not shared[0].requires_grad
    assert len({value.data_ptr() for value in own.values()}) == len(own)


def test_every_key_of_an_adapter_is_unique_after_the_mark() -> None:
    model = tiny.build("encoder_decoder")
    attach(model, "lora[targets=all,r=2]", "a")
    attach(model, "dora[r=2]", "b")
    parts = [key.rpartition(".adapterkit.")[2] for key in model.state_dict() if ".adapterkit." in key]
    assert len(parts) == len(set(parts)) and all(part.count(".") <= 1 for part in parts)


def test_the_state_of_a_merged_model_is_refused() -> None:
    model = tiny.build("bert")
    kit = attach(model)
    kit.merge("a")
    with pytest.raises(PlanError) as error:
        model.state_dict()
    assert error.value.code == "merged"
    kit.unmerge()
    assert model.state_dict()


def test_nothing_is_loaded_into_merged_weights() -> None:
    """`unmerge` would put the weights back that were there before."""
    model = tiny.build("bert")
    weights = {key: value.clone() for key, value in tiny.build("bert", seed=3).state_dict().items()}
    kit = ak.attach(model, "lora").merge("default")
    with pytest.raises(PlanError) as caught:
        model.load_state_dict(weights)
    assert caught.value.code == "merged"
    kit.unmerge()
    model.load_state_dict(weights)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())


@pytest.mark.parametrize("row", ["bert", "t5"])
@pytest.mark.parametrize("method", ["lora", "seq_bn", "seq_bn_inv", "loreft[r=2]", "unipelt"])
def test_weights_are_not_drawn_anew_by_the_model(method: str, row: str) -> None:
    model = tiny.build(row)
    kit = attach(model, method)
    before, plain = tensors(kit), {key: value.clone() for key, value in model.state_dict().items()}
    model.init_weights()
    assert same(before, tensors(kit)) and same(plain, model.state_dict())
