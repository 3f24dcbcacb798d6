"""Every method on the roles of one fused matrix equals the same method on separate matrices, joined again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapterkit.methods.base import Unit
from adapterkit.model import layouts
from tests.oracles import dora, fused, ia3, lora, mtl_lora, vera
from tests.unit import one_module as one

R, ALPHA, E = 3, 5, 4
SHAPES = [("blocks", 4, 4), ("blocks", 4, 2), ("per_head", 4, 4), ("per_group", 4, 2), ("per_group", 4, 4)]
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "r": R, "alpha": ALPHA},
    "pissa": {"method": "lora", "r": R, "alpha": ALPHA, "init": "pissa"},
    "ia3": {"method": "ia3"},
    "vera": {"method": "vera", "r": R},
    "dora": {"method": "dora", "r": R, "alpha": ALPHA},
    "dvora": {"method": "dvora", "r": R},
    "mtl_lora": {"method": "mtl_lora", "r": R, "alpha": ALPHA, "n_up": 2, "sharpness": 0.7},
}


def adapted(
    method: str, unit: Unit, W: Tensor, b: Tensor | None, t: dict[str, Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of one role by the paper; the norm of DoRA is a constant, as its section 4.3 says."""
    if method == "ia3":
        return ia3.ia3_merged_output(W, b, t["scale"])
    if method == "lora":
        return lora.lora_merged(W, t["A"], t["B"], ALPHA), b
    if method == "pissa":
        return lora.lora_merged(W - lora.lora_delta(unit.A0, unit.B0, ALPHA), t["A"], t["B"], ALPHA), b
    if method == "mtl_lora":
        return mtl_lora.mtl_lora_merged(W, t["A"], t["B"], t["L"], t["w"], 0.7, ALPHA / R), b
    if method == "dora":
        changed = lora.lora_merged(W, t["A"], t["B"], ALPHA)
    else:
        changed = vera.vera_merged(W, t["shared.A"], t["shared.B"], t["d"], t["b"])
        if method == "vera":
            return changed, b
    return (t["m"] / dora.row_norms(changed).detach())[:, None] * changed, b


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("roles", ["qkv", "qv", "k"])
@pytest.mark.parametrize("kind", ["linear", "without-bias", "conv1d"])
@pytest.mark.parametrize(("layout", "H", "K"), SHAPES)
def test_fused_projections(method: str, roles: str, kind: str, layout: str, H: int, K: int) -> None:
    module = one.host(7, (H + 2 * K) * E, bias=kind != "without-bias", transposed=kind == "conv1d")
    rows = layouts.split((H + 2 * K) * E, layout, fused.ROLES, H, K)
    units = one.units(METHODS[method], [one.slot(module, role, rows[role]) for role in roles])
    weights = dict(zip(fused.ROLES, fused.split(one.weight(module), layout, H, K, E), strict=True))
    biases: dict[str, Tensor | None] = dict.fromkeys(fused.ROLES)
    if module.bias is not None:
        biases |= dict(zip(fused.ROLES, fused.split(module.bias, layout, H, K, E), strict=True))

    copies = {role: one.leaves(unit) for role, unit in units.items()}
    for role, unit in units.items():
        weights[role], biases[role] = adapted(method, unit, weights[role], biases[role], copies[role])
        one.assert_merges_to(module, unit, weights[role], biases[role], rows[role])
    bias = None if module.bias is None else fused.join(*biases.values(), layout, H, K, E)
    x = one.tokens(7)
    other = x.detach().clone().requires_grad_()
    expected = lora.linear_output(other, fused.join(*weights.values(), layout, H, K, E), bias)
    compare(module, units, copies, x, other, expected)


def compare(
    module: nn.Module,
    units: dict[str, Unit],
    copies: dict[str, dict[str, Tensor]],
    x: Tensor,
    other: Tensor,
    expected: Tensor,
) -> None:
    """Output and all gradients of several units on one host."""
    found = one.run(module, units, x)
    one.close(found, expected)
    along = torch.randn(found.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (found * along).sum().backward()
    (expected * along).sum().backward()
    one.close(x.grad, other.grad)
    for role, unit in units.items():
        for name, parameter in unit.named_parameters():
            one.close(parameter.grad, copies[role][name].grad)


@pytest.mark.parametrize("method", METHODS)
def test_gate_and_up(method: str) -> None:
    module = one.host(7, 16)
    rows = layouts.split(16, "blocks", ("gate", "up"))
    units = one.units(METHODS[method], [one.slot(module, role, rows[role]) for role in ("gate", "up")])
    copies = {role: one.leaves(unit) for role, unit in units.items()}
    halves = {"gate": slice(0, 8), "up": slice(8, 16)}
    parts = [
        adapted(method, unit, module.weight[halves[role]], module.bias[halves[role]], copies[role])
        for role, unit in units.items()
    ]
    x = one.tokens(7)
    other = x.detach().clone().requires_grad_()
    weight, bias = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
    compare(module, units, copies, x, other, lora.linear_output(other, weight, bias))
