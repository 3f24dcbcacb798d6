"""One host with units on it, in float64 and without a model around it, for the tests of methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapterkit.methods.base import SlotConfig, Unit
from adapterkit.methods.names import parse
from adapterkit.model.blueprint import Slot
from adapterkit.model.layouts import Rows

D_IN, D_OUT = 6, 9


def host(d_in: int = D_IN, d_out: int = D_OUT, *, bias: bool = True, transposed: bool = False) -> nn.Module:
    """A frozen linear map, Linear or Conv1D (whose weight is stored as (D_in, D_out))."""
    module = Conv1D(d_out, d_in) if transposed else nn.Linear(d_in, d_out, bias=bias)
    generator = torch.Generator().manual_seed(1)
    for parameter in module.double().parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return module.requires_grad_(False)


def weight(module: nn.Module) -> Tensor:
    """(D_out, D_in)."""
    return module.weight.t() if isinstance(module, Conv1D) else module.weight


def slot(module: nn.Module, role: str = "q", rows: Rows | None = None) -> Slot:
    d_out, d_in = weight(module).shape
    sublayer = "mlp" if role in ("gate", "up", "down") else "attention"
    return Slot(
        f"decoder.0.{sublayer}.{role}",
        role,
        "decoder",
        0,
        sublayer,
        module,
        "layers.0.host",
        (d_out if rows is None else rows.total, d_in),
        rows,
        isinstance(module, Conv1D),
    )


def units(method: Any, slots: Sequence[Slot], *, random: bool = True, seed: int = 2) -> dict[str, Unit]:
    """Units by role, in float64; moved away from their start unless `random` is false."""
    config = parse(method)
    assert isinstance(config, SlotConfig)
    config.check(slots)
    shared = config.share(slots, torch.Generator().manual_seed(seed))
    if shared is not None:
        shared.double()
    built = {found.role: config.build(found, shared, torch.Generator().manual_seed(seed)) for found in slots}
    generator = torch.Generator().manual_seed(seed + 1)
    for unit in built.values():
        unit.double().eval()
        for parameter in unit.parameters() if random else ():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data = parameter.data + 0.5 * noise
    return built


def run(module: nn.Module, found: Mapping[str, Unit], x: Tensor) -> Tensor:
    """What the host gives with its units, as a site calls them."""
    for unit in found.values():
        if unit.acts_on == "input":
            x = unit(x, module)
    out = module(x)
    for unit in found.values():
        if unit.acts_on == "output":
            out = unit(out, x, module)
    return out


def tokens(d_in: int = D_IN, *, seed: int = 4) -> Tensor:
    """x (B, T, D_in) that wants a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 5, d_in, generator=generator, dtype=torch.float64).requires_grad_()


def leaves(unit: Unit) -> dict[str, Tensor]:
    """Copies of the tensors of a unit, for an oracle to differentiate."""
    copies = {name: tensor.detach().clone().requires_grad_() for name, tensor in unit.named_parameters()}
    owner = getattr(unit, "owner", None)
    if owner is not None:
        copies |= {f"shared.{name}": tensor.detach().clone() for name, tensor in owner[0].named_parameters()}
    return copies


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def assert_same_function(
    module: nn.Module, unit: Unit, expected: Tensor, x: Tensor, other_x: Tensor, copies: Mapping[str, Tensor]
) -> None:
    """Output and gradients of input and tensors agree; `expected` is a function of `other_x` and `copies`."""
    found = run(module, {"": unit}, x)
    close(found, expected)
    generator = torch.Generator().manual_seed(5)
    along = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    (found * along).sum().backward()
    (expected * along).sum().backward()
    close(x.grad, other_x.grad)
    own = dict(unit.named_parameters())
    assert own
    for name, parameter in own.items():
        assert parameter.grad is not None and parameter.grad.any(), name
        close(parameter.grad, copies[name].grad)
    assert all(parameter.grad is None for parameter in module.parameters())


def assert_merges_to(
    module: nn.Module, unit: Unit, expected: Tensor, bias: Tensor | None, rows: Rows | None = None
) -> None:
    """The unit's merged weight and bias are those expected of its role."""
    own, own_bias = weight(module), module.bias
    if rows is not None:
        own, own_bias = rows.take(own), None if own_bias is None else rows.take(own_bias)
    found, found_bias = unit.merged(own, own_bias)
    close(found, expected)
    assert (found_bias is None) == (bias is None)
    if bias is not None:
        close(found_bias, bias)
