"""Which adapter acts, which is trained, which is merged: three separate switches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import adapterkit as ak
from adapterkit import merging
from adapterkit.errors import CompositionError, NotAttachedError, PlanError
from tests.unit.kit_scene import INPUTS, bert, move, picture, refused, run, trained


@pytest.fixture
def base() -> Tensor:
    return run(bert())


@pytest.fixture
def kit() -> ak.Kit:
    """Three adapters on one model; the last one acts."""
    kit = ak.attach(bert(), "lora", name="a", seed=1)
    return kit.attach("ia3", name="b").attach("dora[targets=[q, up]]", name="c", seed=2)


@pytest.fixture
def outputs(kit: ak.Kit) -> dict[str, Tensor]:
    """What each adapter gives; all different."""
    found = {name: move(kit, name, seed) for seed, name in enumerate(kit)}
    values = list(found.values())
    assert not any(torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])
    return found


def test_a_kit_is_a_read_only_mapping(kit: ak.Kit) -> None:
    assert list(kit) == ["a", "b", "c"]
    assert len(kit) == 3
    assert "a" in kit and "d" not in kit and 3 not in kit
    assert [adapter.name for adapter in kit.values()] == ["a", "b", "c"]
    assert dict(kit)["b"] is kit["b"]
    assert kit.get("d") is None
    assert kit == kit and kit != ak.attach(bert(), "lora", name="a")
    assert {kit: 1}[kit] == 1
    assert "did you mean 'a'?" in str(refused(NotAttachedError, "no-such-adapter", kit.__getitem__, "aa"))
    with pytest.raises(TypeError):
        kit["d"] = kit["a"]  # type: ignore[index]


def test_each_adapter_gives_its_own_output(kit: ak.Kit, outputs: dict[str, Tensor], base: Tensor) -> None:
    assert kit.active == "c"
    assert torch.equal(run(kit.model), outputs["c"])
    for name in ("a", "c", "b"):
        kit.activate(name)
        assert kit.active == name
        assert torch.equal(run(kit.model), outputs[name])
    kit.activate(None)
    assert kit.active is None
    assert torch.equal(run(kit.model), base)


def test_the_adapters_do_not_depend_on_each_other(kit: ak.Kit, outputs: dict[str, Tensor]) -> None:
    alone = ak.attach(bert(), "ia3", name="b")
    assert torch.equal(move(alone, "b", 1), outputs["b"])


def test_using_and_disabled_nest(kit: ak.Kit, outputs: dict[str, Tensor], base: Tensor) -> None:
    kit.activate("a")
    with kit.using("b") as same:
        assert same is kit
        assert torch.equal(run(kit.model), outputs["b"])
        with kit.disabled():
            assert kit.active is None
            assert torch.equal(run(kit.model), base)
            with kit.using("c"):
                assert torch.equal(run(kit.model), outputs["c"])
            assert torch.equal(run(kit.model), base)
        assert kit.active == "b"
        assert torch.equal(run(kit.model), outputs["b"])
    assert kit.active == "a"
    assert torch.equal(run(kit.model), outputs["a"])


def test_an_exception_ends_the_block(kit: ak.Kit, outputs: dict[str, Tensor]) -> None:
    with pytest.raises(KeyError), kit.using("a"), kit.disabled():
        raise KeyError
    assert kit.active == "c"
    assert torch.equal(run(kit.model), outputs["c"])


def test_activate_inside_a_block_is_for_after_it(kit: ak.Kit, outputs: dict[str, Tensor]) -> None:
    with kit.using("a"):
        kit.activate("b")
        assert torch.equal(run(kit.model), outputs["a"])
    assert torch.equal(run(kit.model), outputs["b"])


@pytest.mark.parametrize("verb", ["activate", "using"])
def test_setups_that_are_refused_change_nothing(kit: ak.Kit, outputs: dict[str, Tensor], verb: str) -> None:
    def call(setup: object) -> None:
        with getattr(kit, verb)(setup):
            pass

    refused(NotAttachedError, "no-such-adapter", call, "d")
    refused(CompositionError, "bad-setup", call, ["a"])
    refused(CompositionError, "bad-setup", call, 3)
    assert torch.equal(run(kit.model), outputs["c"])


def test_only_the_active_adapter_gets_gradients(kit: ak.Kit, outputs: dict[str, Tensor]) -> None:
    kit.activate("a")
    kit.model(**INPUTS).logits.sum().backward()
    assert all(tensor.grad is not None for tensor in kit["a"].parameters())
    assert all(tensor.grad is None for name in "bc" for tensor in kit[name].parameters())


def test_train_and_freeze(kit: ak.Kit) -> None:
    def training() -> list[str]:
        names = {id(tensor): name for name in kit for tensor in kit[name].parameters()}
        return sorted({names[id(tensor)] for tensor in kit.model.parameters() if tensor.requires_grad})

    assert training() == ["a", "b", "c"]
    assert kit.freeze("a", "c") is kit
    assert training() == ["b"]
    kit.train("c")
    assert training() == ["b", "c"]
    kit.freeze()
    assert trained(kit.model) == []
    kit.train()
    assert training() == ["a", "b", "c"]
    assert kit.active == "c"
    refused(NotAttachedError, "no-such-adapter", kit.train, "d")


@pytest.mark.parametrize("method", ["vera[r=4]", "dvora[r=4]"])
def test_matrices_that_are_never_trained_stay_frozen(method: str) -> None:
    kit = ak.attach(bert(), method)
    frozen = {id(tensor) for tensor in kit["default"].shared.parameters()}
    assert len(frozen) == 2
    kit.freeze()
    kit.train()
    assert all(tensor.requires_grad != (id(tensor) in frozen) for tensor in kit["default"].parameters())
    plan = kit["default"].plan
    assert plan.parameters + plan.head_parameters == sum(
        tensor.numel() for tensor in kit.model.parameters() if tensor.requires_grad
    )


@pytest.mark.parametrize("gone", ["a", "b", "c"])
def test_detach_one_of_several(kit: ak.Kit, outputs: dict[str, Tensor], base: Tensor, gone: str) -> None:
    flags = trained(bert())
    assert kit.detach(gone) is kit.model
    assert list(kit) == [name for name in "abc" if name != gone]
    assert kit.active == (None if gone == "c" else "c")
    assert torch.equal(run(kit.model), base if gone == "c" else outputs["c"])
    for name in kit:
        with kit.using(name):
            assert torch.equal(run(kit.model), outputs[name])
    assert not any(f"{gone}__" in key for key in kit.model.state_dict())
    for name in list(kit):
        kit.detach(name)
    assert torch.equal(run(kit.model), base)
    assert list(kit.model.state_dict()) == list(bert().state_dict())
    assert trained(kit.model) == flags
    refused(NotAttachedError, "not-attached", ak.of, kit.model)


def test_skipped_layers_stay_skipped_until_another_activation(
    kit: ak.Kit, outputs: dict[str, Tensor]
) -> None:
    kit.activate("a", skip_layers=(0,))
    skipped = run(kit.model)
    assert not torch.equal(skipped, outputs["a"])
    kit.detach("b")
    assert torch.equal(run(kit.model), skipped)
    kit.merge("c").unmerge()
    assert torch.equal(run(kit.model), skipped)
    kit.activate("a")
    assert torch.equal(run(kit.model), outputs["a"])
    refused(PlanError, "no-such-layer", kit.activate, "a", skip_layers=(9,))
    assert torch.equal(run(kit.model), outputs["a"])


def test_while_merged_nothing_else_is_changed(kit: ak.Kit, outputs: dict[str, Tensor]) -> None:
    kit.merge("a")
    assert kit.merged == "a"
    torch.testing.assert_close(run(kit.model), outputs["a"], rtol=1e-5, atol=1e-6)
    before = picture(kit.model)
    for call in (
        lambda: kit.merge("b"),
        lambda: kit.activate("b"),
        lambda: kit.using("b").__enter__(),
        lambda: kit.disabled().__enter__(),
        lambda: kit.attach("lora", name="d"),
        lambda: kit.attach("lora", name="b", replace=True),
        lambda: kit.detach("b"),
        lambda: kit.merge_and_detach("b"),
        lambda: kit.verify(**INPUTS),
        kit.model.state_dict,
    ):
        assert "'a' is merged" in str(refused(PlanError, "merged", call))
    assert picture(kit.model) == before
    kit.unmerge()
    assert kit.merged is None
    assert torch.equal(run(kit.model), outputs["c"])
    refused(PlanError, "not-merged", kit.unmerge)


def test_what_acts_in_a_block_is_not_taken_from_under_it(kit: ak.Kit, outputs: dict[str, Tensor]) -> None:
    """Merged, it would act twice; detached or replaced, the block would run units that are gone."""
    for setup in ("a", ak.Stack("a", "b")):
        with kit.using(setup):
            inside, before = run(kit.model), picture(kit.model)
            for call in (
                lambda: kit.merge("a"),
                lambda: kit.merge("c"),
                lambda: kit.merge_and_detach("a"),
                lambda: kit.detach("a"),
                kit.detach,
                lambda: kit.attach("ia3", name="a", replace=True),
            ):
                refused(PlanError, "in-use", call)
            assert picture(kit.model) == before and torch.equal(run(kit.model), inside)
    with kit.disabled():
        refused(PlanError, "in-use", kit.merge, "a")
    with kit.using("a"):
        kit.detach("c")
        assert torch.equal(run(kit.model), outputs["a"])
    assert list(kit) == ["a", "b"]


def test_detach_takes_the_merged_weights_back(kit: ak.Kit, outputs: dict[str, Tensor], base: Tensor) -> None:
    kit.merge("a")
    kit.detach("a")
    assert torch.equal(run(kit.model), outputs["c"])
    kit.merge("b")
    kit.detach()
    assert torch.equal(run(kit.model), base)


def test_a_merge_that_fails_gives_every_weight_back(monkeypatch: pytest.MonkeyPatch) -> None:
    kit = ak.attach(bert(), "lora")
    output = move(kit, "default")
    weights = {name: value.clone() for name, value in kit.model.state_dict().items()}
    folded = merging._fold_slot
    done: list[int] = []

    def breaking(*args: Any) -> None:
        if len(done) == 2:
            raise RuntimeError("no memory")
        done.append(folded(*args) or 0)

    monkeypatch.setattr(merging, "_fold_slot", breaking)
    with pytest.raises(RuntimeError):
        kit.merge("default")
    assert kit.merged is None and len(done) == 2
    assert all(torch.equal(value, weights[name]) for name, value in kit.model.state_dict().items())
    assert torch.equal(run(kit.model), output)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(torch.float16, 300.0), (torch.float32, float("nan")), (torch.bfloat16, float("inf"))],
)
def test_what_the_weights_cannot_hold_is_not_merged(dtype: torch.dtype, value: float) -> None:
    """8 * 300 * 300 is more than float16 has, though float32 has it."""
    model = bert().to(dtype)
    kit = ak.attach(model, "lora", dtype="float32")
    with torch.no_grad():
        for tensor in kit["default"].units["encoder.1.attention.q"].parameters():
            tensor.fill_(value)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for call in (kit.merge, kit.merge_and_detach):
        refused(PlanError, "cannot-merge", call, "default")
    assert all(
        torch.equal(tensor, before[key])
        for key, tensor in model.state_dict().items()
        if "adapterkit" not in key
    )


def test_a_kit_that_cannot_leave_merges_nothing_for_good() -> None:
    kit = ak.attach(bert(), "lora")
    output = move(kit, "default")
    host = kit.model.bert.encoder.layer[1].attention.self.value
    host.__class__ = type("Wrapped", (type(host),), {})
    refused(PlanError, "wrapped-on-top", kit.merge_and_detach, "default")
    assert kit.merged is None and ak.of(kit.model) is kit
    assert torch.equal(run(kit.model), output)


def test_merge_and_detach_leaves_a_plain_model(kit: ak.Kit, outputs: dict[str, Tensor]) -> None:
    flags = trained(bert())
    model = kit.merge_and_detach("a")
    assert model is kit.model
    torch.testing.assert_close(run(model), outputs["a"], rtol=1e-5, atol=1e-6)
    plain = bert()
    assert [(path, type(module)) for path, module in model.named_modules()] == [
        (path, type(module)) for path, module in plain.named_modules()
    ]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert trained(model) == flags
    plain.load_state_dict(model.state_dict())
    assert torch.equal(run(plain), run(model))


def test_a_gate_cannot_be_merged_and_nothing_changes() -> None:
    kit = ak.attach(bert(), "lora[gating=true]")
    output = move(kit, "default")
    error = refused(PlanError, "cannot-merge", kit.merge, "default")
    assert len(error.problems) == 4
    assert "its gate depends on the input" in str(error)
    assert torch.equal(run(kit.model), output)


def test_verify_says_what_is_dead(kit: ak.Kit, outputs: dict[str, Tensor]) -> None:
    before = {key: value.clone() for key, value in kit["c"].state_dict().items()}
    assert kit.verify(**INPUTS).ok
    with torch.no_grad():
        kit.model.bert.encoder.layer[1].intermediate.dense.weight.zero_()
        kit.model.bert.encoder.layer[1].output.dense.weight.zero_()
    found = kit.verify(**INPUTS)
    assert not found.ok
    assert set(found.dead) == {f"encoder.1.mlp.up.{tensor}" for tensor in "ABm"}
    assert [problem.code for problem in found.problems()] == ["dead-tensor"] * 3
    assert "3 of 14 adapter tensors are dead" in str(found)  # A, B, m at four slots, and the head
    assert all(torch.equal(before[key], value) for key, value in kit["c"].state_dict().items())
    assert all(tensor.grad is None for tensor in kit.model.parameters())
    kit.activate(None)
    refused(NotAttachedError, "not-active", kit.verify, **INPUTS)


def test_adapters_keep_out_of_training_mode_and_follow_it(kit: ak.Kit) -> None:
    kit.model.train()
    assert all(module.training for adapter in kit.values() for module in adapter.units.values())
    kit.attach("lora", name="d")
    assert all(module.training for module in kit["d"].units.values())
    kit.model.eval()
    assert not any(module.training for adapter in kit.values() for module in adapter.units.values())


def test_every_tensor_of_a_default_adapter_is_alive() -> None:
    for method in ("lora", "ia3", "vera", "dora", "dvora", "mtl_lora"):
        kit = ak.attach(bert(), method)
        assert kit.verify(**INPUTS).ok, method
        trained_numbers = sum(tensor.numel() for tensor in kit.model.parameters() if tensor.requires_grad)
        assert kit["default"].num_parameters == trained_numbers
