"""Every method on one linear map equals the formula of its paper: output, gradients, merged weight."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.oracles import dora, ia3, lora, mtl_lora, vera
from tests.unit import one_module as one

HOSTS = pytest.mark.parametrize(
    "module",
    [one.host(), one.host(bias=False), one.host(transposed=True)],
    ids=["linear", "without-bias", "conv1d"],
)
R = 3


def prepare(method: Any, module: nn.Module, role: str = "q") -> tuple[Any, Tensor, Tensor, dict[str, Tensor]]:
    unit = one.units(method, [one.slot(module, role)])[role]
    x = one.tokens()
    return unit, x, x.detach().clone().requires_grad_(), one.leaves(unit)


@HOSTS
@pytest.mark.parametrize("rslora", [False, True])
def test_lora(module: nn.Module, rslora: bool) -> None:
    method = {"method": "lora", "r": R, "alpha": 5, "rslora": rslora}
    unit, x, other, t = prepare(method, module)
    expected = lora.lora_output(other, one.weight(module), module.bias, t["A"], t["B"], 5, rslora)
    one.assert_same_function(module, unit, expected, x, other, t)
    merged = lora.lora_merged(one.weight(module), t["A"], t["B"], 5, rslora)
    one.assert_merges_to(module, unit, merged, module.bias)


def test_lora_that_computes_all_starts_as_the_module_wherever_the_rows_lie() -> None:
    torch.manual_seed(0)
    module = nn.Linear(32, 32).requires_grad_(False)
    start = one.units({"method": "lora", "r": R}, [one.slot(module)], random=False)["q"].float()
    assert start.A.dtype == module.weight.dtype
    x = torch.randn(2, 12, 32)
    with torch.no_grad():
        for states in (x, x.transpose(0, 1), x[:, ::2], x[..., :1].expand(2, 12, 32)):
            assert torch.equal(start(None, states, module), module(states))


@HOSTS
@pytest.mark.parametrize("alpha", [5, 0])
def test_lora_with_a_gate(module: nn.Module, alpha: float) -> None:
    """The gate is in place of the scale, whatever that is."""
    unit, x, other, t = prepare({"method": "lora", "r": R, "alpha": alpha, "gating": True}, module)
    gate = (t["gate.weight"], t["gate.bias"])
    expected = lora.gated_lora_output(other, one.weight(module), module.bias, t["A"], t["B"], *gate)
    one.assert_same_function(module, unit, expected, x, other, t)
    assert unit.refuses_merge() == "its gate depends on the input"


@HOSTS
@pytest.mark.parametrize(("init", "factors"), [("pissa", lora.pissa_factors), ("olora", lora.olora_factors)])
def test_principal_starts(module: nn.Module, init: str, factors: Any) -> None:
    W, scaling = one.weight(module), 5 / R
    method = {"method": "lora", "r": R, "alpha": 5, "init": init}
    start = one.units(method, [one.slot(module)], random=False)["q"]
    A, B, residual = factors(W, R, scaling)
    # the principal part is scaling B A in PiSSA, B A in OLoRA, whose start we divide by the factor; float32
    principal = W - residual if init == "pissa" else B @ A
    torch.testing.assert_close(scaling * (start.B @ start.A), principal, rtol=1e-5, atol=1e-6)
    x = one.tokens()
    assert torch.equal(one.run(module, {"q": start}, x), module(x))

    unit, x, other, t = prepare(method, module)
    frozen = W - scaling * (start.B0 @ start.A0)
    expected = lora.lora_output(other, frozen, module.bias, t["A"], t["B"], 5)
    one.assert_same_function(module, unit, expected, x, other, t)
    one.assert_merges_to(module, unit, lora.lora_merged(frozen, t["A"], t["B"], 5), module.bias)


@HOSTS
@pytest.mark.parametrize("alpha", [1.0, 1.5])
@pytest.mark.parametrize("role", ["k", "v", "down"])
def test_ia3(module: nn.Module, role: str, alpha: float) -> None:
    unit, x, other, t = prepare({"method": "ia3", "alpha": alpha}, module, role)
    assert unit.acts_on == ("input" if role == "down" else "output")
    output, merged = (
        (ia3.ia3_scale_input, ia3.ia3_merged_input)
        if role == "down"
        else (ia3.ia3_scale_output, ia3.ia3_merged_output)
    )
    expected = output(other, one.weight(module), module.bias, alpha * t["scale"])
    one.assert_same_function(module, unit, expected, x, other, t)
    one.assert_merges_to(module, unit, *merged(one.weight(module), module.bias, alpha * t["scale"]))


@pytest.mark.parametrize(
    ("role", "side", "formula"),
    [("down", "output", ia3.ia3_scale_output), ("k", "input", ia3.ia3_scale_input)],
)
def test_the_side_of_ia3_is_an_option(role: str, side: str, formula: Any) -> None:
    module = one.host()
    unit, x, other, t = prepare({"method": "ia3", "targets": (role,), "sides": {role: side}}, module, role)
    expected = formula(other, module.weight, module.bias, t["scale"])
    one.assert_same_function(module, unit, expected, x, other, t)


@pytest.mark.parametrize("role", ["k", "down"])
def test_ia3_with_a_gate(role: str) -> None:
    module = one.host()
    unit, x, other, t = prepare({"method": "ia3", "gating": True}, module, role)
    gates = lora.lora_gate(other, t["gate.weight"], t["gate.bias"])[:, None, None]
    if role == "down":
        expected = lora.linear_output(gates * t["scale"] * other, module.weight, module.bias)
    else:
        expected = gates * ia3.ia3_scale_output(other, module.weight, module.bias, t["scale"])
    one.assert_same_function(module, unit, expected, x, other, t)
    assert unit.refuses_merge() == "its gate depends on the input"


@HOSTS
@pytest.mark.parametrize("alpha", [None, 5])
def test_vera(module: nn.Module, alpha: float | None) -> None:
    unit, x, other, t = prepare({"method": "vera", "r": R, "alpha": alpha}, module)
    factor = 1 if alpha is None else alpha / R
    given = (t["shared.A"], t["shared.B"], t["d"], factor * t["b"])
    expected = vera.vera_output(other, one.weight(module), module.bias, *given)
    one.assert_same_function(module, unit, expected, x, other, t)
    one.assert_merges_to(module, unit, vera.vera_merged(one.weight(module), *given), module.bias)


def test_vera_uses_the_leading_part_of_matrices_as_large_as_the_largest_slot() -> None:
    small, large = one.host(), one.host(11, 13)
    found = one.units({"method": "vera", "r": R}, [one.slot(small, "q"), one.slot(large, "v")])
    shared = found["q"].owner[0]
    assert shared is found["v"].owner[0]
    assert (shared.A.shape, shared.B.shape) == ((R, 11), (13, R))
    for module, unit in ((small, found["q"]), (large, found["v"])):
        x, t = one.tokens(module.in_features), one.leaves(unit)
        expected = vera.vera_output(x, module.weight, module.bias, shared.A, shared.B, t["d"], t["b"])
        one.close(one.run(module, {"": unit}, x), expected)


@HOSTS
@pytest.mark.parametrize("rslora", [False, True])
def test_dora(module: nn.Module, rslora: bool) -> None:
    method = {"method": "dora", "r": R, "alpha": 5, "rslora": rslora}
    unit, x, other, t = prepare(method, module)
    given = (t["A"], t["B"], t["m"], 5, rslora)
    W = one.weight(module)
    found = one.run(module, {"q": unit}, x)
    expected = dora.dora_output(other, W, module.bias, *given)
    one.close(found, expected)
    one.assert_merges_to(module, unit, dora.dora_merged(W, *given), module.bias)

    along = torch.randn(found.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (found * along).sum().backward()
    (expected * along).sum().backward()
    one.close(x.grad, other.grad)
    grads = dora.dora_grads(x, W, t["A"], t["B"], t["m"], along, 5, rslora)
    for name, grad in zip("ABm", grads, strict=True):
        one.close(getattr(unit, name).grad, grad)
    exact = dora.dora_grads(x, W, t["A"], t["B"], t["m"], along, 5, rslora, detach_norm=False)
    assert not torch.allclose(unit.A.grad, exact[0]), "the norm is a constant in backward (section 4.3)"


@HOSTS
def test_dvora(module: nn.Module) -> None:
    unit, x, other, t = prepare({"method": "dvora", "r": R}, module)
    W = one.weight(module)
    given = (t["shared.A"], t["shared.B"], t["d"], t["b"])
    changed = W + vera.vera_delta(*given, one.D_IN)
    gain = t["m"] / dora.row_norms(changed).detach()
    expected = lora.linear_output(other, gain[:, None] * changed, module.bias)
    one.close(expected, dora.dvora_output(other, W, module.bias, *given, t["m"]))
    one.assert_same_function(module, unit, expected, x, other, t)
    one.assert_merges_to(module, unit, dora.dvora_merged(W, *given, t["m"]), module.bias)


@HOSTS
@pytest.mark.parametrize("method", ["dora", "dvora"])
@pytest.mark.parametrize(("norm_scaled", "scale_bias"), [(False, False), (True, True), (False, True)])
def test_quirks_of_other_libraries(
    module: nn.Module, method: str, norm_scaled: bool, scale_bias: bool
) -> None:
    quirks = {"norm_scaled": norm_scaled, "scale_bias": scale_bias}
    unit, x, other, t = prepare({"method": method, "r": R, "alpha": 5, **quirks}, module)
    W, scaling = one.weight(module), 5 / R
    if method == "dora":
        low = lora.lora_delta(t["A"], t["B"], R)
    else:
        low = vera.vera_delta(t["shared.A"], t["shared.B"], t["d"], t["b"], one.D_IN)
    norm = dora.row_norms(W + (scaling if norm_scaled else 1) * low).detach()
    gain = t["m"] / norm
    weight = gain[:, None] * (W + scaling * low)
    bias = gain * module.bias if scale_bias and module.bias is not None else module.bias
    one.assert_same_function(module, unit, lora.linear_output(other, weight, bias), x, other, t)
    one.assert_merges_to(module, unit, weight, bias)


@HOSTS
@pytest.mark.parametrize("shape", ["diagonal", "full"])
@pytest.mark.parametrize("n_up", [2, 3])
def test_mtl_lora(module: nn.Module, shape: str, n_up: int) -> None:
    method = {"method": "mtl_lora", "r": R, "alpha": 5, "n_up": n_up, "task_matrix": shape, "sharpness": 0.7}
    unit, x, other, t = prepare(method, module)
    assert t["L"].shape == ((R,) if shape == "diagonal" else (R, R))
    given = (t["A"], t["B"], t["L"], t["w"], 0.7, 5 / R)
    expected = mtl_lora.mtl_lora_output(other, one.weight(module), module.bias, *given)
    one.assert_same_function(module, unit, expected, x, other, t)
    one.assert_merges_to(module, unit, mtl_lora.mtl_lora_merged(one.weight(module), *given), module.bias)


def test_rank_and_alpha_for_each_role() -> None:
    module = one.host()
    method = {"method": "lora", "targets": ("q", "v"), "r": {"q": 2, "v": 4}, "alpha": {"q": 3, "v": 10}}
    found = one.units(method, [one.slot(module, "q"), one.slot(module, "v")])
    x = one.tokens()
    for role, rank, alpha in (("q", 2, 3), ("v", 4, 10)):
        unit = found[role]
        assert (unit.A.shape, unit.B.shape) == ((rank, one.D_IN), (one.D_OUT, rank))
        expected = lora.lora_output(x, module.weight, module.bias, unit.A, unit.B, alpha)
        one.close(one.run(module, {role: unit}, x), expected)


@pytest.mark.parametrize(("init", "spread"), [("lora", 1 / math.sqrt(3 * 64)), ("gaussian", 1 / 32)])
def test_starts_have_the_spread_of_their_papers(init: str, spread: float) -> None:
    """U(-1/sqrt(D_in), 1/sqrt(D_in)) deviates by 1/sqrt(3 D_in), the paper's Gaussian by 1/R."""
    module = one.host(64, 64)
    unit = one.units({"method": "lora", "r": 32, "init": init}, [one.slot(module)], random=False)["q"]
    assert not unit.B.any()
    deviations = math.sqrt(unit.A.numel())
    assert abs(unit.A.mean()) < 4 * spread / deviations
    assert abs(unit.A.std() - spread) < 4 * spread / deviations
    largest = unit.A.abs().max()
    assert largest <= 1 / 8 if init == "lora" else largest > 3 * spread
