"""`kit.record()` keeps what gates let through: by their formula, by address, in this thread alone."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from tests.laws.matrix import run
from tests.models import tiny

INPUTS = tiny.inputs("bert", "BertModel")


def attached(method: Any) -> ak.Kit:
    kit = ak.attach(tiny.build("bert", "BertModel"), method, seed=0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in kit["default"].parameters():
            tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
    return kit


def seen(kit: ak.Kit, path: str) -> Tensor:
    """What a module of the model reads in a pass."""
    found: list[Tensor] = []
    hook = kit.model.get_submodule(path).register_forward_pre_hook(
        lambda _, args: found.append(args[0].detach())
    )
    run(kit.model, INPUTS)
    hook.remove()
    return found[0]


def expected(gate: nn.Module, x: Tensor) -> Tensor:
    """The mean over tokens of sigmoid(w x + c): (B,)."""
    scores = 1 / (
        1 + torch.exp(-(torch.einsum("btd,d->bt", x.double(), gate.weight[0].double()) + gate.bias.double()))
    )
    return scores.mean(dim=1)


@pytest.mark.parametrize(
    ("method", "address", "path"),
    [
        ("lora[gating=true]", "encoder.0.attention.q", "encoder.layer.0.attention.self.query"),
        ("ia3[gating=true]", "encoder.1.mlp.down", "encoder.layer.1.output.dense"),
    ],
)
def test_gates_of_linear_maps(method: str, address: str, path: str) -> None:
    kit = attached(method)
    x = seen(kit, path)
    with kit.record() as record:
        run(kit.model, INPUTS)
        run(kit.model, INPUTS)
    run(kit.model, INPUTS)
    assert set(record.gates) == set(kit["default"].units) and not record.fusion
    first, second = record.gates[address]
    assert torch.equal(first, second) and not first.requires_grad
    unit: Any = kit["default"].units[address]
    torch.testing.assert_close(first.double(), expected(unit.gate, x), rtol=1e-5, atol=1e-6)
    assert first.unique().numel() == 2, "one for each example"


def test_gates_of_bottlenecks_and_prefixes() -> None:
    kit = attached("unipelt")
    with kit.record() as record:
        run(kit.model, INPUTS)
    addresses = {address.partition(":")[2] for address in kit["default"].units}
    assert set(record.gates) == addresses
    assert all(len(passes) == 1 and passes[0].shape == (2,) for passes in record.gates.values())
    x = seen(kit, "encoder.layer.0.attention.self")
    unit: Any = next(u for a, u in kit["default"].units.items() if a.startswith("0:encoder.0."))
    address = next(a for a in kit["default"].units if a.startswith("0:encoder.0.")).removeprefix("0:")
    torch.testing.assert_close(
        record.gates[address][0].double(), expected(unit.gates[0], x), rtol=1e-5, atol=1e-6
    )


def test_two_gates_of_a_prefix_have_their_own_names() -> None:
    kit = attached("prefix_tuning_flat[use_gating=true, shared_gating=false]")
    with kit.record() as record:
        run(kit.model, INPUTS)
    units = list(kit["default"].units)
    assert set(record.gates) == {f"{address}.gates.{i}" for address in units for i in (0, 1)}


def test_other_threads_keep_nothing() -> None:
    kit = attached("lora[gating=true]")
    with kit.record() as record:
        thread = threading.Thread(target=run, args=(kit.model, INPUTS))
        thread.start()
        thread.join()
    assert not record.gates
