"""Laws of setups on every family, for every method: each row is what its example gets alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import adapterkit as ak
from adapterkit.composition import Average, BatchSplit, Fuse, MultiTask, Parallel, Route, Split, Stack
from adapterkit.errors import CompositionError
from tests.laws.branch_cases import randomise
from tests.laws.composition_cases import SetupCase, assert_rows, cases, fields, headed
from tests.laws.matrix import loss
from tests.models import tiny
from tests.unit.kit_scene import refused


@pytest.mark.parametrize("setup_case", [*cases(), *headed()])
def test_every_row_is_what_its_example_gets_alone(setup_case: SetupCase) -> None:
    case = setup_case
    kit, inputs = case.kit(), case.batch()
    if case.refused:
        refused(CompositionError, case.refused, kit.activate, case.setup)
        assert kit.active == "b", "nothing has changed"
        return
    assert_rows(kit, case.setup, inputs, case.rows)


@pytest.mark.parametrize("setup_case", [param for param in cases() if param.values[0].block == "Stack"])
def test_one_adapter_in_a_block_is_that_adapter_bit_for_bit(setup_case: SetupCase) -> None:
    kit, inputs = setup_case.kit(), setup_case.batch()
    with kit.using("a"):
        expected = fields(kit, inputs)
    for setup in (Stack("a"), Stack(Stack("a")), Average("a", "b", weights=[3, 0]), Parallel("a")):
        with kit.using(setup):
            found = fields(kit, inputs)
        assert all(torch.equal(value, found[name]) for name, value in expected.items()), setup
    with kit.using("b"):
        found = fields(kit, inputs)
    assert any(not torch.equal(value, found[name]) for name, value in expected.items()), "they are two"


# ------------------------------------------------------------------------------- against averages of weights

WEIGHTS = ("lora", "vera", "dora", "dvora", "mtl_lora")
SIX = ("bert", "gpt2", "phi3", "t5", "albert", "modernbert")


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=2e-5, atol=2e-5 * max(1.0, float(value.abs().max()))
        )


def under(kit: ak.Kit, setup: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    with kit.using(setup):
        return fields(kit, inputs)


@pytest.mark.parametrize("method", WEIGHTS)
@pytest.mark.parametrize("row", SIX)
def test_the_mean_of_outputs_is_that_of_weights(row: str, method: str) -> None:
    """For maps that are linear: what is added to each output is averaged."""
    case = SetupCase(row, tiny.classes(row)[0], method)
    kit, inputs = case.kit(), case.batch()
    for weights, normalize in (([1, 3], True), ([0.5, -0.2], False)):
        kit.average(dict(zip("ab", weights, strict=True)), name="ab", normalize=normalize, replace=True)
        setup = Average("a", "b", weights=weights, normalize=normalize)
        close(under(kit, setup, inputs), under(kit, "ab", inputs))
    kit.detach("ab")


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_the_mean_takes_in_heads(method: str) -> None:
    """A linear head: the mean of what heads give is what the mean of their weights gives."""
    case = SetupCase("bert", "BertForSequenceClassification", method)
    kit, inputs = case.kit(), case.batch()
    assert kit["a"].heads and kit["b"].heads
    kit.average({"a": 1, "b": 3}, name="ab")
    close(under(kit, Average("a", "b", weights=[1, 3]), inputs), under(kit, "ab", inputs))
    kit.detach("ab")


@pytest.mark.parametrize("method", ["lora", "vera", "mtl_lora"])
@pytest.mark.parametrize("row", SIX)
def test_updates_of_weights_add_up_in_a_stack(row: str, method: str) -> None:
    case = SetupCase(row, tiny.classes(row)[0], method)
    kit, inputs = case.kit(), case.batch()
    kit.average(["a", "b"], name="ab", normalize=False)
    close(under(kit, Stack("a", "b"), inputs), under(kit, "ab", inputs))
    kit.detach("ab")


# ------------------------------------------------------------------------------------------------- segments

PER_POSITION = ("lora", "ia3", "dora", "vera", "seq_bn", "par_bn", "compacter++")


@pytest.mark.parametrize("method", PER_POSITION)
@pytest.mark.parametrize("row", ["gpt2", "llama", "gemma2", "gptj", "phi", "qwen3"])
def test_the_first_segment_of_a_decoder_never_sees_the_second(row: str, method: str) -> None:
    case = SetupCase(row, tiny.classes(row)[0], method)
    kit, inputs = case.kit(), tiny.inputs(row, tiny.classes(row)[0], batch=4, padded=False)
    length = inputs["input_ids"].shape[1]
    for part in (1, 3, length - 1):
        found = under(kit, Split("a", "b", splits=[part, length - part]), inputs)["last_hidden_state"]
        a = under(kit, "a", inputs)["last_hidden_state"]
        torch.testing.assert_close(found[:, :part], a[:, :part], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(found[:, part:], a[:, part:], atol=1e-3)


@pytest.mark.parametrize("method", PER_POSITION)
@pytest.mark.parametrize("row", ["bert", "vit", "modernbert", "electra", "gpt2", "xmod"])
def test_the_first_layer_is_cut_into_segments(row: str, method: str) -> None:
    """What reaches the first adapter is the same under every setup, so that its output can be cut by hand."""
    case = SetupCase(row, tiny.classes(row)[0], method)
    kit, inputs = case.kit(), case.batch()
    layer = kit.blueprint.places[f"{next(iter(kit.blueprint.stacks))}.0.layer"].module
    inner = (slot.module for slot in kit["a"].plan.slots if slot.layer == 0 and slot.role in ("q", "k", "v"))
    host = next(inner, layer)
    seen: list[Tensor] = []
    hook = host.register_forward_hook(
        lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    try:
        a, b = (under(kit, name, inputs) and seen[-1] for name in "ab")
        length = a.shape[1]
        under(kit, Split("a", "b", splits=[2, length - 2]), inputs)
    finally:
        hook.remove()
    expected = torch.cat([a[:, :2], b[:, 2:]], dim=1)
    torch.testing.assert_close(seen[-1], expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(a, b, atol=1e-3)


# ---------------------------------------------------------------------------------- after the model has moved


FEW = ("lora[r=3]", "seq_bn", "prefix_tuning_flat[prefix_length=3]", "loreft")


def stepped(kit: ak.Kit) -> ak.Kit:
    """After a step of an optimizer under the setup itself."""
    optimizer = torch.optim.SGD([p for p in kit.model.parameters() if p.requires_grad], lr=0.05)
    loss(kit.model, tiny.inputs("bert", "BertModel", batch=4)).backward()
    optimizer.step()
    return kit


def reloaded(kit: ak.Kit) -> ak.Kit:
    state = {
        key: value * 1.1 if ".adapterkit." in key and value.is_floating_point() else value
        for key, value in kit.model.state_dict().items()
    }
    kit.model.load_state_dict(state)
    return kit


def copied(kit: ak.Kit) -> ak.Kit:
    twin = ak.of(copy.deepcopy(kit.model))
    with torch.no_grad():
        for tensor in twin["a"].parameters():
            tensor.mul_(1.2)
    return twin


def cast(kit: ak.Kit) -> ak.Kit:
    kit.model.to(torch.float64)
    return kit


def moved(kit: ak.Kit) -> ak.Kit:
    """In place, as a hot swap or an average of weights over time would do it."""
    with torch.no_grad():
        for tensor in kit["b"].parameters():
            tensor.mul_(0.7)
    return kit


def shared(kit: ak.Kit) -> ak.Kit:
    return kit.share("a", "b")


@pytest.mark.parametrize("change", [stepped, reloaded, copied, cast, moved, shared], ids=lambda f: f.__name__)
@pytest.mark.parametrize("method", [*FEW, "dora", "ia3"])
def test_nothing_old_is_kept(method: str, change: Callable[[ak.Kit], ak.Kit]) -> None:
    """What a setup made ready for its passes follows the tensors, whatever happens to them."""
    model = tiny.build("bert", "BertModel")
    for seed, name in enumerate("ab"):
        kit = ak.attach(model, method, name=name, seed=seed)
        randomise(kit, name, seed=seed)
    inputs = tiny.inputs("bert", "BertModel", batch=4)
    setups = (Parallel("a", "b"), Route("a", "b"), BatchSplit("a", "b", batch_sizes=[2, 2]))
    for setup in setups:
        kit.activate(setup if not isinstance(setup, Route) else Stack("a", "b"))
        assert_rows(kit, setup, inputs)
        before = under(kit, Parallel("a", "b"), inputs)["last_hidden_state"]
        kit = change(kit)
        if next(kit.model.parameters()).dtype == torch.float64:
            kit.model.to(torch.float32)
        elif change is not shared:
            assert not torch.equal(under(kit, Parallel("a", "b"), inputs)["last_hidden_state"], before)
        assert_rows(kit, setup, inputs)


@pytest.mark.parametrize("row", ["bert", "llama", "t5"])
@pytest.mark.parametrize("method", FEW)
def test_half_precision(row: str, method: str) -> None:
    cls = tiny.classes(row)[0]
    model = tiny.build(row, cls, dtype=torch.bfloat16)
    for seed, name in enumerate("ab"):
        kit = ak.attach(model, method, name=name, seed=seed)
        with torch.no_grad():
            for tensor in kit[name].parameters():
                tensor.add_(
                    0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)).to(tensor)
                )
    inputs = tiny.inputs(row, cls, batch=4)
    name = "last_hidden_state"
    a, b = (under(kit, child, inputs)[name].float() for child in "ab")
    both = under(kit, Parallel("a", "b"), inputs)[name].float()
    scale = float(torch.cat([a, b]).abs().max())
    assert (both - torch.cat([a, b])).abs().max() <= 0.03 * scale
    assert (a - b).abs().max() > 0.1 * scale


# ------------------------------------------------------------------------------------------ blocks in blocks

LENGTH = tiny.inputs("bert", "BertModel", batch=4)["input_ids"].shape[1]
INNER: dict[str, Any] = {
    "Stack": Stack("b", "a"),
    "Fuse": Fuse("a", "b"),
    "Split": Split("a", "b", splits=[2, LENGTH - 2]),
    "Parallel": Parallel("a", "b"),
    "BatchSplit": BatchSplit("a", "b", batch_sizes=[1, 3]),
    "Average": Average("a", "b", weights=[1, 3]),
    "MultiTask": MultiTask("a", "b"),
}
NESTED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "Stack": (lambda own: Stack("c", own), "Stack Fuse Split Parallel BatchSplit Average MultiTask"),
    "Split": (lambda own: Split(own, "c", splits=[LENGTH, 0]), "Split Stack BatchSplit Average Fuse"),
    "Parallel": (lambda own: Parallel("c", own), "Stack BatchSplit Average Fuse Split Parallel MultiTask"),
    "MultiTask": (lambda own: MultiTask("c", own), "Stack Average Fuse"),
    "BatchSplit": (
        lambda own: BatchSplit("c", own, batch_sizes=[0, 4]),
        "Stack Split BatchSplit Average Fuse MultiTask",
    ),
    "Average": (lambda own: Average(own, "c", weights=[2, 1]), "Stack Split BatchSplit Fuse MultiTask"),
}
"""Every nesting that AdapterHub allows, and more; Stacks in Fuse have laws of their own."""


@pytest.mark.parametrize(
    ("outer", "inner"),
    [(outer, inner) for outer, (_, allowed) in NESTED.items() for inner in allowed.split()],
)
def test_blocks_in_blocks(outer: str, inner: str) -> None:
    model = tiny.build("bert", "BertModel")
    for seed, name in enumerate("abc"):
        kit = ak.attach(model, "double_seq_bn[reduction_factor=4]", name=name, seed=seed)
        randomise(kit, name, seed=seed)
    kit.fuse("a", "b", seed=5)
    randomise(kit, "a+b", seed=5)
    assert_rows(kit, NESTED[outer][0](INNER[inner]), tiny.inputs("bert", "BertModel", batch=4, padded=False))
