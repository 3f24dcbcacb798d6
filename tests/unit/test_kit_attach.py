"""Attaching: atomic, strict, named, seeded, typed."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adapterkit as ak
from adapterkit import members
from adapterkit.errors import CompositionError, ConfigError, NotAttachedError, PlanError
from adapterkit.inject import injector
from tests.models import tiny
from tests.unit.kit_scene import CLS, bert, move, picture, refused, run, trained


class AccidentError(Exception):
    """An accident in the middle of something."""


def breaking(function: Any, at: int) -> Any:
    """The same function, which fails once, after `at` calls."""
    calls = count()

    def wrapped(*args: Any, **options: Any) -> Any:
        if next(calls) == at:
            raise AccidentError
        return function(*args, **options)

    return wrapped


@pytest.mark.parametrize(
    ("room", "name", "at"),
    [
        *((injector, "open_site", at) for at in (0, 1, 5, 12, 13)),  # 12 slots, one head, then the entry
        *((injector, "slug", at) for at in (0, 1, 5, 12, 13)),  # the last is for the manifest
        (members, "open_entries", 0),
        (members, "parameters", 0),
    ],
)
def test_an_attach_that_fails_leaves_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch, room: Any, name: str, at: int
) -> None:
    model = bert()
    model.bert.pooler.requires_grad_(False)
    before, flags, output = picture(model), trained(model), run(model)
    monkeypatch.setattr(room, name, breaking(getattr(room, name), at))
    with pytest.raises(AccidentError):
        ak.attach(model, "lora[targets=all]")
    monkeypatch.undo()
    assert picture(model) == before
    assert trained(model) == flags
    assert torch.equal(run(model), output)
    refused(NotAttachedError, "not-attached", ak.of, model)
    assert list(ak.attach(model, "lora[targets=all]")) == ["default"]


def modules(model: nn.Module) -> dict[str, tuple[type, nn.Module | None]]:
    """Every module and its class; the containers of units and the marks in them may be others."""
    return {
        path: (type(module), None if path.endswith((".adapterkit", ".again")) else module)
        for path, module in model.named_modules()
    }


@pytest.mark.parametrize("at", [0, 1, 5])
def test_a_replacement_that_fails_keeps_the_old_adapter(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    kit = ak.attach(bert(), "lora")
    output = move(kit, "default")
    before = modules(kit.model)
    monkeypatch.setattr(injector, "open_site", breaking(injector.open_site, at))
    with pytest.raises(AccidentError):
        kit.attach("lora[targets=all]", replace=True)
    monkeypatch.undo()
    assert modules(kit.model) == before
    assert torch.equal(run(kit.model), output)
    assert kit.active == "default"


@pytest.mark.parametrize("at", [20, 21])
def test_a_model_with_two_stacks_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    model = tiny.build("bart")
    before = picture(model)
    monkeypatch.setattr(injector, "open_site", breaking(injector.open_site, at))
    with pytest.raises(AccidentError):  # 4 + 8 slots in 2 x 2 layers of q and v: then the two entries
        ak.attach(model, "lora[targets=[q, o, up, down]]")
    assert picture(model) == before


def test_a_second_adapter_that_fails_leaves_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    kit = ak.attach(bert(), "lora", name="a")
    output = move(kit, "a")
    before = picture(kit.model)
    monkeypatch.setattr(injector, "open_site", breaking(injector.open_site, 3))
    with pytest.raises(AccidentError):
        kit.attach("ia3", name="b")
    assert picture(kit.model) == before
    assert list(kit) == ["a"]
    assert torch.equal(run(kit.model), output)


@pytest.mark.parametrize("replace", [False, True])
def test_a_load_of_several_that_fails_leaves_the_kit_as_it_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, replace: bool
) -> None:
    other = ak.attach(bert(), "lora[r=4]", name="a")
    other.attach("ia3", name="b")
    other.model.save_pretrained(tmp_path)
    kit = ak.attach(bert(), "lora", name="a" if replace else "z")
    old = dict(kit)
    output = move(kit, next(iter(kit)))
    before = modules(kit.model)
    # the second of the two, and not what is put back afterwards
    monkeypatch.setattr(members, "inject", breaking(members.inject, 1))
    with pytest.raises(AccidentError):
        kit.load(tmp_path, replace=replace)
    monkeypatch.undo()
    assert modules(kit.model) == before
    assert dict(kit) == old
    assert kit.active == next(iter(old))
    assert torch.equal(run(kit.model), output)


def test_a_host_that_another_library_wrapped_is_refused() -> None:
    model = bert()
    host = model.bert.encoder.layer[1].attention.self.value
    host.forward = host.forward
    before = picture(model)
    refused(PlanError, "wrapped-forward", ak.attach, model, "lora")
    assert picture(model) == before


def test_detach_refuses_to_pull_a_site_from_under_a_wrapper_and_changes_nothing() -> None:
    kit = ak.attach(bert(), "lora")
    output = move(kit, "default")
    host = kit.model.bert.encoder.layer[1].attention.self.value
    host.forward = host.forward
    refused(PlanError, "wrapped-on-top", kit.detach)
    assert torch.equal(run(kit.model), output)
    del host.forward
    kit.detach()
    refused(NotAttachedError, "not-attached", ak.of, kit.model)


@pytest.mark.parametrize(
    ("method", "code", "says"),
    [
        ("lora[targets=[q, vv]]", "no-such-role", "did you mean 'v'?"),
        ("lora[targets=gate]", "no-such-role", "targets here: q, k, v, o, up, down"),
        ("lora[targets=encoder.0.attention.qq]", "no-such-slot", "did you mean 'encoder.0.attention.q'?"),
        ("lora[layers=2]", "no-such-layer", "layers: encoder.0 to encoder.1"),
        ("lora[layers=-3]", "no-such-layer", "there is no layer 'encoder.-3'"),
        ("lora[layers=encoder.7]", "no-such-layer", "there is no layer 'encoder.7'"),
        ("lora[leave_out=[0, 1]]", "nothing-selected", "no slot is left to adapt"),
        ("lora[targets=[]]", "nothing-selected", "no slot is left to adapt"),
    ],
)
def test_what_the_model_has_not_is_an_error(method: str, code: str, says: str) -> None:
    model = bert()
    before = picture(model)
    assert says in str(refused(PlanError, code, ak.attach, model, method))
    assert picture(model) == before


def test_a_number_is_no_layer_of_a_model_with_two_stacks() -> None:
    model = tiny.build("t5")
    error = refused(PlanError, "ambiguous-layer", ak.attach, model, "lora[layers=0]")
    assert "the model has the stacks encoder, decoder" in str(error)
    assert "an address such as 'encoder.0'" in str(error)
    kit = ak.attach(model, "lora[layers=[decoder.1]]")
    assert {slot.address.rpartition(".")[0] for slot in kit["default"].plan.slots} == {
        "decoder.1.attention",
        "decoder.1.cross_attention",
    }


def test_strict_false_attaches_what_exists_and_lists_the_rest() -> None:
    kit = ak.attach(bert(), "lora[targets=[q, gate, vv]]", strict=False)
    plan = kit["default"].plan
    assert [slot.address for slot in plan.slots] == ["encoder.0.attention.q", "encoder.1.attention.q"]
    assert [(problem.code, problem.address) for problem in plan.missing] == [
        ("no-such-role", "gate"),
        ("no-such-role", "vv"),
    ]
    refused(PlanError, "no-such-role", ak.attach, bert(), "lora[targets=[gate]]", strict=False)


@pytest.mark.parametrize("name", ["sst2", "a-b_C9", "train", "forward", "type", "0", "_"])
def test_names_that_modules_of_torch_would_refuse(name: str) -> None:
    kit = ak.attach(bert(), "lora", name=name)
    assert list(kit) == [name]
    move(kit, name)
    assert not torch.equal(run(kit.model), run(bert()))


@pytest.mark.parametrize("name", ["", "a b", "a.b", "ä", "a/b", "a\n", None, 3])
def test_names_that_are_refused(name: Any) -> None:
    model = bert()
    refused(ConfigError, "bad-name", ak.attach, model, "lora", name=name)
    refused(NotAttachedError, "not-attached", ak.of, model)


def test_a_name_that_is_taken_is_refused_or_replaced() -> None:
    kit = ak.attach(bert(), "lora", name="a")
    refused(ConfigError, "name-taken", kit.attach, "ia3", name="a")
    assert kit["a"].config.method == "lora"
    assert kit.attach("ia3", name="a", replace=True) is kit
    assert kit["a"].config.method == "ia3"
    assert not any(key.endswith(".A") for key in kit.model.state_dict())
    kit.attach("dora", name="new", replace=True)
    assert list(kit) == ["a", "new"]


def test_a_seed_gives_the_same_weights_and_leaves_the_generator_of_torch_alone() -> None:
    def tensors(**options: Any) -> dict[str, torch.Tensor]:
        return ak.attach(bert(cls="BertModel"), "vera[r=4]", **options)["default"].state_dict()

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = tensors(seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert all(torch.equal(first[key], value) for key, value in tensors(seed=5).items())
    assert not torch.equal(first["shared.A"], tensors(seed=6)["shared.A"])
    half = tensors(seed=5, dtype="bfloat16")
    assert all(torch.equal(first[key].bfloat16(), value) for key, value in half.items())
    torch.manual_seed(2)
    unseeded = tensors()
    torch.manual_seed(2)
    assert torch.equal(unseeded["shared.A"], tensors()["shared.A"])


@pytest.mark.parametrize("method", ["lora", "ia3", "vera[r=4]", "dora", "dvora[r=4]", "mtl_lora"])
@pytest.mark.parametrize(
    ("given", "found"),
    [("match", torch.bfloat16), ("float32", torch.float32), (torch.float64, torch.float64)],
)
def test_dtype(method: str, given: Any, found: torch.dtype) -> None:
    model = bert(dtype=torch.bfloat16)
    before = run(model)
    kit = ak.attach(model, method, dtype=given, head=False)
    assert {tensor.dtype for tensor in kit["default"].parameters()} == {found}
    assert torch.equal(run(model), before)
    after = move(kit, "default")
    assert after.dtype == torch.bfloat16
    assert not torch.equal(after, before)


@pytest.mark.parametrize("dtype", ["flot32", "int8", torch.int8, "Tensor", 3])
def test_types_that_are_refused(dtype: Any) -> None:
    refused(PlanError, "bad-dtype", ak.attach, bert(), "lora", dtype=dtype)


@pytest.mark.parametrize("seed", ["0", 1.5, 2**64])
def test_seeds_that_are_refused(seed: Any) -> None:
    refused(ConfigError, "bad-option", ak.attach, bert(), "lora", seed=seed)
    kit = ak.attach(bert(), "lora")
    refused(ConfigError, "bad-option", kit.average, ["default"], name="mean", strategy="dare", seed=seed)


def test_a_word_for_heads_that_means_nothing_is_refused(tmp_path: Path) -> None:
    wanted: Any = "yes"
    refused(ConfigError, "bad-option", ak.attach, bert(), "lora", head=wanted)
    refused(ConfigError, "bad-option", ak.plan, bert(), "lora", head=wanted)
    kit = ak.attach(bert(), "lora")
    refused(ConfigError, "bad-option", kit.save, tmp_path / "a", head=wanted)
    kit.save(tmp_path / "a")
    refused(ConfigError, "bad-option", ak.load, bert(), tmp_path / "a", head=wanted)


@pytest.mark.parametrize("method", ["prompt_tuning", "invertible"])
def test_stacks_that_are_not_there_are_refused(method: str) -> None:
    for stacks in ("decodr", ["encoder", "decodr"]):
        refused(PlanError, "unknown-stack", ak.attach, bert(), {"method": method, "stacks": stacks})
    assert len(ak.plan(bert(), {"method": method, "stacks": "encoder"}).slots) == 1
    code = "nothing-selected" if method == "prompt_tuning" else "no-embeddings"
    refused(PlanError, code, ak.attach, bert(), {"method": method, "stacks": []})


def test_not_active_and_not_trainable() -> None:
    model = bert()
    before = run(model)
    kit = ak.attach(model, "lora", activate=False, trainable=False)
    assert kit.active is None
    assert trained(model) == []
    assert not torch.equal(move(kit, "default"), before)
    assert torch.equal(run(model), before)


def test_the_handle_is_found_again_through_wrappers() -> None:
    model = bert()
    refused(NotAttachedError, "not-attached", ak.of, model)
    kit = ak.attach(nn.DataParallel(model), "lora")
    compiled = torch.compile(model, backend="eager")
    for wrapped in (model, nn.DataParallel(model), compiled, nn.DataParallel(compiled)):
        assert ak.of(wrapped) is kit
    assert kit.model is model
    refused(NotAttachedError, "not-attached", ak.of, nn.Sequential(model))
    assert ak.attach(compiled, "ia3", name="b") is kit


def test_the_class_and_the_methods_of_the_model_stay_its_own() -> None:
    model = bert()
    kind, own = type(model), set(vars(model))
    ak.attach(model, "lora")
    assert type(model) is kind
    assert not any(callable(vars(model)[name]) and name[0] != "_" for name in set(vars(model)) - own)


def test_another_interface_is_refused_while_adapters_are_attached() -> None:
    kit = ak.attach(bert(), "lora")
    refused(PlanError, "other-interface", ak.attach, kit.model, "lora", name="b", interface="llama")
    assert ak.attach(kit.model, "lora", name="b", interface="bert") is kit


def test_a_kit_without_adapters_can_be_used_again() -> None:
    kit = ak.attach(bert(), "lora")
    kit.detach()
    assert len(kit) == 0
    kit.attach("ia3")
    assert ak.of(kit.model) is kit
    assert kit.active == "default"


def test_detach_gives_back_the_flags_of_the_last_attach() -> None:
    model = tiny.build("gpt2", "GPT2LMHeadModel")
    assert model.lm_head.weight is model.transformer.wte.weight
    everything = trained(model)
    kit = ak.attach(model, "lora")
    kit.detach()
    assert trained(model) == everything
    model.transformer.wte.requires_grad_(False)
    some = trained(model)
    kit.attach("lora").detach()
    assert trained(model) == some


@pytest.mark.parametrize("method", ["lora", "seq_bn", "par_bn", "prefix_tuning", "prompt_tuning", "loreft"])
def test_units_are_on_the_device_of_what_they_stand_beside(method: str) -> None:
    """A branch often ends in a dropout, which has no tensor of its own. The meta device stands for a GPU."""
    kit = ak.attach(tiny.build("bert").to("meta"), method)
    assert {parameter.device.type for parameter in kit["default"].parameters()} == {"meta"}


def test_a_kit_is_a_mapping_also_in_its_errors_and_its_order() -> None:
    kit = ak.attach(bert(), "lora", name="a")
    kit.attach("lora", name="b").attach("lora[r=2]", name="a", replace=True)
    assert list(kit) == ["a", "b"] and kit["a"].config.r == 2
    with pytest.raises(KeyError) as caught:
        kit["c"]
    assert str(caught.value).startswith("error[no-such-adapter]")
    refused(NotAttachedError, "no-such-adapter", kit.train, ["a", "b"])


def test_a_replacement_that_fails_keeps_the_order_too(monkeypatch: pytest.MonkeyPatch) -> None:
    kit = ak.attach(bert(), "lora", name="a").attach("lora", name="b")
    monkeypatch.setattr(injector, "open_site", breaking(injector.open_site, 1))
    with pytest.raises(AccidentError):
        kit.attach("lora[r=2]", name="a", replace=True)
    assert list(kit) == ["a", "b"]


@pytest.mark.parametrize(
    "call", [ak.of, lambda model: ak.attach(model, "lora"), lambda m: ak.plan(m, "lora")]
)
@pytest.mark.parametrize("model", [None, "bert"])
def test_what_is_no_model_is_refused(call: Any, model: Any) -> None:
    refused(ConfigError, "not-a-module", call, model)


def test_an_adapter_is_cast_to_a_type_by_name() -> None:
    kit = ak.attach(bert(), "lora", name="a", head=False).to("a", dtype="torch.bfloat16")
    assert {tensor.dtype for tensor in kit["a"].parameters()} == {torch.bfloat16}
    refused(PlanError, "bad-dtype", kit.to, "a", dtype="int8")


@pytest.mark.parametrize("method", ["seq_bn[use_gating=true]", "prompt_tuning|seq_bn[use_gating=true]"])
@pytest.mark.parametrize("loaded", [False, True])
def test_a_replacement_that_the_active_setup_cannot_have(method: str, loaded: bool, tmp_path: Path) -> None:
    """It is put in first and refused then: all is as it was, and acts."""
    kit = ak.attach(bert(), "seq_bn", name="a", head=False, seed=1)
    kit.attach("seq_bn", name="b", head=False, seed=2)
    length = tiny.inputs("bert", CLS)["input_ids"].shape[1]
    kit.activate(ak.Split("a", "b", splits=[3, length - 3]))
    move(kit, "a", 1)
    move(kit, "b", 2)
    names, expected = list(kit), run(kit.model)
    classes = {path: type(module) for path, module in kit.model.named_modules()}
    tensors = {key: tensor.clone() for key, tensor in kit.model.state_dict().items()}
    options: dict[str, Any] = {"name": "b", "replace": True, "activate": False, "head": False}
    if loaded:
        source = ak.attach(bert(), method, name="b", head=False).save(tmp_path)
        refused(CompositionError, "undefined-block", kit.load, source, **options)
    else:
        refused(CompositionError, "undefined-block", kit.attach, method, **options)
    assert list(kit) == names and torch.equal(run(kit.model), expected)
    assert {path: type(module) for path, module in kit.model.named_modules()} == classes
    found = kit.model.state_dict()
    assert found.keys() == tensors.keys() and all(torch.equal(found[key], tensors[key]) for key in found)


@pytest.mark.parametrize("method", ["seq_bn", "mam", "prompt_tuning", "loreft", "compacter", "seq_bn_inv"])
def test_a_seed_leaves_the_generator_of_torch_alone_also_where_torch_makes_the_modules(method: str) -> None:
    model = bert(hidden_size=256, num_attention_heads=4)
    state = torch.get_rng_state()
    ak.attach(model, method, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
