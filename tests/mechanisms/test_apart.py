"""Projections that also map relative positions: their attention is called for the examples of one lane."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.composition import Average, BatchSplit, MultiTask, Parallel, Route, Setup, Split, Stack
from adapterkit.errors import CompositionError
from tests.laws.composition_cases import BATCH, assert_rows
from tests.mechanisms.scene import attach, run
from tests.mechanisms.test_checkpointing import checkpoint
from tests.models import tiny
from tests.unit.kit_scene import refused

METHODS = (
    "lora[r=3, targets=all]",
    "lora[r=2, targets=[v]]",  # none of its maps is called with positions
    "lora[targets=all]|par_bn[locations=[attention, mlp]]|prefix_tuning_flat[prefix_length=3]",
    "dora[targets=[v, up]]|double_seq_bn[original_ln_before=true]",
)
ROWS = ("deberta", "deberta_v2")
SETUPS: list[tuple[Setup, dict[str, Any]]] = [
    (Parallel("a", "c"), {}),
    (Route("a", "b"), {"rows": ["b", None, "a"]}),
    (Stack("c", BatchSplit("a", "d", batch_sizes=[2, 1])), {}),
    (MultiTask("a", "c"), {"task_ids": [1, 0, 1]}),
]


def scene(row: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, ak.Kit]:
    model = tiny.build(row, dtype=dtype)
    for seed, (name, method) in enumerate(zip("abcd", METHODS, strict=True)):
        kit = attach(model, method, name, seed=seed, activate=False)
    return model, kit


@pytest.mark.parametrize(
    "setup",
    [
        Parallel("a", "c", "b"),
        Parallel("d", Stack("c", "d")),
        Route("c", "d"),
        Stack("d", Parallel("c", "a"), "b"),
        Stack(Route("a", "b"), MultiTask("c", "a")),
        Stack(Route("a", "c"), Parallel("c", "d")),
        Average("a", Route("b", "d"), weights=[1, 3]),
        BatchSplit("a", Route("c", "b"), batch_sizes=[1, 3]),
        BatchSplit("a", Route("b", "d"), batch_sizes=[1, 3]),
        Parallel("a", BatchSplit(Route("b", "d"), "a", batch_sizes=[1, 3])),
        Parallel(BatchSplit("a", "d", batch_sizes=[0, 4]), MultiTask("a", "c")),
    ],
    ids=repr,
)
@pytest.mark.parametrize("row", ROWS)
def test_every_row_is_what_its_example_gets_alone(row: str, setup: Setup) -> None:
    _, kit = scene(row)
    assert_rows(kit, setup, tiny.inputs(row, batch=BATCH))
    assert not kit._runtime.override.flow


@pytest.mark.parametrize("row", ROWS)
def test_gradients_are_the_sum_of_those_alone(row: str) -> None:
    model, kit = scene(row, torch.float64)
    given = tiny.inputs(row, batch=3)

    def gradients(setup: Setup) -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        kit.activate(setup)
        tiny.output(model(**given)).sin().sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    both = gradients(Parallel("a", "c"))
    for own in (gradients("a"), gradients("c")):
        assert own.keys() <= both.keys()
        for name, gradient in own.items():
            torch.testing.assert_close(both[name], gradient, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_that_run_again_in_backward(reentrant: bool) -> None:
    model, kit = scene("deberta_v2")
    given = tiny.inputs("deberta_v2", batch=3)
    kit.activate(Parallel("a", "c"))
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0

    def gradients() -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        tiny.output(model(**given)).square().mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    checkpoint(model, reentrant=reentrant)
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("first", [True, pytest.param(False, marks=pytest.mark.full)])
@torch._dynamo.config.patch(recompile_limit=64)
def test_in_compiled_graphs(first: bool) -> None:
    """One core alone: the model itself has many graphs, each of which takes seconds."""
    torch._dynamo.reset()
    model, kit = scene("deberta_v2")
    given = tiny.inputs("deberta_v2", batch=3)
    core = model.encoder.layer[0].attention.self
    setups = [SETUPS[1]] if first else [SETUPS[1], SETUPS[3], SETUPS[0]]
    kit.activate(SETUPS[0][0] if first else None)
    bare = run(model, given)
    core.compile(backend="eager")
    torch.testing.assert_close(run(model, given), bare, rtol=1e-5, atol=1e-5)
    for setup, rows in setups:
        with kit.using(setup, **rows):
            found = run(model, given)
            core._compiled_call_impl = None
            torch.testing.assert_close(found, run(model, given), rtol=1e-5, atol=1e-5)
            core.compile(backend="eager")
    torch._dynamo.reset()


def test_nothing_is_left_behind() -> None:
    model, kit = scene("deberta_v2")
    given = tiny.inputs("deberta_v2", batch=3)
    kit.activate(Parallel("a", "c"))
    run(model, given)
    kit.detach()
    bare = tiny.build("deberta_v2")
    assert [type(m) for m in model.modules()] == [type(m) for m in bare.modules()]
    assert torch.equal(run(model, given), run(bare, given))


def test_what_is_refused() -> None:
    model, kit = scene("deberta_v2")
    code = "no-batch-axis"
    error = refused(CompositionError, code, kit.activate, Stack(Parallel("a", "b"), Parallel("c", "a")))
    assert "two blocks" in str(error)
    kit.activate(Parallel(Stack("a", "c"), Stack("b", "a")))
    given = tiny.inputs("deberta_v2", batch=3)
    with kit.using(Route("a", "b"), rows=[0, 1]):
        refused(CompositionError, "batch-mismatch", model, **given)
    length = given["input_ids"].shape[1]
    refused(CompositionError, "undefined-block", kit.activate, Split("a", "b", splits=[3, length - 3]))
