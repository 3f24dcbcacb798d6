"""Adapters in float32 beside a model in bfloat16, and autocast."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import adapterkit as ak
from tests.mechanisms.scene import METHODS, attach, gradients, run
from tests.models import tiny

ROWS = ("bert", "gpt2", "llama")


def far(left: Tensor, right: Tensor) -> float:
    """Largest difference relative to the largest value."""
    return float((left.float() - right.float()).abs().max() / right.float().abs().max())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("row", ROWS)
def test_autocast(row: str, method: str) -> None:
    """The adapter's share survives: much closer to the adapted float32 model than the bare one is."""
    model, given = tiny.build(row), tiny.inputs(row)
    bare = run(model, given)
    attach(model, method)
    assert {p.dtype for p in ak.of(model)["a"].parameters()} == {torch.float32}
    exact = run(model, given)
    with torch.autocast("cpu", torch.bfloat16):
        lower = run(model, given)
        found = gradients(model, given)
    assert 0 < 2 * far(lower, exact) < far(bare, exact)
    for key, gradient in found.items():
        assert gradient is not None and gradient.dtype == torch.float32 and gradient.any(), key


@pytest.mark.parametrize(
    "setup", ["a", ak.Parallel("a", "b"), ak.BatchSplit("a", "b", batch_sizes=1)], ids=repr
)
@pytest.mark.parametrize("row", ROWS)
def test_prefixes_under_autocast(row: str, setup: ak.composition.Setup) -> None:
    """Without padding, where models give attention a flag in place of a mask."""
    model, given = tiny.build(row), tiny.inputs(row, batch=2)
    given = {name: value for name, value in given.items() if name != "attention_mask"}
    attach(model, "prefix_tuning[prefix_length=4]", seed=1)
    kit = attach(model, "lora", "b", seed=2, activate=False)
    kit.activate(None)
    bare = run(
        model, {name: torch.cat([v, v]) for name, v in given.items()} if "Par" in repr(setup) else given
    )
    kit.activate(setup)
    exact = run(model, given)
    with torch.autocast("cpu", torch.bfloat16):
        assert 0 < 2 * far(run(model, given), exact) < far(bare, exact)


@pytest.mark.parametrize("dtype", ["float32", torch.float32])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("row", ROWS)
def test_float32_adapters_on_a_bfloat16_model(row: str, method: str, dtype: str | torch.dtype) -> None:
    model, given = tiny.build(row, dtype=torch.bfloat16), tiny.inputs(row)
    bare = run(model, given)
    twin = tiny.build(row, dtype=torch.bfloat16).float()  # the same rounded weights, computed in float32
    kit = attach(model, method, dtype=dtype)
    attach(twin, method)
    assert {p.dtype for p in kit["a"].parameters()} == {torch.float32}
    exact, found = run(twin, given), run(model, given)
    assert found.dtype == bare.dtype == torch.bfloat16
    assert 2 * far(found, exact) < far(bare, exact)
    for key, gradient in gradients(model, given).items():
        assert gradient is not None and gradient.dtype == torch.float32 and gradient.any(), key
    kit.detach()
    assert torch.equal(run(model, given), bare)


@pytest.mark.parametrize("method", METHODS)
def test_units_match_their_hosts_unless_told(method: str) -> None:
    model = tiny.build("bert", dtype=torch.bfloat16)
    kit = attach(model, method)
    assert {p.dtype for p in kit["a"].parameters()} == {torch.bfloat16}
    for gradient in gradients(model, tiny.inputs("bert")).values():
        assert gradient is not None and gradient.dtype == torch.bfloat16 and gradient.any()


@pytest.mark.parametrize("dtype", ["float33", "int64", "nn"])
def test_a_type_that_is_none(dtype: str) -> None:
    model = tiny.build("bert")
    with pytest.raises(ak.errors.AdapterkitError) as error:
        ak.attach(model, "lora", dtype=dtype)
    assert error.value.code == "bad-dtype" and "adapterkit" not in str(model)


