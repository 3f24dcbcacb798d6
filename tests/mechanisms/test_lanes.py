"""Many adapters in one batch under everything else: training, moves, copies, graphs, threads."""

from __future__ import annotations

import copy
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import adapterkit as ak
from adapterkit.composition import Setup
from adapterkit.errors import CompositionError, NotAttachedError
from tests.laws.matrix import randomise
from tests.mechanisms.scene import attach, run
from tests.mechanisms.test_checkpointing import checkpoint
from tests.models import tiny
from tests.unit.kit_scene import refused

METHODS = (
    "lora[r=4]",
    "lora[r=2]",
    "double_seq_bn[reduction_factor=4]",
    "prefix_tuning_flat[prefix_length=3]",
)
SETUPS: list[tuple[Setup, dict[str, Any]]] = [
    (ak.Parallel("a", "b"), {}),
    (ak.BatchSplit("b", "a", batch_sizes=[1, 2]), {}),
    (ak.Route("a", "b", "c", "d"), {"rows": ["c", None, "b"]}),
    (ak.Route("a", "b"), {"rows": ["b", None, "a"]}),
    (ak.MultiTask("a", ak.Stack("b", "d")), {"task_ids": [1, 0, 1]}),
    (ak.Stack("a", "c", "d"), {}),
    (ak.Average("a", "b", "c", weights=[1, 2, 3]), {}),
    (ak.Parallel(ak.Stack("a", ak.Route("b", "c")), "d"), {"rows": [0, -1, 1]}),
]


def scene(row: str = "bert", cls: str | None = None) -> tuple[nn.Module, ak.Kit, dict[str, Tensor]]:
    model = tiny.build(row, cls)
    for seed, (name, method) in enumerate(zip("abcd", METHODS, strict=True)):
        kit = attach(model, method, name, seed=seed, activate=False)
    return model, kit, tiny.inputs(row, cls, batch=3)


def under(kit: ak.Kit, given: dict[str, Tensor], setup: Setup, rows: dict[str, Any]) -> Tensor:
    with kit.using(setup, **rows):
        return run(kit.model, given)


def fresh(kit: ak.Kit, row: str = "bert", dtype: torch.dtype = torch.float32) -> ak.Kit:
    """Another model with the same weights, which has computed nothing yet."""
    model, other, _ = scene(row)
    model.to(dtype)
    for name in kit:
        for key, tensor in other[name].state_dict().items():
            tensor.copy_(kit[name].state_dict()[key])
    return other


@pytest.mark.parametrize(
    "change", ["average", "step", "data", "load", "double", "deepcopy", "pickle", "swap", "train", "thaw"]
)
def test_kept_weights_are_those_of_the_adapters(change: str) -> None:
    """Stacked weights are kept between passes; whatever changes an adapter changes them."""
    _, kit, given = scene()
    setup, rows = ak.Route("a", "b"), {"rows": ["b", None, "a"]}
    groups = ak.BatchSplit("a", "b", "a", batch_sizes=1)
    if change not in ("average", "step", "data", "train"):
        kit.freeze()  # of what can be trained none are kept
    before = under(kit, given, setup, rows), under(kit, given, groups, {})
    assert torch.equal(under(kit, given, setup, rows), before[0])
    own = list(kit["a"].parameters()) + list(kit["b"].parameters())
    dtype = torch.float32
    if change == "thaw":
        kit.train()
    if change in ("average", "thaw"):
        for tensor in own:  # averages of weights that are put in to be evaluated, without a step between
            tensor.data.add_(0.1)
    elif change in ("step", "data", "train"):
        kit.activate("a")
        kit.model.train(change == "train")
        with kit.using(ak.Parallel("a", "b")):
            tiny.output(kit.model(**given)).square().mean().backward()
        if change == "data":
            for tensor in own:
                tensor.data.add_(tensor.grad.sign() * 0.1)
        else:
            torch.optim.SGD(own, lr=100.0).step()
        kit.model.eval()
    elif change == "load":
        state = {k: v + 0.1 if ".A" in k else v for k, v in kit.model.state_dict().items()}
        kit.model.load_state_dict(state)
    elif change == "double":
        kit.model.double()
        dtype = torch.float64
        given = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
    elif change == "deepcopy":
        kit = ak.of(copy.deepcopy(kit.model))
        kit["a"].units["encoder.0.attention.q"].A.mul_(2)
    elif change == "pickle":
        stream = io.BytesIO()
        torch.save(kit.model, stream)
        stream.seek(0)
        kit = ak.of(torch.load(stream, weights_only=False))
        kit["a"].units["encoder.0.attention.q"].A.mul_(2)
    else:
        unit = kit["a"].units["encoder.0.attention.q"]
        unit.A = nn.Parameter(unit.A.detach() * 3)
    other = fresh(kit, dtype=dtype)
    for index, (block, more) in enumerate(((setup, rows), (groups, {}))):
        found = under(kit, given, block, more)
        torch.testing.assert_close(found, under(other, given, block, more), rtol=1e-6, atol=1e-6)
        assert change == "double" or not torch.allclose(found, before[index], atol=1e-4)


