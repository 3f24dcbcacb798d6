"""Units that compute their host as well, by the formulas of the papers, whichever way costs less."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapterkit.methods import one_weight
from tests.oracles import dora, lora, vera
from tests.unit import one_module as one

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "r": 3, "alpha": 5},
    "vera": {"method": "vera", "r": 16, "alpha": 5},
    "dora": {"method": "dora", "r": 1, "alpha": 5},
    "dora-wide": {"method": "dora", "r": 6, "alpha": 5},
    "dvora": {"method": "dvora", "r": 16, "alpha": 5},
    "dvora-quirks": {"method": "dvora", "r": 16, "alpha": 5, "norm_scaled": False, "scale_bias": True},
}
# with gradients, without
AT_ONCE = {
    "lora": (False, False),
    "vera": (True, True),
    "dora": (False, True),
    "dora-wide": (True, True),
    "dvora": (True, True),
    "dvora-quirks": (True, True),
}


@pytest.fixture(autouse=True)
def as_if_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small maps go the way of large ones."""
    monkeypatch.setattr(one_weight, "SMALL", 0)


def expected(name: str, x: Tensor, module: nn.Module, t: dict[str, Tensor]) -> Tensor:
    """By the papers, with the norm of DoRA as a constant (section 4.3)."""
    method = METHODS[name]
    scaling = method["alpha"] / method["r"]
    if "vera" in name or "dvora" in name:
        low = vera.vera_delta(t["shared.A"], t["shared.B"], t["d"], scaling * t["b"], one.D_IN)
    else:
        low = lora.lora_delta(t["A"], t["B"], method["alpha"])
    weight, bias = one.weight(module) + low, module.bias
    if "m" in t:
        quirk = name == "dvora-quirks"
        gain = t["m"] / dora.row_norms(one.weight(module) + (low / scaling if quirk else low)).detach()
        weight, bias = gain[:, None] * weight, gain * bias if quirk and bias is not None else bias
    return lora.linear_output(x, weight, bias)


def cast(unit: Any, dtype: torch.dtype) -> Any:
    """The unit, with what it shares."""
    for shared in getattr(unit, "owner", ()):
        shared.to(dtype)
    return unit.to(dtype)


def prepared(name: str, module: nn.Module) -> Any:
    return one.units(METHODS[name], [one.slot(module)])["q"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_host_and_unit_together(name: str, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = one.host(bias=bias)
    unit = prepared(name, module)
    assert unit.joins
    merged, calls = type(unit).merged, []
    monkeypatch.setattr(type(unit), "merged", lambda *given: calls.append(1) or merged(*given))
    monkeypatch.setattr(one_weight, "PASS", 0)
    # many tokens, so that products count
    x = torch.randn(4, 40, one.D_IN, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    copies = one.leaves(unit)
    here, there = x.clone().requires_grad_(), x.clone().requires_grad_()
    found, wanted = unit(None, here, module), expected(name, there, module, copies)
    one.close(found, wanted)
    along = torch.randn(found.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (found * along).sum().backward()
    (wanted * along).sum().backward()
    one.close(here.grad, there.grad)
    for key, parameter in unit.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), key
        one.close(parameter.grad, copies[key].grad)
    assert bool(calls) == AT_ONCE[name][0]
    calls.clear()
    with torch.no_grad():
        one.close(unit(None, x, module), wanted)
        assert bool(calls) == AT_ONCE[name][1]
        calls.clear()
        one.close(unit.train()(None, x, module), wanted)
        assert bool(calls) == AT_ONCE[name][0], (
            "a checkpointed layer does the same with gradients and without"
        )


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("bias", [True, False])
def test_at_first_they_have_the_bits_of_the_host(name: str, bias: bool) -> None:
    for d_in, d_out in ((6, 9), (32, 32), (64, 48), (1200, 900)):
        torch.manual_seed(d_in)
        module = nn.Linear(d_in, d_out, bias=bias).requires_grad_(False)
        unit = one.units(METHODS[name], [one.slot(module)], random=False)["q"]
        cast(unit, torch.float32)
        x = torch.randn(2, 40, d_in)
        for states in (x, x.transpose(0, 1), x[:1, :1]):
            for gradients in (False, True):
                with torch.set_grad_enabled(gradients):
                    assert torch.equal(unit(None, states, module), module(states))
                    assert torch.equal(unit(module(states), states, module), module(states))


@pytest.mark.parametrize("name", ["vera", "dora", "dvora"])
def test_what_half_precision_would_round_away_stays_apart(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = one.host()
    unit = prepared(name, module)
    monkeypatch.setattr(type(unit), "merged", lambda *given: pytest.fail("one weight"))
    x = one.tokens().detach()
    with torch.no_grad():
        # a dtype of its own, autocast, dropout
        cast(unit, torch.bfloat16)
        assert unit(None, x.float(), module.float()).dtype == torch.float32
        cast(unit, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            unit(None, x.float(), module)
        unit.train().dropout = 0.5
        unit(None, x.float(), module)
        cast(unit.eval(), torch.bfloat16)
        assert unit(None, x.bfloat16(), module.bfloat16()).dtype == torch.bfloat16
        # no token at all
        cast(unit, torch.float32)
        assert unit(None, x.float()[:, :0], module.float()).shape == (3, 0, one.D_OUT)


@pytest.mark.parametrize("shape", [(7, 5), (1100, 1000), (1000, 1100)])
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_norms_of_both_forms(shape: tuple[int, int], rank: int, transposed: bool) -> None:
    (d_out, d_in), generator = shape, torch.Generator().manual_seed(rank)
    weight = torch.randn(d_in, d_out, generator=generator, dtype=torch.float64).t()
    weight = weight if transposed else weight.contiguous()
    left = torch.randn(d_out, rank, generator=generator, dtype=torch.float64)
    right = torch.randn(rank, d_in, generator=generator, dtype=torch.float64)
    one.close(one_weight.norms_of_sum(weight, left, right, 0.7), dora.row_norms(weight + 0.7 * left @ right))
    nothing = torch.zeros_like(left)
    assert torch.equal(one_weight.norms_of_sum(weight, nothing, right, 0.7), one_weight.norms(weight))


@pytest.mark.parametrize("name", ["dora", "dvora"])
def test_a_row_of_zeros_has_no_direction_and_stays(name: str) -> None:
    module = one.host()
    module.weight.data[2] = 0
    unit = one.units(METHODS[name], [one.slot(module)], random=False)["q"]
    x = one.tokens()
    for found in (unit(module(x), x, module), unit(None, x, module)):
        torch.testing.assert_close(found, module(x), rtol=0, atol=0)
        found.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in unit.parameters())
    weight, bias = unit.merged(module.weight, module.bias)
    assert torch.equal(weight, module.weight) and torch.equal(bias, module.bias)


@pytest.mark.parametrize("name", METHODS)
def test_a_graph_is_for_any_number_of_tokens(name: str) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.host = one.host()
            self.unit = prepared(name, self.host)
            self.shared = nn.ModuleList(getattr(self.unit, "owner", ()))

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.unit(None, x, self.host)
            return found

    both = Both().eval()
    x = one.tokens().detach()
    graph = torch.export.export(both, (x,), dynamic_shapes=({1: torch.export.Dim("T")},)).module()
    for length in (2, 3, 200):
        x = torch.randn(3, length, one.D_IN, dtype=torch.float64)
        one.close(graph(x), expected(name, x, both.host, one.leaves(both.unit)))
