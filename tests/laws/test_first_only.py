"""Adapters that act only as the first of a setup, as those that AdapterHub ignores elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import adapterkit as ak
from adapterkit.composition import Average, BatchSplit, Fuse, Parallel, Route, Setup, Stack
from adapterkit.errors import CompositionError
from tests.laws.branch_cases import randomise
from tests.laws.matrix import run
from tests.models import tiny
from tests.unit.kit_scene import refused

METHODS = {
    "reft": "noreft[r=2, first_only=true]",
    "bottleneck and invertible": "double_seq_bn|invertible[first_only=true]",
    "prompt": "prompt_tuning[prompt_length=3, first_only=true]",
    "prompt behind": "prompt_tuning[prompt_length=3, first_only=true, insert=out]",
    "bottleneck and prompt": "double_seq_bn|prompt_tuning[prompt_length=3, first_only=true]",
}


def scene(method: str) -> tuple[ak.Kit, dict[str, torch.Tensor]]:
    """A LoRA a, the method b, and c, which is b without what acts only first."""
    model = tiny.build("bert", "BertForMaskedLM")
    kit = ak.attach(model, "lora", name="a", seed=0)
    kit.attach(method, name="b", seed=1)
    for name in "ab":
        randomise(kit, name, seed=3)
    if "|" in method:
        kit.attach("double_seq_bn", name="c", seed=2)
        own = kit["b"].state_dict()
        with torch.no_grad():
            for key, tensor in kit["c"].state_dict().items():
                tensor.copy_(own[f"0:{key}"])
    return kit, tiny.inputs("bert", "BertForMaskedLM")


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_it_acts_alone_and_first_and_nowhere_else(method: str) -> None:
    kit, given = scene(method)

    def under(setup: Setup | None) -> torch.Tensor:
        with kit.using(setup):
            return run(kit.model, given)

    rest: tuple[str, ...] = ("c",) if "c" in kit else ()
    assert not torch.allclose(under("b"), under(rest[0] if rest else None), atol=1e-3)
    assert torch.equal(under(Stack("a", "b")), under(Stack("a", *rest)))
    assert torch.equal(under(Stack(Stack("a"), Stack("b"))), under(Stack("a", *rest)))
    assert not torch.allclose(under(Stack("b", "a")), under(Stack(*rest, "a")), atol=1e-3)
    assert torch.equal(under(Stack("a", Average("b"))), under(Stack("a", *rest)))


@pytest.mark.parametrize(
    "setup",
    [Parallel("b", "a"), Parallel("a", "b"), Route("a", "b"), BatchSplit("b", "a", batch_sizes=1)],
    ids=repr,
)
def test_without_a_first_adapter_it_is_refused(setup: Setup) -> None:
    kit, _ = scene(METHODS["reft"])
    problem = refused(CompositionError, "undefined-block", kit.activate, setup)
    assert "encoder.0.layer" in str(problem)
    assert kit.active == "b"


def test_it_is_saved_with_its_option(tmp_path: Path) -> None:
    kit, given = scene(METHODS["reft"])
    kit.activate(Stack("a", "b"))
    expected = run(kit.model, given)
    kit.save(tmp_path / "both", setup=Stack("a", "b"))
    other = tiny.build("bert", "BertForMaskedLM")
    assert ak.load(other, tmp_path / "both")["b"].config.to_dict()["first_only"] is True
    assert torch.equal(run(other, given), expected)


def test_in_the_files_of_adapterhub_every_adapter_has_it(tmp_path: Path) -> None:
    """Their format says nothing of it: written alone, it is read as what acts alone."""
    kit, given = scene(METHODS["reft"])
    kit.activate("b")
    expected = run(kit.model, given)
    kit.save(tmp_path / "b", "b", format="adapterhub")
    other = tiny.build("bert", "BertForMaskedLM")
    assert ak.load(other, tmp_path / "b")["b"].config.to_dict()["first_only"] is False
    torch.testing.assert_close(run(other, given), expected)


def test_in_a_fusion_it_does_not_act() -> None:
    """No adapter in a Fuse is the first of a setup, so that nothing of it is left out behind another one."""
    kit, given = scene(METHODS["bottleneck and invertible"])
    outputs = []
    for other in ("b", "c"):
        kit.attach("double_seq_bn", name="d", seed=5, activate=False, replace="d" in kit)
        randomise(kit, "d", seed=5)
        kit.fuse(other, "d", seed=6).activate(Stack("a", Fuse(other, "d")))
        outputs.append(run(kit.model, given))
        kit.activate("a")
        kit.detach(f"{other}+d")
    assert torch.equal(*outputs)
    kit.fuse("b", "d", seed=6)
    for alone in (Fuse("b", "d"), Fuse(Stack("c", "b"), "d")):
        refused(CompositionError, "undefined-block", kit.activate, alone)