def test_kept_weights_are_left_where_others_are_computed() -> None:
    """A parametrisation that is put on a matrix later takes the parameter away, and gives another one."""

    class Half(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    model, kit, given = scene()
    kit.freeze()

    @torch.no_grad()
    def states(setup: Setup, rows: Any = None) -> Tensor:
        with kit.using(setup, rows=rows):
            found: Tensor = model(**given).last_hidden_state
        return found

    before = states(ak.Route("a", "b"), ["b", None, "a"])
    for unit in kit["a"].units.values():
        nn.utils.parametrize.register_parametrization(unit, "A", Half())
    found = states(ak.Route("a", "b"), ["b", None, "a"])
    for row, name in enumerate(("b", None, "a")):
        torch.testing.assert_close(found[row], states(name)[row], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[:2], before[:2], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[2], before[2], atol=1e-3)


def test_kept_weights_are_not_those_of_an_adapter_that_was_replaced() -> None:
    model, kit, given = scene()

    @torch.no_grad()
    def states(setup: Setup, rows: Any = None) -> Tensor:
        with kit.using(setup, rows=rows):
            found: Tensor = model(**given).last_hidden_state
        return found

    for change in ("none", "replace", "detach"):
        if change == "detach":
            kit.detach("a")
        if change != "none":
            attach(model, METHODS[0], "a", seed=len(change), activate=False, replace=change == "replace")
        a, b = states("a"), states("b")
        found = states(ak.Route("a", "b"), ["b", None, "a"])[::2]
        torch.testing.assert_close(found, torch.stack([b[0], a[2]]), rtol=1e-5, atol=1e-5)
        found = states(ak.BatchSplit("a", "b", "a", batch_sizes=1))
        torch.testing.assert_close(found, torch.stack([a[0], b[1], a[2]]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [1, 7])
@pytest.mark.parametrize("part", ["A", "B"])
def test_an_adapter_that_has_diverged_is_the_trouble_of_its_own_examples(part: str, length: int) -> None:
    model = tiny.build("llama")
    for seed, name in enumerate("ab"):
        kit = attach(model, "lora[r=4]", name, seed=seed, activate=False)
    given = {key: value[:, :length] for key, value in tiny.inputs("llama", batch=3).items()}
    with kit.using("a"):
        alone = run(model, given).view(3, -1)
    for key, tensor in kit["b"].state_dict().items():
        if key.endswith(f".{part}"):
            tensor.view(-1)[1] = torch.inf
    routed = under(kit, given, ak.Route("a", "b"), {"rows": ["a", "b", "a"]}).view(3, -1)
    assert torch.allclose(routed[[0, 2]], alone[[0, 2]], atol=1e-5)
    assert routed[1].isnan().any()


def test_adapters_that_were_attached_in_inference_mode() -> None:
    """Their tensors do not say when they were written to, so nothing of them is kept."""
    model = tiny.build("bert").eval()
    given = tiny.inputs("bert", batch=4)
    with torch.inference_mode():
        for name in "ab":
            kit = ak.attach(model, "lora[init=gaussian]", name=name)
            randomise(kit, name)
        with kit.using(ak.Route("a", "b"), rows=["a", "b", None, "a"]):
            found = model(**given).last_hidden_state
            for tensor in kit["b"].parameters():
                tensor.zero_()
            again = model(**given).last_hidden_state
        with kit.using("a"):
            alone = model(**given).last_hidden_state
        with kit.disabled():
            bare = model(**given).last_hidden_state
    for row, expected in ((0, alone), (2, bare), (3, alone)):
        torch.testing.assert_close(found[row], expected[row], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[1], bare[1], atol=1e-4)
    torch.testing.assert_close(again[1], bare[1], rtol=1e-5, atol=1e-5)


def test_gradients_reach_every_lane_in_eval_mode() -> None:
    """Weights that are kept would cut them off."""
    _, kit, given = scene()
    setup = ak.Route("a", "b")
    under(kit, given, setup, {"rows": [0, 1, 0]})
    for frozen in ("", "A"):
        kit.model.zero_grad(set_to_none=True)
        with kit.using(setup, rows=[0, 1, 0]):
            tiny.output(kit.model(**given)).square().mean().backward()
        for name in "ab":
            for key, tensor in kit[name].named_parameters():
                assert (tensor.grad is None) == key.endswith(f".{frozen}"), key
                tensor.requires_grad_(not key.endswith(".A"))


def test_bfloat16() -> None:
    model, kit, given = scene()
    model.to(torch.bfloat16)
    alone = {name: under(kit, given, name, {}).view(3, -1) for name in "ab"}
    found = under(kit, given, ak.Route("a", "b"), {"rows": ["b", "a", "b"]}).view(3, -1)
    # outputs of a base model are its states, and then what it pools from them
    states = given["input_ids"].shape[1] * 32 * 3
    pick = torch.stack([alone[n].reshape(-1)[:states].view(3, -1)[i] for i, n in enumerate("bab")])
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.reshape(-1)[:states].view(3, -1), pick, rtol=0.05, atol=0.1)


# ------------------------------------------------------------------------------------------------- graphs


@pytest.mark.parametrize("row", ["llama", *(pytest.param(r, marks=pytest.mark.full) for r in ("bert", "t5"))])
@torch._dynamo.config.patch(recompile_limit=64)
def test_one_graph_serves_every_routing(row: str) -> None:
    torch._dynamo.reset()
    model, kit, given = scene(row)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        compiled(**given)  # the model is compiled before it knows of any setup
    for setup, word in ((ak.Route("a", "b"), "rows"), (ak.MultiTask("a", "b", "c", "d"), "task_ids")):
        made = None
        for chosen in ([0, 1, 0], [1, 1, 1], [0, 0, 1], [1, 0, 0]):
            with kit.using(setup, **{word: chosen}):
                torch.testing.assert_close(run(compiled, given), run(model, given), rtol=1e-5, atol=1e-5)
            assert made is None or counter.frame_count == made
            made = counter.frame_count
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("row", "first", "setups"),
    [
        ("bert", SETUPS[0], []),
        pytest.param("bert", SETUPS[1], SETUPS[:1], marks=pytest.mark.full),
        ("bert", SETUPS[2], SETUPS[:1]),
        ("bert", None, SETUPS[:3]),
        *(
            pytest.param(row, first, SETUPS, marks=pytest.mark.full)
            for row in ("bert", "llama")
            for first in (None, *SETUPS[:3])
        ),
    ],
    ids=str,
)
@torch._dynamo.config.patch(recompile_limit=64)
def test_setups_in_compiled_graphs(
    row: str, first: tuple[Setup, dict[str, Any]] | None, setups: list[tuple[Setup, dict[str, Any]]]
) -> None:
    """Active before the first compiled call, or after it."""
    torch._dynamo.reset()
    model, kit, given = scene(row)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    setup, rows = first or (None, {})
    kit.activate(setup)
    column = {"adapter_rows": torch.tensor([2, -1, 1])} if rows else {}
    found, expected = run(compiled, {**given, **column}), run(model, {**given, **column})
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    kit.activate(None)
    for setup, rows in setups:
        with kit.using(setup, **rows):
            for _ in range(2):
                torch.testing.assert_close(run(compiled, given), run(model, given), rtol=1e-5, atol=1e-5)
    kit.activate(None)
    assert torch.equal(run(compiled, given), run(tiny.build(row), given))
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------ threads


