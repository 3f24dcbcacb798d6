"""Setups on every family once more, after something has happened to the model: no row of it gets old weights.

An optimizer steps under the setup itself, a state dict is loaded, the model is copied, cast, compiled.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import adapterkit as ak
from adapterkit.composition import BatchSplit, Parallel, Route, Setup
from tests.laws.branch_cases import randomise
from tests.laws.composition_cases import BATCH, CHOSEN, METHODS, OTHER, SetupCase, assert_rows, fields
from tests.laws.matrix import loss
from tests.models import tiny

MOVED = ("lora", "seq_bn", "prefix_tuning_flat", "ia3")
BLOCKS: dict[str, Setup] = {
    "Parallel": Parallel("a", "b"),
    "Route": Route("a", "b"),
    "BatchSplit": BatchSplit("a", "b", batch_sizes=[2, 2]),
}


def rows_of_the_table(*few: str) -> list[Any]:
    """Every family and method; by default one method on a few families."""
    return [
        pytest.param(row, method, marks=[] if row in few and method == MOVED[0] else [pytest.mark.full])
        for row in tiny.ROWS
        for method in MOVED
    ]


def kit_of(row: str, method: str) -> tuple[ak.Kit, dict[str, Any]]:
    """A model of its own with two adapters away from their start, and four examples."""
    cls = tiny.classes(row)[0]
    case = SetupCase(row, cls, method)
    model = case.model()
    for seed, name in enumerate("ab"):
        config = {**METHODS[method], **OTHER.get(method, {})} if seed else METHODS[method]
        kit = ak.attach(model, config, name=name, interface=case.interface, seed=seed, activate=False)
        randomise(kit, name, seed=seed)
    return kit, tiny.inputs(row, cls, batch=BATCH)


def stepped(kit: ak.Kit, setup: Setup, inputs: dict[str, Any]) -> ak.Kit:
    """By the gradients of both, under a setup that asks nothing of the batch but its size."""
    kit.activate(setup if not isinstance(setup, Route) else Parallel("b", "a"))
    loss(kit.model, inputs).backward()
    for parameter in kit.model.parameters():
        if parameter.grad is not None:  # a step of one size on every family
            parameter.grad.div_(parameter.grad.norm().clamp(min=1e-6))
    torch.optim.SGD([p for p in kit.model.parameters() if p.requires_grad], lr=0.1).step()
    kit.activate(None)
    return kit


def reloaded(kit: ak.Kit, setup: Setup, inputs: dict[str, Any]) -> ak.Kit:
    state = {
        key: value * 1.1 if ".adapterkit." in key and value.is_floating_point() else value
        for key, value in kit.model.state_dict().items()
    }
    kit.model.load_state_dict(state)
    return kit


def copied(kit: ak.Kit, setup: Setup, inputs: dict[str, Any]) -> ak.Kit:
    twin = ak.of(copy.deepcopy(kit.model))
    with torch.no_grad():
        for tensor in twin["a"].parameters():
            tensor.mul_(1.2)
    return twin


@pytest.mark.parametrize("change", [stepped, reloaded, copied], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("row", "method"), rows_of_the_table("t5"))
def test_nothing_old_is_kept(row: str, method: str, change: Callable[..., ak.Kit]) -> None:
    for setup in BLOCKS.values():
        kit, inputs = kit_of(row, method)
        assert_rows(kit, setup, inputs)  # now everything is made ready
        with kit.using("a"):
            before = fields(kit, inputs)
        kit = change(kit, setup, inputs)
        with kit.using("a"):
            after = fields(kit, inputs)
        assert any(not torch.equal(value, after[name]) for name, value in before.items())
        assert_rows(kit, setup, inputs)


@pytest.mark.parametrize(("row", "method"), rows_of_the_table("gpt2"))
def test_bfloat16(row: str, method: str) -> None:
    """Rounding makes the rows differ: they are as near to those alone as bfloat16 is to float32."""
    kit, inputs = kit_of(row, method)
    for setup in BLOCKS.values():
        assert_rows(kit, setup, inputs)

    def run(setup: Setup | None) -> dict[str, torch.Tensor]:
        said = {"rows": torch.tensor(CHOSEN)} if isinstance(setup, Route) else {}
        given = {k: v.to(kit.model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        with kit.using(setup, **said):
            return {name: value.float() for name, value in fields(kit, given).items()}

    exact = {name: run(setup) for name, setup in BLOCKS.items()} | {"a": run("a"), "b": run("b")}
    kit.model.to(torch.bfloat16)
    off = {
        name: max(float((run(child)[name] - value).abs().max()) for child in "ab")
        for name, value in exact["a"].items()
    }
    for word, setup in BLOCKS.items():
        for name, value in run(setup).items():
            scale = 0.01 * float(exact[word][name].abs().max())
            assert float((value - exact[word][name]).abs().max()) <= 3 * off[name] + scale, (word, name)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(("row", "method"), rows_of_the_table())
@torch._dynamo.config.patch(recompile_limit=64)
def test_active_before_and_after_the_first_compiled_call(row: str, method: str, before: bool) -> None:
    torch._dynamo.reset()
    kit, inputs = kit_of(row, method)
    compiled: Any = torch.compile(kit.model, backend="eager")
    try:
        if not before:
            with torch.no_grad():
                compiled(**inputs)
        for setup in BLOCKS.values():
            said = {"rows": torch.tensor(CHOSEN)} if isinstance(setup, Route) else {}
            with kit.using(setup, **said), torch.no_grad():
                found, expected = tiny.output(compiled(**inputs)), tiny.output(kit.model(**inputs))
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    finally:
        torch._dynamo.reset()
