"""Unions: what is attached together does what its members do one after the other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import adapterkit as ak
from tests.laws.branch_cases import randomise
from tests.laws.matrix import run
from tests.models import tiny

PAR = "par_bn[non_linearity=gelu]"
ROWS = ["bert", "llama", "t5", "vit"]


@torch.no_grad()
def copied(kit: ak.Kit, source: str, target: str, start: str) -> None:
    """Give an adapter the tensors of one member of a union."""
    tensors = dict(kit[source].named_parameters())
    for name, tensor in kit[target].named_parameters():
        tensor.copy_(tensors[f"{start}{name}"])


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("index", [0, 1])
def test_a_union_with_one_member_still_at_its_start_is_the_other(row: str, index: int) -> None:
    """LoRA and a parallel bottleneck change nothing at first."""
    model, given = tiny.build(row), tiny.inputs(row)
    bare = run(model, given)
    kit = ak.attach(model, f"lora|{PAR}", name="u", seed=0)
    assert torch.equal(run(model, given), bare)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in kit["u"].named_parameters():
            if name.startswith(f"{index}:"):
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    kit.attach(("lora", PAR)[index], name="alone", seed=5, activate=False)
    copied(kit, "u", "alone", f"{index}:")
    together = run(model, given)
    assert not torch.allclose(together, bare, atol=1e-3)
    kit.activate("alone")
    assert torch.equal(run(model, given), together)


def test_order_does_not_matter_where_places_differ() -> None:
    given = tiny.inputs("llama")
    outputs = []
    for text in (f"lora|{PAR}", f"{PAR}|lora"):
        kit = ak.attach(tiny.build("llama"), text, seed=0)
        with torch.no_grad():
            for name, tensor in kit["default"].named_parameters():
                generator = torch.Generator().manual_seed(sum(map(ord, name.partition(":")[2])))
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
        outputs.append(run(kit.model, given))
    assert torch.equal(*outputs)


def test_two_bottlenecks_at_one_branch_act_one_after_the_other() -> None:
    """h -> h + f(h), then the same with g on what came out."""
    model, given = tiny.build("llama", dtype=torch.float64), tiny.inputs("llama", padded=False)
    one = "bottleneck[locations=mlp,non_linearity=gelu]"
    kit = ak.attach(model, f"{one}|{one}", seed=0)
    randomise(kit)
    plain = tiny.build("llama", dtype=torch.float64)
    state = kit["default"].state_dict()
    for index, layer in enumerate(plain.layers):
        layer.mlp.register_forward_hook(lambda _, args, h, index=index: chain(state, index, h))
    torch.testing.assert_close(run(model, given), run(plain, given), rtol=1e-9, atol=1e-9)


def chain(state: dict[str, torch.Tensor], layer: int, h: torch.Tensor) -> torch.Tensor:
    for member in (0, 1):
        t = {name: state[f"{member}:decoder.{layer}.mlp.{name}"] for name in NAMES}
        inner = nn.functional.gelu(h @ t["down.weight"].T + t["down.bias"])
        h = h + inner @ t["up.weight"].T + t["up.bias"]
    return h


NAMES = ("down.weight", "down.bias", "up.weight", "up.bias")


@pytest.mark.parametrize(
    "text", ["compacter[reduction_factor=4]|invertible", "lora|loreft|par_bn", "vera|compacter++"]
)
def test_shared_tensors_of_members_come_back(text: str, tmp_path: Path) -> None:
    if "compacter++" in text:
        text = text.replace("compacter++", "compacter++[reduction_factor=4]")
    model, given = tiny.build("bert"), tiny.inputs("bert")
    kit = ak.attach(model, text, seed=0)
    randomise(kit)
    output = run(model, given)
    kit.save(tmp_path / "u")
    other = tiny.build("bert")
    loaded = ak.load(other, tmp_path / "u", trainable=True)
    assert loaded["default"].config == kit["default"].config
    assert torch.equal(run(other, given), output)


def test_a_union_is_left_as_a_whole() -> None:
    model, given = tiny.build("bert"), tiny.inputs("bert")
    keys, bare = list(model.state_dict()), run(model, given)
    kit = ak.attach(model, f"lora|{PAR}|loreft", seed=0)
    randomise(kit)
    kit.attach("seq_bn", name="other", activate=False)
    assert not torch.equal(run(model, given), bare)
    kit.detach("default")
    kit.detach("other")
    assert list(model.state_dict()) == keys
    assert torch.equal(run(model, given), bare)