@pytest.mark.parametrize(
    ("compiling", "setups"),
    [(False, SETUPS), (True, SETUPS[:2]), pytest.param(True, SETUPS, marks=pytest.mark.full)],
    ids=["eager", "compiled", "all compiled"],
)
@torch._dynamo.config.patch(recompile_limit=256)
def test_sixteen_threads_with_different_setups(
    compiling: bool, setups: list[tuple[Setup, dict[str, Any]]]
) -> None:
    torch._dynamo.reset()
    model, kit, given = scene()
    called: Any = torch.compile(model, backend="eager", fullgraph=True) if compiling else model
    serial = []
    for setup, rows in setups:
        with kit.using(setup, **rows):
            serial.append(run(called, given))

    def work(index: int) -> list[Tensor]:
        found = []
        # limits of the compiler are those of a thread
        with torch._dynamo.config.patch(recompile_limit=256):
            for _ in range(2 if compiling else 6):
                setup, rows = setups[index % len(setups)]
                with kit.using(setup, **rows):
                    found.append(run(called, given))
        return found

    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(work, range(16)))
    for index, found in enumerate(results):
        expected = serial[index % len(setups)]
        assert all(torch.equal(value, expected) for value in found), setups[index % len(setups)]
    assert kit.active is None
    torch._dynamo.reset()


