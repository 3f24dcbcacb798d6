"""Fusions of Stacks: against forwards that were written by hand, saved, refused, and beside other blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import adapterkit as ak
from adapterkit.composition import Average, Fuse, Parallel, Route, Setup, Split, Stack
from adapterkit.errors import CompositionError
from tests.laws.composition_cases import BATCH, assert_rows
from tests.laws.matrix import run
from tests.laws.test_branches_patched import FAMILIES
from tests.laws.test_fusion import KINDS, fused
from tests.models import tiny
from tests.oracles import bottleneck, fusion
from tests.oracles.bottleneck import Form
from tests.unit.kit_scene import refused

FORMS = {
    "double": Form(),
    "mlp": Form(reads_sum=True),
    "plus": Form(reads_sum=True, residual="read", model_adds=False),
}
SETUPS: dict[str, Setup] = {
    "first": Fuse(Stack("a", "b"), "c"),
    "last": Fuse("c", Stack("a", "b")),
    "both": Fuse(Stack("a", "c", "b"), Stack("b", "c")),
    "behind another": Stack("d", Fuse(Stack("a", "b"), "c")),
}
Tensors = Mapping[str, Tensor]


def nested(row: str, kind: str, setup: Setup) -> ak.Kit:
    """Adapters a to d with the fusion that the setup needs, moved away from its start."""
    kit = fused(tiny.build(row, dtype=torch.float64), KINDS[kind], names="abcd")
    block = setup if isinstance(setup, Fuse) else setup.children[-1]  # type: ignore[union-attr]
    assert isinstance(block, Fuse)
    kit.fuse(*block.children, seed=4)
    with torch.no_grad():
        for tensor in kit[block.name].parameters():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(5)))
    return kit


def left(h: Tensor, x: Tensor, t: Tensors, form: Form, norm: Any) -> Tensor:
    """The branch that a bottleneck leaves for the next one."""
    alone = replace(form, model_adds=False)
    return bottleneck.sublayer(h, x, t, alone, lambda h, x: norm(h + x), "gelu")


def mixed(chains: list[list[Tensors]], own: Tensors, form: Form, h: Tensor, x: Tensor, norm: Any) -> Tensor:
    """What a fusion makes of a branch h: every adapter acts on what those before it in its chain leave."""

    def read(branch: Tensor) -> Tensor:
        return norm(branch + x) if form.reads_sum else branch

    outputs = []
    for *before, end in chains:
        branch = h
        for t in before:
            branch = left(branch, x, t, form, norm)
        outputs.append(bottleneck.update(read(branch), end, "gelu"))
    residual = read(h) if form.residual == "read" else h
    return fusion.fuse(read(h), outputs, residual, own)[0]


@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS)
@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("row", ["bert", "llama"])
def test_it_equals_a_forward_that_was_written_by_hand(row: str, kind: str, setup: Any) -> None:
    plain, given, form = tiny.build(row, dtype=torch.float64), tiny.inputs(row, padded=False), FORMS[kind]
    kit = nested(row, kind, setup)
    block = setup if isinstance(setup, Fuse) else setup.children[-1]
    chains = [child.children if isinstance(child, Stack) else (child,) for child in block.children]
    states = {name: kit[name].state_dict() for name in kit}

    def acting(layer: str) -> Any:
        def act(sublayer: str, h: Tensor, x: Tensor, norm: Any) -> Tensor:
            start = f"{layer}.{sublayer}."
            t = {
                name: {key.removeprefix(start): v for key, v in state.items() if key.startswith(start)}
                for name, state in states.items()
            }
            if not t["a"]:
                return norm(h + x)  # type: ignore[no-any-return]
            if setup is not block:
                h = left(h, x, t["d"], form, norm)
            out = mixed([[t[name] for name in chain] for chain in chains], t[block.name], form, h, x, norm)
            return norm(out + x) if form.model_adds else out  # type: ignore[no-any-return]

        return act

    patch, stacks, _ = FAMILIES[row]
    with torch.no_grad():
        for stack, path in stacks.items():
            for index, layer in enumerate(plain.get_submodule(path)):
                patch(layer, acting(f"{stack}.{index}"))
    with kit.using(setup):
        found = run(kit.model, given)
    torch.testing.assert_close(found, run(plain, given), rtol=1e-9, atol=1e-9)
    with kit.using(Fuse(*block.fused)):
        flat = run(kit.model, given)
    assert not torch.allclose(found, flat, atol=1e-3)
    assert kit._runtime.override.flow == {}


def test_one_fusion_serves_its_adapters_alone_and_in_stacks(tmp_path: Path) -> None:
    kit, given = nested("bert", "double", SETUPS["first"]), tiny.inputs("bert")
    assert kit["b+c"].config.to_dict()["children"] == ["b", "c"]
    setup = SETUPS["first"]
    kit.activate(setup)
    expected = run(kit.model, given)
    assert kit.fusion_loss() > 0
    kit.save(tmp_path / "all", setup=setup)
    other = tiny.build("bert", dtype=torch.float64)
    loaded = ak.load(other, tmp_path / "all")
    assert loaded.active == setup and sorted(loaded) == ["a", "b", "b+c", "c"]
    assert torch.equal(run(other, given), expected)
    loaded.activate(Fuse("b", "c"))
    assert not torch.allclose(run(other, given), expected, atol=1e-3)


def test_beside_other_blocks_every_row_is_what_its_example_gets_alone() -> None:
    kit, given = nested("bert", "mlp", SETUPS["first"]), tiny.inputs("bert", "BertModel", batch=BATCH)
    inner = SETUPS["first"]
    for setup in (Parallel(inner, "a"), Route(inner, "d"), Stack("d", Parallel("a", inner))):
        assert_rows(kit, setup, given)
    with kit.using(Average(inner, "d", weights=[1, 0])):
        mean = run(kit.model, given)
    with kit.using(inner):
        assert torch.equal(run(kit.model, given), mean)
    with kit.using(Split(inner, inner, splits=[3, mean.numel()]), skip_layers=[0, 1]):
        pass  # it has a meaning: all of it acts position by position


def test_what_is_refused() -> None:
    kit = nested("bert", "double", SETUPS["first"])
    refused(CompositionError, "bad-nesting", Fuse, "a", Parallel("b", "c"))
    refused(CompositionError, "bad-nesting", Fuse, "a", Stack("b", Stack("c")))
    refused(CompositionError, "bad-setup", Fuse, Stack("a", "c"), Stack("b", "c"))
    refused(CompositionError, "no-fusion", kit.activate, Fuse(Stack("a", "c"), "b", name="b+c"))
    kit.attach("par_bn|double_seq_bn[locations=attention]", name="p", activate=False)
    kit.attach("double_seq_bn", name="s", activate=False).fuse("s", "p")
    problem = refused(CompositionError, "not-fused", kit.activate, Fuse("s", Stack("a", "p")))
    assert problem.problems[0].address == "encoder.0.mlp"
    kit.activate(Fuse("s", "p"))
    kit.attach("seq_bn_inv", name="e", activate=False)
    problem = refused(CompositionError, "not-fused", kit.activate, Fuse(Stack("e", "b"), "c"))
    assert problem.problems[0].address == "e"
