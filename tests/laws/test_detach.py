"""Law of leaving: a model that was attached to and detached from is the model that it was."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import adapterkit as ak
from tests.laws.matrix import Case, randomise, run


def snapshot(model: nn.Module) -> dict[str, tuple[type, dict[str, Any]]]:
    """Class and attributes of every module: hooks, `forward` on the instance and all else that it holds."""
    return {path: (type(module), _plain(vars(module))) for path, module in model.named_modules()}


def _plain(attributes: dict[str, Any]) -> dict[str, Any]:
    """Dictionaries (children, tensors, hooks) as pairs of key and identity, other values by identity."""
    return {
        name: [(key, id(item)) for key, item in value.items()] if isinstance(value, dict) else id(value)
        for name, value in attributes.items()
    }


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def test_detach_restores_everything(case: Case) -> None:
    model, inputs = case.model(), case.inputs()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 != 1)  # the first is often tied to the output embeddings
    output = run(model, inputs)  # first: transformers adds hooks of its own when it runs
    before, tensors = snapshot(model), bits(model)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    kit = case.attach(model)
    randomise(kit)
    assert not torch.equal(run(model, inputs), output)
    assert snapshot(model) != before
    kit.detach()

    assert snapshot(model) == before
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained
    after = bits(model)
    assert list(after) == list(tensors)
    assert all(torch.equal(after[key], value) for key, value in tensors.items())
    assert torch.equal(run(model, inputs), output)


def test_nothing_is_left_of_a_setup_that_asks_something_of_the_batch() -> None:
    case = Case("bert", "BertModel", "lora")
    model, inputs = case.model(), case.inputs()
    before = run(model, inputs)
    for name in ("a", "b"):
        kit = case.attach(model, name=name)
    kit.activate(ak.Parallel("a", "b"))
    assert run(model, inputs).numel() == 2 * before.numel()
    kit.detach()
    assert not model._forward_pre_hooks and not model._forward_hooks
    assert torch.equal(run(model, inputs), before)
    for name in ("a", "b"):
        kit = case.attach(model, name=name)
    kit.activate(ak.Parallel("a", "b"))
    assert run(model, inputs).numel() == 2 * before.numel()