def test_an_async_server() -> None:
    """Requests are collected into one batch; the block is around the forward pass alone, without an await."""
    import asyncio

    model, kit, given = scene()
    adapters = ["b", None, "a"]
    setup = ak.Route("a", "b")

    def forward(names: list[str | None], rows: dict[str, Tensor]) -> Tensor:
        with torch.inference_mode(), kit.using(setup, rows=names):
            return model(**rows)["last_hidden_state"].clone()

    async def request(index: int) -> Tensor:
        one = {key: value[index : index + 1] for key, value in given.items()}
        return await asyncio.to_thread(forward, [adapters[index]], one)

    async def serve() -> list[Tensor]:
        return await asyncio.gather(*(request(index) for index in range(3)))

    together = forward(adapters, given)
    for index, found in enumerate(asyncio.run(serve())):
        torch.testing.assert_close(found, together[index : index + 1], rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------ refusals


def test_what_a_batch_cannot_be() -> None:
    model, kit, given = scene()
    with torch.no_grad():
        for setup, rows, code in (
            (ak.BatchSplit("a", "b", batch_sizes=[1, 1]), {}, "batch-mismatch"),
            (ak.BatchSplit("a", "c", batch_sizes=[3, 3]), {}, "batch-mismatch"),
            (ak.Route("a", "b"), {"rows": [0, 1]}, "batch-mismatch"),
            (ak.Route("a", "c"), {"rows": [0, 1] * 3}, "batch-mismatch"),
            (ak.Route("a", "b"), {}, "no-rows"),
            (ak.MultiTask("a", "c"), {}, "no-rows"),
            (ak.Split("a", "b", splits=[1, 1]), {}, "split-mismatch"),
        ):
            with kit.using(setup, **rows):
                refused(CompositionError, code, model, **given)
        kit.activate(ak.Parallel("a", "b"))
        refused(CompositionError, "not-entered", model.encoder, torch.zeros(6, 4, 32))
        assert run(model, given).numel() == 2 * run(tiny.build("bert"), given).numel()


@pytest.mark.parametrize(
    ("setup", "rows", "code"),
    [
        (ak.Route("a", "b"), {"rows": ["a", "e", "b"]}, "unknown-row"),
        (ak.Route("a", "b"), {"rows": [0, 2]}, "unknown-row"),
        (ak.Route("a", "b"), {"rows": torch.tensor([0, -2])}, "unknown-row"),
        (ak.Route("a", "b"), {"rows": torch.zeros(2, 2, dtype=torch.long)}, "unknown-row"),
        (ak.Route("a", "b"), {"rows": torch.zeros(2)}, "unknown-row"),
        (ak.Route("a", "b"), {"rows": torch.tensor([True, False])}, "unknown-row"),
        (ak.Route("a", "b"), {"rows": numpy.array([True, False])}, "unknown-row"),
        (ak.Route("a", "b"), {"rows": numpy.array([0.0, 1.0])}, "unknown-row"),
        (ak.Route("a", "b"), {"rows": "ab"}, "unknown-row"),
        (ak.MultiTask("a", "b"), {"task_ids": ["a", None]}, "unknown-row"),
        (ak.MultiTask("a", "b"), {"task_ids": [-1]}, "unknown-row"),
        (ak.Stack("a", "b"), {"rows": ["a"]}, "no-rows"),
        (ak.Route("a", "b"), {"task_ids": [0]}, "no-rows"),
        (ak.Split("a", "d", splits=[1, 1]), {}, "undefined-block"),
        (ak.Average("a", "d"), {}, "undefined-block"),
    ],
)
def test_what_is_refused_before_anything_runs(setup: Setup, rows: dict[str, Any], code: str) -> None:
    model, kit, given = scene()
    before = run(model, given)

    def call() -> None:
        with kit.using(setup, **rows):
            raise AssertionError("the block was entered")

    error = refused(CompositionError, code, call)
    assert torch.equal(run(model, given), before) and kit.active is None
    assert code != "unknown-row" or "children" in str(error) or "list" in str(error)


@pytest.mark.parametrize(
    "rows",
    [
        [1, -1, 0],
        numpy.array([1, -1, 0]),
        [*numpy.array([1, -1, 0])],
        numpy.array(["b", None, "a"], dtype=object),
        torch.tensor([1, -1, 0], dtype=torch.int32),
        [*torch.tensor([1, -1, 0])],
    ],
    ids=repr,
)
def test_rows_in_any_form(rows: Any) -> None:
    model, kit, given = scene()
    with kit.using(ak.Route("a", "b"), rows=["b", None, "a"]):
        expected = run(model, given)
    with kit.using(ak.Route("a", "b"), rows=rows):
        assert torch.equal(run(model, given), expected)


def test_setups_of_adapters_that_are_not_there() -> None:
    _, kit, _ = scene()
    refused(NotAttachedError, "no-such-adapter", kit.activate, ak.Stack("a", "e"))
    refused(NotAttachedError, "no-fusion", kit.activate, ak.Parallel("a", ak.Fuse("b", "c")))
    kit.activate("Stack(a, b)")
    kit.detach("a")
    assert kit.active is None


def test_what_is_called_without_a_row_for_each_example(tmp_path: Path) -> None:
    """An interface that does not say which arguments of the attention belong to no example."""
    file = tmp_path / "apart.yaml"
    file.write_text(
        "adapterkit: 1\nlike: deberta\nmodel_type: deberta\nstacks:\n  encoder:\n    inputs: {batch: null}\n"
    )
    model = tiny.build("deberta")
    attach(model, "lora[targets=all]", "a", activate=False, interface=file)
    kit = attach(model, "lora[targets=[v,up]]", "b", seed=1, activate=False)
    error = refused(CompositionError, "no-batch-axis", kit.activate, ak.Parallel("a", "b"))
    assert "pos_proj" in str(error)
    kit.activate(ak.Stack("a", "b"))
    kit.activate(ak.Average("a", "b"))


def test_rows_and_checkpointed_layers() -> None:
    """Layers that run again in backward would read the rows of another batch."""
    model, kit, given = scene()
    model.train()
    checkpoint(model, reentrant=False)
    refused(CompositionError, "override-checkpointed", kit.using(ak.Parallel("a", "b")).__enter__)
    kit.activate(ak.Route("a", "b"))
    refused(CompositionError, "override-checkpointed", model, **given, adapter_rows=torch.tensor([0, 1, 0]))
    kit.activate(ak.Parallel("a", "b"))
    out = tiny.output(model(**given))
    out.square().mean().backward()
    found = {n: p.grad.clone() for a in "ab" for n, p in kit[a].named_parameters()}
    getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()
    model.zero_grad(set_to_none=True)
    tiny.output(model(**given)).square().mean().backward()
    for name, gradient in {n: p.grad for a in "ab" for n, p in kit[a].named_parameters()}.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_replicas_do_not_see_an_override() -> None:
    """DataParallel copies the modules in this thread and runs them in others."""
    model, kit, _ = scene()
    site = model.encoder.layer[0].attention.self.query.get_submodule("adapterkit")
    site.stacked["kept"] = "of this device"
    assert not site._replicate_for_data_parallel().stacked
    with kit.using("a"):
        refused(CompositionError, "override-replicated", site._replicate_for_data_parallel)


# -------------------------------------------------------------------------------------------------- heads


def test_every_lane_has_its_own_head() -> None:
    cls = "BertForSequenceClassification"
    _, kit, given = scene("bert", cls)
    alone = {name: under(kit, given, name, {}).view(3, -1) for name in "abcd"}
    assert kit["a"].heads and not torch.allclose(alone["a"], alone["b"])
    found = under(kit, given, ak.Route("a", "b", "c", "d"), {"rows": ["d", "a", "c"]}).view(3, -1)
    picked = torch.stack([alone["d"][0], alone["a"][1], alone["c"][2]])
    torch.testing.assert_close(found, picked, rtol=1e-5, atol=1e-5)
    found = under(kit, given, ak.Parallel("c", "b"), {})
    torch.testing.assert_close(found, torch.cat([alone["c"], alone["b"]]).flatten(), rtol=1e-5, atol=1e-5)
    found = under(kit, given, ak.Route("a", "b"), {"rows": [None, "a", "b"]}).view(3, -1)
    torch.testing.assert_close(
        found[:1].flatten(), under(kit, given, None, {}).view(3, -1)[0], rtol=1e-5, atol=1e-5
    )
    stacked = under(kit, given, ak.Stack("b", "a"), {})
    with torch.no_grad():
        for tensor in kit["b"].heads["head.classifier"].parameters():
            tensor.zero_()
    assert torch.equal(stacked, under(kit, given, ak.Stack("b", "a"), {}))


S = ak.Stack
NESTED: list[tuple[Setup, dict[str, Any], list[Setup]]] = [
    (S("b", ak.Route("a", "c")), {"rows": [0, -1, 1]}, [S("b", "a"), "b", S("b", "c")]),
    (
        S(ak.Parallel("a", "b"), ak.BatchSplit("c", "d", batch_sizes=[1, 2])),
        {},
        [S(one, two) for one in "ab" for two in "cdd"],
    ),
    (
        S(ak.BatchSplit("a", "b", batch_sizes=[2, 1]), ak.Route("c", "d")),
        {"rows": [-1, 0, -1]},
        ["a", S("a", "c"), "b"],
    ),
    (
        S(ak.Parallel("a", "b"), ak.BatchSplit("c", ak.Route("d", "a"), batch_sizes=[1, 2])),
        {"rows": [0, -1, 1]},
        [S("a", "c"), "a", S("a", "a"), S("b", "c"), "b", S("b", "a")],
    ),
    (
        S(ak.MultiTask("a", "b"), ak.Route("c", "d")),
        {"rows": [0, -1, 1], "task_ids": [0, 1, 1]},
        [S("a", "c"), "b", S("b", "d")],
    ),
]
"""A setup of three examples, and what acts on each row of the output."""


@pytest.mark.parametrize(
    ("setup", "rows", "alone", "compiling"),
    [(*case, False) for case in NESTED] + [(*case, True) for case in NESTED[:1]],
    ids=str,
)
def test_blocks_in_a_stack_have_the_heads_of_each_example(
    setup: Setup, rows: dict[str, Any], alone: list[Setup], compiling: bool
) -> None:
    torch._dynamo.reset()
    model, kit, given = scene("bert", "BertForSequenceClassification")
    called: Any = torch.compile(model, backend="eager", fullgraph=True) if compiling else model
    with kit.using(setup, **rows):
        found = run(called, given).view(len(alone), -1)
    for index, acting in enumerate(alone):
        one = {key: value[index % 3][None] for key, value in given.items()}
        torch.testing.assert_close(found[index], under(kit, one, acting, {}), rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


def test_verify_and_status_know_setups() -> None:
    _, kit, given = scene()
    kit.activate(ak.Parallel("a", "c"))
    found = kit.verify(**given)
    assert found.ok and {name.partition(":")[0] for name in found.alive} == {"a", "c"}
    assert [adapter.active for adapter in kit.status().adapters] == [True, False, True, False]
