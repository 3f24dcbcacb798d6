"""On a GPU: every method under every setup gives the CPU's numbers, on every row; in graphs, generation,
the stock Trainer, on quantised weights and with layers on two devices.

Run where there is one: pytest -m "" tests/mechanisms/test_cuda_setups.py
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import adapterkit as ak
from adapterkit.composition import BatchSplit, Parallel, Route, Setup
from tests.laws import matrix
from tests.laws.composition_cases import CHOSEN, METHODS, SETUPS, TASKS, SetupCase, fields
from tests.mechanisms import test_quantised, test_trainer
from tests.mechanisms.scene import attach, gradients, run
from tests.mechanisms.test_cuda import exact_products, moved
from tests.models import tiny

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.usefixtures(exact_products.__name__),
]
FEW = ("bert", "llama", "t5")


def close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Equal to rounding in sums of another order."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(1.0, float(value.abs().max()))
        assert float((found[name].cpu() - value).abs().max()) <= 5e-4 * scale, name


def under(kit: ak.Kit, setup: Setup | str | None, given: dict[str, Tensor], rows: Any) -> dict[str, Tensor]:
    said: dict[str, Any] = {"rows": list(rows)} if "Route" in repr(setup) else {}
    said |= {"task_ids": list(TASKS)} if "MultiTask" in repr(setup) else {}
    with kit.using(setup, **said):
        return fields(kit, given)


def each(rows: Iterable[str], methods: Iterable[str]) -> list[Any]:
    """Rows and methods; by default of a few rows."""
    return [
        pytest.param(row, method, marks=[] if row in FEW else [pytest.mark.full], id=f"{row}-{method}")
        for row in rows
        for method in methods
    ]


@pytest.mark.parametrize(("row", "method"), each(tiny.ROWS, METHODS))
def test_setups_give_the_numbers_of_the_cpu(row: str, method: str) -> None:
    case = SetupCase(row, tiny.classes(row)[0], method, "")
    kit, given = case.kit(), case.batch()
    there = ak.of(copy.deepcopy(kit.model).cuda())
    for setup in (None, "a", "b"):
        close(under(there, setup, moved(given), ()), under(kit, setup, given, ()))
    for block, setup in SETUPS.items():
        told = SetupCase(row, case.cls, method, "", block)
        if not told.refused:
            close(under(there, setup, moved(given), told.rows), under(kit, setup, given, told.rows))


@pytest.mark.parametrize("method", ["lora", "dora", "seq_bn", "prefix_tuning_flat", "loreft", "compacter"])
@pytest.mark.parametrize("setup", [Parallel("a", "b"), Route("a", "b")], ids=repr)
@pytest.mark.parametrize("row", FEW)
def test_gradients_of_setups_are_those_of_the_cpu(row: str, setup: Setup, method: str) -> None:
    case = SetupCase(row, tiny.classes(row)[0], method, "")
    kit, given = case.kit(), case.batch()
    there = ak.of(copy.deepcopy(kit.model).cuda())
    rows: dict[str, Any] = {"rows": list(CHOSEN)} if isinstance(setup, Route) else {}
    found = []
    for own, inputs in ((kit, given), (there, moved(given))):
        own.model.zero_grad(set_to_none=True)
        with own.using(setup, **rows):
            square(own.model, inputs).backward()
        found.append({key: p.grad for key, p in own["a"].named_parameters() if p.grad is not None})
        own.model.zero_grad(set_to_none=True)
    assert found[0], "something is trained"
    scale = max(float(value.abs().max()) for value in found[0].values())
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key].cpu(), value, atol=1e-3 * scale, rtol=1e-3)


def square(model: nn.Module, given: Mapping[str, Tensor]) -> Tensor:
    return tiny.output(model(**given)).square().mean()


GENERATED = ("lora", "prefix_tuning_flat", "prompt_tuning", "loreft", "seq_bn_inv")


@pytest.mark.parametrize(("row", "method"), each(filter(matrix.generating, tiny.ROWS), GENERATED))
def test_generation_gives_the_logits_of_the_cpu(row: str, method: str) -> None:
    case = SetupCase(row, matrix.generating(row)[0], method, "")
    kit, given = case.kit(), case.batch()
    there = ak.of(copy.deepcopy(kit.model).cuda())
    rows = TASKS if method == "prompt_tuning" else CHOSEN
    for setup in ("a", Route("a", "b"), BatchSplit("a", "b", batch_sizes=[3, 1])):
        found = []
        for own, inputs in ((kit, given), (there, moved(given))):
            said: dict[str, Any] = {"rows": list(rows)} if isinstance(setup, Route) else {}
            with own.using(setup, **said):
                out = own.generate(
                    **inputs,
                    max_new_tokens=4,
                    min_new_tokens=4,
                    do_sample=False,
                    return_dict_in_generate=True,
                    output_logits=True,
                )
            found.append({"first": out.logits[0], "sequences": out.sequences.float()})
        close(found[1], found[0])


@pytest.mark.filterwarnings("ignore:.*(jit|tf32|TF32|SMs|online softmax)")  # inductor's own
@pytest.mark.parametrize("method", ["lora", "seq_bn"])
def test_one_graph_of_inductor_serves_any_routing(method: str) -> None:
    case = SetupCase("llama", tiny.classes("llama")[0], method, "")
    kit = ak.of(copy.deepcopy(case.kit().model).cuda())
    given = moved(case.batch())
    counted, made = CompileCounterWithBackend("inductor"), None
    compiled = torch.compile(kit.model, fullgraph=True, backend=counted)
    for rows in (["a", "b", None, "a"], ["b", "b", "a", None], [None, "a", "b", "b"]):
        with kit.using(Route("a", "b"), rows=rows), torch.no_grad():
            expected, found = tiny.output(kit.model(**given)), tiny.output(compiled(**given))
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
        assert made is None or counted.frame_count == made
        made = counted.frame_count


@pytest.mark.filterwarnings("ignore:.*(jit|tf32|TF32|SMs|online softmax)")
@pytest.mark.parametrize("method", ["lora", "seq_bn", "prefix_tuning_flat"])
def test_cuda_graphs_replay_the_adapter(method: str) -> None:
    """Replayed kernels read the adapter's tensors where they are: a step in place is seen."""
    model, given = tiny.build("llama").cuda(), moved(tiny.inputs("llama"))
    kit = attach(model, method)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for step in range(4):
        with torch.no_grad():
            for parameter in kit["a"].parameters():
                parameter.mul_(1 + 0.1 * step)
        torch.compiler.cudagraph_mark_step_begin()
        expected = run(model, given)
        torch.testing.assert_close(run(compiled, given), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("row", ["bert", "gpt2"])
def test_the_trainer_learns_what_it_learns_on_the_cpu(row: str, tmp_path: Path) -> None:
    learned = []
    for device, cpu in (("cpu", True), ("cuda", False)):
        model = test_trainer.model_for(row, "lora[r=4]")
        trainer = test_trainer.trainer_for(model, row, tmp_path / device, use_cpu=cpu)
        trainer.train()
        assert next(ak.of(model)["a"].parameters()).device.type == device
        learned.append(test_trainer.losses(trainer))
    assert len(learned[0]) == test_trainer.STEPS
    assert learned[1] == pytest.approx(learned[0], rel=2e-2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:MatMul8bitLt.*:UserWarning")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_weights_on_the_gpu(kind: str) -> None:
    model, plain = test_quantised.built(kind, "cuda")
    given = moved(tiny.inputs("llama"))
    # the kernel of eight bits rounds what a layer is given, each row to steps of its largest number / 127
    oracle = test_quantised.rounded(plain)
    for own in (model, plain, oracle):
        attach(own, "lora[targets=all]")
    expected, wanted = run(plain, given), gradients(plain, given)
    tolerance, loose = 2e-3, 4e-3
    if kind == "int8":
        # At most twice as far from the plain model as the oracle is: where a number lies between two steps
        # the kernel may take the other one, as sums before it are made in half precision and another order,
        # and may be as far from the oracle as one rounding of everything. Without its adapter the model
        # would be further off than that.
        tolerance = 2 * test_quantised.far(run(oracle, given), expected)
        rounding = gradients(oracle, given)
        loose = 2 * max(test_quantised.far(rounding[key], value) for key, value in wanted.items())
        bare = test_quantised.rounded(test_quantised.built(kind, "cuda")[1])
        assert tolerance < test_quantised.far(run(bare, given), expected) / 2
    assert test_quantised.far(run(model, given), expected) < tolerance
    for key, gradient in gradients(model, given).items():
        assert gradient is not None and gradient.any(), key
        assert test_quantised.far(gradient, wanted[key]) < loose, key


@pytest.mark.parametrize("first", ["attach", "dispatch"])
@pytest.mark.parametrize("method", ["lora", "seq_bn", "prefix_tuning_flat", "loreft"])
def test_layers_on_two_devices(method: str, first: str) -> None:
    """Accelerate moves what a layer is given to where the layer is; the units of a layer are there too."""
    accelerate = pytest.importorskip("accelerate")
    plain, model, given = tiny.build("llama"), tiny.build("llama"), tiny.inputs("llama")
    attach(plain, method)
    places = {"embed_tokens": 0, "layers.0": 0, "layers.1": "cpu", "norm": 0, "rotary_emb": 0}
    if first == "attach":
        attach(model, method)
    model = accelerate.dispatch_model(model, places, main_device="cuda:0")
    if first == "dispatch":
        attach(model, method)
    expected = run(plain, given)
    torch.testing.assert_close(run(model, moved(given)).cpu(), expected, atol=2e-4, rtol=1e-3)
