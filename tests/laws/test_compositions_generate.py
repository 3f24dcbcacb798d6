"""Laws of generation under setups: every sequence is that of its example alone, greedy and by beams."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import adapterkit as ak
from adapterkit.composition import BatchSplit, MultiTask, Parallel, Route, Setup, Stack
from adapterkit.errors import CompositionError
from tests.laws import matrix
from tests.laws.composition_cases import BATCH, CHOSEN, TASKS, SetupCase, reduced
from tests.models import tiny
from tests.unit.kit_scene import refused

METHODS = ("lora", "prefix_tuning_flat", "seq_bn", "prompt_tuning", "ia3", "seq_bn_inv")
SETUPS: tuple[Setup, ...] = (
    Parallel("a", "b"),
    BatchSplit("a", "b", batch_sizes=[3, 1]),
    Route("a", "b"),
    Parallel(MultiTask("a", "b"), Stack("a", "b")),
)
TOKENS = 4
THREE = ("llama", "t5", "whisper")


def cases() -> Iterator[Any]:
    """The first class of every family that generates, with a method in turn; by default of three families."""
    able = [row for row in tiny.ROWS if matrix.generating(row)]
    for number, row in enumerate(able):
        for shift, method in enumerate(METHODS):
            turn = (number + shift) % len(METHODS) == 0
            marks = [] if turn and row in THREE else [pytest.mark.full]
            case = SetupCase(row, matrix.generating(row)[0], method, "", "generate")
            yield pytest.param(case, id=f"{row}-{method}", marks=marks)


def generated(kit: ak.Kit, setup: Setup | None, inputs: dict[str, Any], rows: Any, **options: Any) -> Any:
    said: dict[str, Any] = {"rows": torch.tensor(rows)} if "Route" in repr(setup) else {}
    said |= {"task_ids": torch.tensor(TASKS)} if "MultiTask" in repr(setup) else {}
    with kit.using(setup, **said):
        return kit.generate(
            **inputs,
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )


@pytest.mark.parametrize("setup_case", list(cases()))
def test_every_sequence_is_the_one_of_its_example(setup_case: SetupCase) -> None:
    case = setup_case
    kit, inputs = case.kit(), tiny.inputs(case.row, case.cls, batch=BATCH)
    # without a prompt for all of them none can have one, and a Stack has two
    setups = SETUPS if case.method != "prompt_tuning" else SETUPS[:2]
    for setup in setups:
        for options in ({}, {"num_beams": 2}, {"use_cache": False}):
            found = generated(kit, setup, inputs, CHOSEN, **options)
            rows = reduced(setup, range(BATCH), CHOSEN, TASKS)
            alone = {own: generated(kit, own, inputs, CHOSEN, **options) for own in {own for _, own in rows}}
            expected = torch.stack([alone[own].sequences[example] for example, own in rows])
            assert torch.equal(found.sequences, expected), (setup, options)
            if "num_beams" in options:
                continue
            for step, logits in enumerate(found.logits):
                wanted = torch.stack([alone[own].logits[step][example] for example, own in rows])
                torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)
    a, b = (generated(kit, name, inputs, CHOSEN).logits[0] for name in "ab")
    assert not torch.allclose(a, b, atol=1e-3), "they are two"


def test_a_model_that_generates_by_itself_is_refused_where_the_batch_is_repeated() -> None:
    kit = SetupCase("llama", "LlamaForCausalLM", "lora").kit()
    inputs = tiny.inputs("llama", "LlamaForCausalLM", batch=2)
    with kit.using(Parallel("a", "b")):
        refused(CompositionError, "cached-parallel", kit.model.generate, **inputs, max_new_tokens=3)
