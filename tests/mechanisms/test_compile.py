"""torch.compile: adapters that come, change and go after the first compiled call are noticed; one graph."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch._C._dynamo.guards import dict_version
from torch._dynamo.testing import CompileCounterWithBackend

import adapterkit as ak
from tests.mechanisms.scene import FEW, METHODS, attach, gradients, run
from tests.models import tiny

ROWS = ("bert", "llama", "gpt2")  # separate projections, grouped queries, a fused one with transposed weights


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("row", "backend"),
    [
        ("bert", "eager"),
        ("gpt2", "aot_eager"),
        pytest.param("bert", "aot_eager", marks=pytest.mark.full),
        pytest.param("gpt2", "eager", marks=pytest.mark.full),
        pytest.param("llama", "eager", marks=pytest.mark.full),
        pytest.param("llama", "aot_eager", marks=pytest.mark.full),
    ],
)
def test_every_change_after_the_first_compiled_call_is_noticed(row: str, backend: str) -> None:
    model, given = tiny.build(row), tiny.inputs(row)
    twin = tiny.build(row)  # is never compiled and says what is right
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    bare = run(compiled, given)
    assert torch.allclose(bare, run(twin, given), atol=1e-5)

    for each in (model, twin):
        attach(each, "lora", "a", seed=1)
        attach(each, "ia3", "b", seed=2)
    kit, eager = ak.of(compiled), ak.of(twin)
    assert kit is ak.of(model)
    seen = [bare]
    for setup in ("b", "a", None, "b"):
        kit.activate(setup)
        eager.activate(setup)
        out = run(compiled, given)
        assert torch.allclose(out, run(twin, given), atol=1e-5), setup
        seen.append(out)
    assert torch.equal(seen[3], bare) and not torch.allclose(seen[1], bare, atol=1e-2)
    assert not torch.allclose(seen[1], seen[2], atol=1e-2)

    with kit.using("a"):
        assert torch.equal(run(compiled, given), seen[2])
        with kit.disabled():
            assert torch.equal(run(compiled, given), bare)
    assert torch.equal(run(compiled, given), seen[1])
    kit.detach()
    assert torch.equal(run(compiled, given), bare)


def test_attach_before_the_first_compiled_call() -> None:
    model, given = tiny.build("bert"), tiny.inputs("bert")
    attach(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(run(compiled, given), run(model, given), atol=1e-5)


def test_a_model_that_is_compiled_in_place() -> None:
    model, given = tiny.build("bert"), tiny.inputs("bert")
    bare = run(model, given)
    adapted = tiny.build("bert")
    attach(adapted)
    counter = CompileCounterWithBackend("eager")
    model.compile(backend=counter, fullgraph=True)
    assert torch.equal(run(model, given), bare)
    kit = attach(model)
    assert torch.equal(run(model, given), run(adapted, given))
    kit.detach()
    assert torch.equal(run(model, given), bare)
    assert counter.frame_count == 2


def test_layers_that_are_compiled_one_by_one() -> None:
    model, given = tiny.build("llama"), tiny.inputs("llama")
    bare = run(model, given)
    for layer in model.layers:
        layer.compile(backend="eager", fullgraph=True)
    run(model, given)
    kit = attach(model)
    adapted = tiny.build("llama")
    attach(adapted)
    assert torch.equal(run(model, given), run(adapted, given))
    kit.detach()
    assert torch.equal(run(model, given), bare)


def test_who_watches_dictionaries_sees_that_a_module_became_a_site() -> None:
    """Torch 2.11 looks at the class of a module again only where a dictionary of it has changed."""
    model = tiny.build("llama")
    hosts = [layer.self_attn.q_proj for layer in model.layers]
    versions = [[dict_version(host.__dict__) for host in hosts]]
    kit = attach(model)
    versions.append([dict_version(host.__dict__) for host in hosts])
    kit.detach()
    versions.append([dict_version(host.__dict__) for host in hosts])
    for before, after in pairwise(versions):
        assert all(old != new for old, new in zip(before, after, strict=True))


def test_the_same_plan_is_compiled_once() -> None:
    model, given = tiny.build("bert"), tiny.inputs("bert")
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    kit = attach(model, name="a")
    attach(model, name="b", seed=1)
    graphs = []
    for setup in ("a", "b", None, "a", "b", None, "a"):
        kit.activate(setup)
        run(compiled, given)
        graphs.append(counter.frame_count)
    assert graphs == [1, 2, 3, 3, 3, 3, 3]


def test_new_values_need_no_new_graph() -> None:
    model, given = tiny.build("bert"), tiny.inputs("bert")
    counter = CompileCounterWithBackend("eager")
    kit = attach(model)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    before = run(compiled, given)
    with torch.no_grad():
        for parameter in kit["a"].parameters():
            parameter.mul_(2)
    after = run(compiled, given)
    assert not torch.allclose(before, after, atol=1e-2)
    assert torch.equal(after, run(model, given)) and counter.frame_count == 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("row", ROWS)
def test_no_graph_breaks(row: str, method: str) -> None:
    model, given = tiny.build(row), tiny.inputs(row)
    attach(model, method)
    found = torch._dynamo.explain(model)(**given)
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


@pytest.mark.parametrize("method", FEW)
def test_training_through_a_compiled_model(method: str) -> None:
    """Units write into the output of their host; the traced graph must give the same gradients."""
    model, given = tiny.build("gpt2").train(), tiny.inputs("gpt2")
    attach(model, method)
    expected = gradients(model, given)
    found = gradients(torch.compile(model, backend="aot_eager", fullgraph=True), given)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        assert gradient is not None and gradient.any(), key
        assert torch.allclose(found[key], gradient, rtol=1e-4, atol=1e-5), key


# inductor itself still imports what torch gives up
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.full
def test_inductor() -> None:
    model, given = tiny.build("bert"), tiny.inputs("bert")
    compiled = torch.compile(model, backend="inductor", fullgraph=True)
    bare = run(compiled, given)
    kit = attach(model)
    adapted = run(compiled, given)
    assert torch.allclose(adapted, run(model, given), atol=1e-4)
    assert not torch.allclose(adapted, bare, atol=1e-2)
    kit.detach()
    assert torch.allclose(run(compiled, given), bare, atol=1e-6)
