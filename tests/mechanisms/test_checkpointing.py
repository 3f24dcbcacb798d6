"""Gradient checkpointing: every adapter trains, with the gradients it has without checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint as again

import adapterkit as ak
from tests.laws.matrix import randomise
from tests.mechanisms.scene import ALL_ROLES, attach, gradients, run
from tests.models import tiny

CLASSES = {
    "bert": "BertForSequenceClassification",
    "llama": "LlamaForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "t5": "T5ForConditionalGeneration",
    "vit": "ViTForImageClassification",
    "whisper": "WhisperForConditionalGeneration",
}
reentrant = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not"])


def checkpoint(model: nn.Module, reentrant: bool) -> None:
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})


def switch_off(model: nn.Module) -> None:
    getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()


class Calls:
    """How often a module is called."""

    def __init__(self, module: nn.Module) -> None:
        self.number = 0
        module.register_forward_hook(self.count)

    def count(self, *_: object) -> None:
        self.number += 1


def first_unit(kit: ak.Kit) -> nn.Module:
    return next(iter(kit["a"].units.values()))


@reentrant
@pytest.mark.parametrize("order", ["checkpoint, attach", "attach, checkpoint"])
@pytest.mark.parametrize("row", CLASSES)
def test_gradients_are_those_without_checkpointing(row: str, order: str, reentrant: bool) -> None:
    cls = CLASSES[row]
    given = tiny.inputs(row, cls, labels=True)
    plain = tiny.build(row, cls).train()
    attach(plain, ALL_ROLES)
    expected = gradients(plain, given)
    assert all(gradient is not None and gradient.any() for gradient in expected.values())

    model = tiny.build(row, cls).train()
    if order.startswith("checkpoint"):
        checkpoint(model, reentrant)
    kit = attach(model, ALL_ROLES)
    if order.startswith("attach"):
        checkpoint(model, reentrant)
    calls = Calls(first_unit(kit))
    found = gradients(model, given)
    assert calls.number == 2, "the layers were not checkpointed at all"
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        assert found[key] is not None, f"{key} was silently not trained"
        assert torch.allclose(found[key], gradient, rtol=1e-4, atol=1e-6), key


@reentrant
@pytest.mark.parametrize("method", ["ia3", "vera[r=4]", "dora", "dvora[r=4]"])
def test_other_methods(method: str, reentrant: bool) -> None:
    row, cls = "gpt2", CLASSES["gpt2"]
    given = tiny.inputs(row, cls, labels=True)
    plain, model = tiny.build(row, cls).train(), tiny.build(row, cls).train()
    attach(plain, method)
    attach(model, method)
    checkpoint(model, reentrant)
    expected, found = gradients(plain, given), gradients(model, given)
    for key, gradient in expected.items():
        assert gradient is not None and torch.allclose(found[key], gradient, rtol=1e-4, atol=1e-6), key


@pytest.mark.parametrize("row", ["llama", "gpt2", "t5"])
def test_embeddings_given_by_the_user(row: str) -> None:
    """The embeddings of the model are not called then, and nothing would train if they were the place."""
    cls = CLASSES[row]
    given = tiny.inputs(row, cls, labels=True)
    plain, model = tiny.build(row, cls).train(), tiny.build(row, cls).train()
    given["inputs_embeds"] = model.get_input_embeddings()(given.pop("input_ids")).detach()
    attach(plain, ALL_ROLES)
    attach(model, ALL_ROLES)
    checkpoint(model, True)
    expected, found = gradients(plain, given), gradients(model, given)
    for key, gradient in expected.items():
        assert gradient is not None and torch.allclose(found[key], gradient, rtol=1e-4, atol=1e-6), key
    assert not given["inputs_embeds"].requires_grad, "what the user gave was changed"


def test_an_adapter_on_the_last_layer_only() -> None:
    cls = CLASSES["llama"]
    given = tiny.inputs("llama", cls, labels=True)
    method = {"method": "lora", "layers": [1]}
    plain, model = tiny.build("llama", cls).train(), tiny.build("llama", cls).train()
    attach(plain, method)
    attach(model, method)
    checkpoint(model, True)
    model.model.layers[0].gradient_checkpointing = False  # as `every_n_layers` does
    expected, found = gradients(plain, given), gradients(model, given)
    for key, gradient in expected.items():
        assert gradient is not None and torch.allclose(found[key], gradient, rtol=1e-4, atol=1e-6), key


def test_checkpointing_that_is_switched_off_again() -> None:
    cls = CLASSES["bert"]
    given = tiny.inputs("bert", cls, labels=True)
    model = tiny.build("bert", cls).train()
    kit = attach(model)
    expected = gradients(model, given)
    checkpoint(model, True)
    gradients(model, given)
    switch_off(model)
    calls = Calls(first_unit(kit))
    found = gradients(model, given)
    assert calls.number == 1
    assert all(torch.equal(found[key], expected[key]) for key in expected)


# torch also says so where no gradient is wanted; in all other tests it would be the failure itself
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
@reentrant
def test_an_override_with_gradients_is_refused(reentrant: bool) -> None:
    """The recomputation in backward would read the default plan, not the one of the block."""
    cls = CLASSES["bert"]
    given = tiny.inputs("bert", cls)
    model = tiny.build("bert", cls).train()
    kit = attach(model)
    checkpoint(model, reentrant)
    for block in (lambda: kit.using("a"), kit.disabled):
        with pytest.raises(ak.errors.CompositionError) as error, block():
            pass
        assert error.value.code == "override-checkpointed"
    with torch.no_grad(), kit.disabled():
        off = run(model, given)
    model.eval()
    with kit.disabled():
        assert torch.equal(run(model, given), off)
    assert not torch.equal(run(model, given), off)


# -- what passes between the points of a layer when it runs again: the flow of its own pass

FLOW = {
    "loreft": {"method": "loreft", "r": 4, "suffix_positions": 2, "dropout": 0},
    "seq_bn": "seq_bn[reduction_factor=4]",
    "par_bn": "par_bn[reduction_factor=4]",
}


def passes(row: str, cls: str) -> list[dict[str, torch.Tensor]]:
    """Two batches whose padding lies elsewhere, and that are not of one length."""
    first, second = tiny.inputs(row, cls, batch=3, seed=1), tiny.inputs(row, cls, batch=3, seed=2)
    if "attention_mask" in second:
        second["attention_mask"] = second["attention_mask"].flip(0)
        if "decoder_input_ids" not in second:
            second = {name: tensor[:, 1:] for name, tensor in second.items()}
    return [first, second]


def of_both(model: nn.Module, given: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """One loss of two passes, as twins (sentence pairs, contrastive losses) have it."""
    outs = [tiny.output(model(**inputs)) for inputs in given]
    return sum((out.sin().sum() for out in outs), torch.zeros(()))


def grown(kit: ak.Kit, total: torch.Tensor) -> dict[str, torch.Tensor]:
    kit.model.zero_grad()
    total.backward()
    return {name: p.grad.clone() for name, p in kit["default"].named_parameters() if p.grad is not None}


def moved(row: str, cls: str, method: str) -> ak.Kit:
    model = tiny.build(row, cls).train()
    kit = ak.attach(model, FLOW[method], seed=0, head=False)
    randomise(kit)
    return kit


def assert_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-4), name


@reentrant
@pytest.mark.parametrize("method", FLOW)
@pytest.mark.parametrize("row, cls", [("llama", "LlamaModel"), ("bert", "BertModel"), ("vit", "ViTModel")])
def test_two_passes_before_one_backward(row: str, cls: str, method: str, reentrant: bool) -> None:
    """The layers of the first pass run again when the flow of the thread is that of the second."""
    kit, given = moved(row, cls, method), passes(row, cls)
    expected = grown(kit, of_both(kit.model, given))
    checkpoint(kit.model, reentrant)
    for _ in range(2):  # a run that was cut short leaves nothing to the next step either
        assert_gradients(grown(kit, of_both(kit.model, given)), expected)


@reentrant
@pytest.mark.parametrize("method", FLOW)
def test_backward_in_another_thread(method: str, reentrant: bool) -> None:
    """On a GPU layers run again in a thread of autograd, whose flow is empty."""
    kit, given = moved("llama", "LlamaModel", method), passes("llama", "LlamaModel")
    expected = grown(kit, of_both(kit.model, given))
    checkpoint(kit.model, reentrant)
    total = of_both(kit.model, given)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(grown, kit, total).result()
    assert_gradients(found, expected)


# -- the setup of its own pass

BETWEEN = {"lora": "lora[r=4]", "ia3": "ia3", "seq_bn": "seq_bn[reduction_factor=4]"}


def of_each(
    kit: ak.Kit, given: dict[str, torch.Tensor], weights: dict[Any, float]
) -> dict[str, torch.Tensor]:
    """Gradients of a weighted sum of losses, one for each setup, by one backward under another setup."""
    kit.model.zero_grad()
    total = torch.zeros(())
    for setup, weight in weights.items():
        kit.activate(setup)
        total = total + weight * kit.model(**given).loss
    kit.activate(None)
    total.backward()
    named = ((f"{name}.{key}", p.grad) for name in kit for key, p in kit[name].named_parameters())
    return {key: gradient.clone() for key, gradient in named if gradient is not None}


@reentrant
@pytest.mark.parametrize("method", BETWEEN)
@pytest.mark.parametrize("row", ["bert", "llama", "t5"])
def test_another_setup_before_backward(row: str, method: str, reentrant: bool) -> None:
    """Multi-task training: a loss for each adapter, one step. The layers of each ran again with the last."""
    cls = CLASSES[row]
    given = tiny.inputs(row, cls, labels=True, batch=4)
    kit = ak.attach(tiny.build(row, cls).train(), BETWEEN[method], name="a", seed=0)
    kit.attach(BETWEEN[method], name="b", seed=1)
    for name in kit:
        randomise(kit, name)
    for weights in ({"a": 1.0, "b": 2.0}, {ak.Parallel("a", "b"): 1.0, ak.Stack("a", "b"): 3.0, "a": 1.0}):
        switch_off(kit.model)
        expected = of_each(kit, given, weights)
        checkpoint(kit.model, reentrant)
        assert_gradients(of_each(kit, given, weights), expected)


@reentrant
def test_training_that_begins_inside_of_a_block(reentrant: bool) -> None:
    """The block is entered in eval mode; backward comes behind it."""
    given = tiny.inputs("bert", CLASSES["bert"], labels=True, batch=4)
    kit = ak.attach(tiny.build("bert", CLASSES["bert"]).train(), "lora[r=4]", name="a", seed=0)
    kit.attach("lora[r=4]", name="b", seed=1)
    for name in kit:
        randomise(kit, name)
    expected = of_each(kit, given, {"a": 1.0})
    checkpoint(kit.model, reentrant)
    kit.activate("b")
    kit.model.zero_grad()
    kit.model.eval()
    with kit.using("a"):
        loss = kit.model.train()(**given).loss
    loss.backward()
    found = {f"a.{k}": p.grad for k, p in kit["a"].named_parameters() if p.grad is not None}
    assert_gradients(found, expected)
    assert all(p.grad is None for p in kit["b"].parameters())


@reentrant
def test_what_is_recorded_is_so_once(reentrant: bool) -> None:
    given = tiny.inputs("bert", CLASSES["bert"], labels=True, batch=4)
    model = tiny.build("bert", CLASSES["bert"]).train()
    kit = ak.attach(model, "seq_bn[reduction_factor=4, use_gating=true]")
    checkpoint(model, reentrant)
    with kit.record() as record:
        for _ in range(3):
            model(**given).loss.backward()
    assert {len(passes) for passes in record.gates.values()} == {3}


# -- what users checkpoint by themselves


def by_layer(model: nn.Module, reentrant: bool) -> None:
    impl = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=lambda module: checkpoint_wrapper(module, checkpoint_impl=impl),
        check_fn=lambda module: module in model.encoder.layer,
    )


def by_hand(model: nn.Module, reentrant: bool) -> None:
    for layer in model.encoder.layer:
        own = layer.output.forward
        layer.output.forward = lambda *args, own=own: again(own, *args, use_reentrant=reentrant)


def whole(model: nn.Module, given: dict[str, torch.Tensor], reentrant: bool) -> torch.Tensor:
    marked = torch.zeros((), requires_grad=True)  # reentrant: something that requires a gradient
    run = lambda _, *values: model(**dict(zip(given, values, strict=True))).last_hidden_state.sin().sum()  # noqa: E731
    return again(run, marked, *given.values(), use_reentrant=reentrant)


@reentrant
@pytest.mark.parametrize(
    "method, checkpointed", [("loreft", by_layer), ("seq_bn", by_hand)], ids=["a layer", "a part of one"]
)
def test_parts_that_a_user_checkpoints_are_refused(
    method: str, checkpointed: Callable[[nn.Module, bool], None], reentrant: bool
) -> None:
    """Positions were those of the last batch of the thread, and in a thread of autograd those of no mask."""
    kit, given = moved("bert", "BertModel", method), passes("bert", "BertModel")
    checkpointed(kit.model, reentrant)
    kit.model.embeddings.register_forward_hook(lambda module, args, out: out.requires_grad_())
    total = of_both(kit.model, given)
    with pytest.raises(ak.errors.PlanError) as error:
        total.backward()
    assert error.value.code == "checkpointed-apart"


@reentrant
@pytest.mark.parametrize("method", FLOW)
def test_the_whole_model_checkpointed_by_a_user(method: str, reentrant: bool) -> None:
    """It is entered again in backward, and so has its own masks and residuals."""
    kit, given = moved("bert", "BertModel", method), passes("bert", "BertModel")
    total = sum((kit.model(**inputs).last_hidden_state.sin().sum() for inputs in given), torch.zeros(()))
    expected = grown(kit, total)
    total = sum((whole(kit.model, inputs, reentrant) for inputs in given), torch.zeros(()))
    assert_gradients(grown(kit, total), expected)