def test_a_model_that_is_cast_after_attach() -> None:
    model, given = tiny.build("bert"), tiny.inputs("bert")
    kit = attach(model, "vera[r=4]")
    exact = run(model, given)
    model.to(torch.bfloat16)
    assert {p.dtype for p in kit["a"].parameters()} == {torch.bfloat16}
    assert far(run(model, given), exact) < 0.05
    model.double()
    assert run(model, given).dtype == torch.float64


@pytest.mark.parametrize(("own", "others"), [("bfloat16", "float32"), ("float32", "bfloat16")])
@pytest.mark.parametrize(
    "method",
    [
        "lora[gating=true]",
        "ia3[gating=true]",
        "double_seq_bn[use_gating=true]",
        "adapterplus[reduction_factor=4]",
        "compacter[phm_dim=2, reduction_factor=4]",
        "invertible[coupling=glow]",
        "prefix_tuning[use_gating=true, prefix_length=3]",
        "prompt_tuning[prompt_length=3]",
        "loreft",
        "unipelt",
    ],
)
@pytest.mark.parametrize("row", [ROWS[0], *(pytest.param(row, marks=pytest.mark.full) for row in ROWS[1:])])
def test_a_type_of_their_own_is_that_of_float64_but_for_rounding(
    row: str, method: str, own: str, others: str
) -> None:
    model, given = tiny.build(row, dtype=getattr(torch, others)), tiny.inputs(row)
    twin = tiny.build(row, dtype=getattr(torch, others)).double()  # the same numbers, computed in float64
    kit = attach(model, method, dtype=own)
    same = attach(twin, method, dtype="float64")
    with torch.no_grad():
        for tensor, exact in zip(kit["a"].parameters(), same["a"].parameters(), strict=True):
            exact.copy_(tensor)
    found = run(model, given)
    assert found.dtype == getattr(torch, others)
    assert far(found, run(twin, given)) < 0.03
    for key, gradient in gradients(model, given).items():
        assert gradient is not None and gradient.dtype == getattr(torch, own), key


@pytest.mark.parametrize("types", [("float32", "float32"), ("float32", "match")])
@pytest.mark.parametrize("method", ["seq_bn", "lora", "vera[r=4,d_initial=1]", "mtl_lora"])
def test_a_fusion_has_the_type_of_what_it_mixes(method: str, types: tuple[str, str]) -> None:
    def fused(model: torch.nn.Module) -> ak.Kit:
        for seed, (name, dtype) in enumerate(zip("ab", types, strict=True)):
            kit = attach(model, method, name, seed=seed, dtype=dtype)
        kit.fuse("a", "b", seed=2)
        kit.activate(ak.Fuse("a", "b"))
        return kit

    given, exact, model = tiny.inputs("bert"), tiny.build("bert"), tiny.build("bert").to(torch.bfloat16)
    fused(exact)
    kit = fused(model)
    assert {p.dtype for p in kit["a+b"].parameters()} == {torch.float32}
    assert far(run(model, given), run(exact, given)) < 0.05
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert far(run(model, given), run(exact, given)) < 0.05


@pytest.mark.parametrize("method", ["lora", "dora", "vera", "dvora", "ia3", "prefix_tuning"])
@pytest.mark.parametrize("row", ROWS)
def test_new_weights_are_not_rounded_by_autocast(row: str, method: str) -> None:
    """Merging and ejecting, as a training script does it that runs under autocast as a whole."""
    model, given = tiny.build(row), tiny.inputs(row)
    kit = attach(model, method)
    before = run(model, given)
    with torch.autocast("cpu", torch.bfloat16):
        kit.eject("a") if method == "prefix_tuning" else kit.merge("a")
    assert far(run(model, given), before) < 1e-5
    assert {p.dtype for p in kit["a"].parameters()} == {torch.float32}


@pytest.mark.parametrize("strategy", ["linear", "svd", "ties"])
def test_averages_are_not_rounded_by_autocast(strategy: str) -> None:
    found = []
    for enabled in (False, True):
        kit = attach(tiny.build("bert"), "lora", seed=1)
        attach(kit.model, "lora", "b", seed=2, activate=False)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            kit.average({"a": 0.3, "b": 0.7}, name="c", strategy=strategy)  # type: ignore[arg-type]
        found.append(kit["c"].state_dict())
    assert all(torch.equal(tensor, found[1][key]) for key, tensor in found[0].items())
