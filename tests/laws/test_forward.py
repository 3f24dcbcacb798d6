"""Laws of one forward and backward pass: identity at first, what moves, what is trained, what is wrapped."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import adapterkit as ak
from tests.laws.matrix import Case, loss, randomise, run

# said by EncoderDecoderModel whenever it is given labels
pytestmark = pytest.mark.filterwarnings("ignore:Version v4.12.0 introduces a better way:FutureWarning")

# linear maps inside layers that are no sublayer of the layer, and why
NOT_ADAPTED = {"output.adapter_modules.": "X-MOD's own adapters, one for each language"}
BFLOAT16_ERROR = 0.1
"""Relative error that eight bits may make in these models; a wrong unit is off by a multiple."""


def test_output_is_the_base_models_at_first_and_differs_after_a_random_step(case: Case) -> None:
    model, inputs = case.model(), case.inputs()
    before = run(model, inputs)
    kit = case.attach(model)
    assert torch.equal(run(model, inputs), before)
    randomise(kit, heads=False)
    after = run(model, inputs)
    assert (after - before).abs().max() > 1e-4 * before.abs().max()
    with kit.disabled():
        assert torch.equal(run(model, inputs), before)


def test_every_adapter_tensor_and_no_base_tensor_gets_a_gradient(case: Case) -> None:
    kit, inputs = case.attached(), case.inputs(labels=True)
    own = {id(t): name for name, t in kit["default"].named_parameters() if not name.startswith("shared.")}
    reached = {name for name in own.values() if not case.unreached(name)}
    assert {id(t) for t in kit.model.parameters() if t.requires_grad} == own.keys()

    loss(kit.model, inputs).backward()
    got = {id(t): t.grad for t in kit.model.parameters() if t.grad is not None}
    assert got.keys() <= own.keys(), "a tensor of the base got a gradient"
    assert {own[tensor] for tensor in got} == reached
    # a loss may not see a bias of the head: softmax over choices or positions that all have it
    assert not [own[t] for t, grad in got.items() if not grad.any() and not own[t].startswith("head.")]

    before = {name: tensor.clone() for name, tensor in kit["default"].state_dict().items()}
    found = kit.verify(**inputs)
    assert set(found.alive) == reached
    assert set(found.dead) == set(own.values()) - reached
    assert all(torch.equal(before[name], t) for name, t in kit["default"].state_dict().items())


def test_every_linear_map_of_every_layer_is_wrapped_once(case: Case) -> None:
    plain = {
        path
        for path, module in case.model().named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
        and any(part.isdigit() for part in path.split("."))
        and not any(name in path for name in NOT_ADAPTED)
    }
    kit = case.attach(case.model(), head=False)
    slots = Counter(slot.path for slot in kit["default"].plan.slots if slot.layer is not None)
    if case.config.get("targets") == "all":
        assert slots.keys() == plain
    assert slots
    assert slots.keys() <= plain
    hosts = {path: module for path, module in kit.model.named_modules() if path in plain}
    swapped = {path: module for path, module in hosts.items() if is_swapped(module)}
    assert swapped.keys() == slots.keys()
    for path, host in swapped.items():
        units = [key for key in host.get_submodule("adapterkit")._modules if not key.endswith("__shared")]
        assert len(units) == slots[path]


def is_swapped(module: torch.nn.Module) -> bool:
    """Whether the class of the instance is a subclass of one of the same name that was not swapped itself."""
    names = [cls.__name__ for cls in type(module).__mro__]
    assert names.count(names[0]) <= 2, "swapped twice"
    return names[1] == names[0]


def test_a_model_in_bfloat16(case: Case) -> None:
    kit = case.attached(torch.bfloat16)
    assert {tensor.dtype for tensor in kit["default"].parameters()} == {torch.bfloat16}
    inputs = case.inputs(torch.bfloat16, labels=True)
    loss(kit.model, inputs).backward()
    assert all(tensor.grad is None or tensor.grad.isfinite().all() for tensor in kit["default"].parameters())
    found = run(kit.model, inputs)
    wide = run(kit.model.float(), case.inputs(labels=True))
    assert found.dtype == torch.bfloat16
    assert (found.float() - wide).norm() < BFLOAT16_ERROR * wide.norm()


def test_an_activation_that_writes_in_place_may_follow_an_adapted_matrix() -> None:
    """Also where nothing but the adapter is trained: torch takes a view that was written to for a leaf."""

    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.act, self.down = nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.act(self.up(x)))

    model = nn.Module()
    model.layers = nn.ModuleList([Mlp()])
    stacks = {"encoder": {"layers": "layers", "mlp": {"up": "up", "down": "down"}}}
    kit = ak.attach(model, "lora[targets=[up], r=2]", interface={"adapterkit": 1, "stacks": stacks})
    model.layers[0](torch.randn(2, 3, 4)).sum().backward()
    assert kit["default"].units["encoder.0.mlp.up"].B.grad is not None
