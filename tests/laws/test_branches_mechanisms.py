"""Methods between sublayers under compilation, copies, checkpointing and threads."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import adapterkit as ak
from tests.laws.branch_cases import METHODS, randomise
from tests.laws.matrix import run
from tests.mechanisms.scene import gradients
from tests.mechanisms.test_checkpointing import CLASSES, checkpoint
from tests.models import tiny

DEFAULT = (("bert", "adapterplus"), ("bert", "compacter"), ("bert", "loreft"))


def marked(rows: tuple[str, ...]) -> list[Any]:
    """Every method on some families; a few methods on one of them in the default run."""
    return [
        pytest.param(row, method, marks=[] if (row, method) in DEFAULT else [pytest.mark.full])
        for row in rows
        for method in METHODS
    ]


def adapted(model: Any, method: str, name: str = "a", seed: int = 0) -> ak.Kit:
    kit = ak.attach(model, METHODS[method], name=name, seed=seed)
    randomise(kit, name, seed=seed)
    return kit


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(("row", "method"), marked(("bert", "llama", "t5")))
def test_one_graph_before_and_after_the_first_compiled_call(row: str, method: str) -> None:
    model, given, twin = tiny.build(row), tiny.inputs(row), tiny.build(row)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    bare = run(compiled, given)
    adapted(twin, method)
    expected = run(twin, given)
    kit = adapted(model, method)
    torch.testing.assert_close(run(compiled, given), expected, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()
    torch.testing.assert_close(run(compiled, given), expected, rtol=1e-5, atol=1e-5)
    kit.detach()
    assert torch.equal(run(compiled, given), bare)


@pytest.mark.parametrize(("row", "method"), marked(("bert", "llama", "t5")))
def test_copies_are_whole_and_apart(row: str, method: str) -> None:
    model, given = tiny.build(row), tiny.inputs(row)
    kit = adapted(model, method)
    output = run(model, given)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(run(other, given), output)
        own, theirs = ({id(t) for t in m.parameters()} for m in (model, other))
        assert not own & theirs
        randomise(ak.of(other), "a", seed=3)
        assert not torch.equal(run(other, given), output)
        assert torch.equal(run(model, given), output)
    kit.detach()


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not"])
@pytest.mark.parametrize(("row", "method"), marked(("bert", "llama")))
def test_checkpointing_gives_the_same_gradients(row: str, method: str, reentrant: bool) -> None:
    cls = CLASSES[row]
    given = tiny.inputs(row, cls, labels=True)
    models = [tiny.build(row, cls).train() for _ in range(2)]
    off = {"dropout": 0.0} if "reft" in method else {"stochastic_depth": 0.0}
    config = METHODS[method] | (off if "configs" not in METHODS[method] and method != "glow" else {})
    for model in models:
        randomise(ak.attach(model, config, name="a", seed=0), "a")
    checkpoint(models[1], reentrant)
    expected, found = (gradients(model, given) for model in models)
    assert any(gradient is not None and gradient.any() for gradient in expected.values())
    for key, gradient in expected.items():
        assert (gradient is None) == (found[key] is None), key
        if gradient is not None:
            assert torch.allclose(found[key], gradient, rtol=1e-4, atol=1e-6), key


@pytest.mark.parametrize("row", ["bert", pytest.param("t5", marks=pytest.mark.full)])
def test_threads_with_different_adapters(row: str) -> None:
    model, given = tiny.build(row), tiny.inputs(row)
    names = ["adapterplus", "par_bn", "loreft", "seq_bn", "compacter", "direft", "double_seq_bn", "noreft"]
    for seed, name in enumerate(names):
        kit = adapted(model, name, f"n{seed}", seed)
    kit.activate(None)

    def work(index: int) -> list[torch.Tensor]:
        found = []
        for _ in range(4):
            with kit.using(f"n{index}"):
                found.append(run(model, given))
        return found

    serial = [work(index)[0] for index in range(8)]
    assert len({tuple(out.tolist()) for out in serial}) == 8
    with ThreadPoolExecutor(8) as pool:
        for index, outputs in enumerate(pool.map(work, range(8))):
            assert all(torch.equal(out, serial[index]) for out in outputs)
