"""AdapterFusion in models: against hand-patched forwards, what is trained, recorded, saved and refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.errors import AdapterkitError, CompositionError, ConfigError, NotAttachedError, PlanError
from tests.laws.branch_cases import randomise
from tests.laws.matrix import run
from tests.laws.test_branches_patched import FAMILIES
from tests.models import tiny
from tests.oracles import bottleneck, fusion

BOTTLENECK = {"method": "bottleneck", "reduction_factor": 4, "non_linearity": "gelu"}
KINDS: dict[str, dict[str, Any]] = {
    "double": {},
    "mlp": {"locations": ("mlp",), "original_ln_before": True},
    "parallel": {"is_parallel": True, "scaling": 2.0},
    "plus": {"original_ln_before": True, "original_ln_after": False, "residual_before_ln": False},
}
CONFIGS: list[Any] = [
    "dynamic",
    "static",
    {"query_before_ln": True, "residual_before": True},
    {"adds_stream": True},
    {"partial": True},
]


def fused(
    model: nn.Module,
    options: dict[str, Any],
    config: Any = "dynamic",
    names: str = "ab",
    without: Mapping[str, list[str]] | None = None,
) -> ak.Kit:
    """Adapters a, b, ... and their fusion, all away from their start. without: layers that one lacks."""
    for seed, name in enumerate(names):
        own = {**BOTTLENECK, **options, "leave_out": (without or {}).get(name, [])}
        kit = ak.attach(model, own, name=name, seed=seed, head=False)
        randomise(kit, name, seed=seed)
    kit.fuse(*names, config=config, seed=9)
    randomise(kit, "+".join(names), seed=9)
    kit.activate(ak.Fuse(*names))
    return kit


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", ["bert", "llama", "t5"])
def test_a_fusion_equals_a_forward_that_was_written_by_hand(row: str, kind: str, config: Any) -> None:
    options = KINDS[kind]
    model, plain = (tiny.build(row, dtype=torch.float64) for _ in range(2))
    given = tiny.inputs(row, padded=False)
    patch, stacks, _ = FAMILIES[row]
    partial = isinstance(config, dict) and config.get("partial")
    lacks = {"b": [f"{stack}.0" for stack in stacks], "c": [f"{stack}.1" for stack in stacks]}
    kit = fused(model, options, config, "abc", lacks if partial else None)
    states = [kit[name].state_dict() for name in ("a", "b", "c", "a+b+c")]
    weights: dict[str, Tensor] = {}

    def acting(layer: str) -> Any:
        def act(sublayer: str, h: Tensor, x: Tensor, norm: Any) -> Tensor:
            start = f"{layer}.{sublayer}."
            *children, own = (
                {key.removeprefix(start): v for key, v in state.items() if key.startswith(start)}
                for state in states
            )
            children = [child for child in children if child]
            if not children:
                return norm(h + x)
            z = x if options.get("is_parallel") else norm(h + x) if options.get("original_ln_before") else h
            residual = z if options.get("residual_before_ln") is False else h
            outputs = [bottleneck.update(z, t, "gelu", options.get("scaling", 1.0)) for t in children]
            more = dict(config) if isinstance(config, dict) else {}
            assert len(children) == 3 - bool(more.pop("partial", False))
            query = h if more.pop("query_before_ln", False) else z
            # of parallel adapters: the stream is the residual, and the branch is added behind
            beside = h if more.pop("adds_stream", False) and options.get("is_parallel") else None
            residual = residual if beside is None else x
            out, weights[start[:-1]] = fusion.fuse(query, outputs, residual, own, **more)
            out = out if beside is None else out + beside
            return norm(out + x) if options.get("original_ln_after", True) else out

        return act

    with torch.no_grad():
        for stack, path in stacks.items():
            for index, layer in enumerate(plain.get_submodule(path)):
                patch(layer, acting(f"{stack}.{index}"))
        expected = run(plain, given)
        with kit.record() as record:
            found = run(model, given)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert record.fusion.keys() == weights.keys()
    for address, (share,) in record.fusion.items():
        torch.testing.assert_close(share, weights[address], rtol=1e-9, atol=1e-9)
        assert share.std() > 1e-4
    assert kit._runtime.override.flow == {}
    kit.activate("a")
    assert not torch.allclose(run(model, given), found, atol=1e-3)
    kit.activate(None)
    assert torch.equal(run(model, given), run(tiny.build(row, dtype=torch.float64), given))


def test_what_is_trained_and_the_loss_that_holds_the_values() -> None:
    model, given = tiny.build("bert"), tiny.inputs("bert")
    kit = fused(model, {})
    kit.freeze("a", "b")
    own = {id(t): name for name, t in kit["a+b"].named_parameters()}
    values = [t.detach() for name, t in kit["a+b"].named_parameters() if name.endswith("value.weight")]
    assert len(values) == 4
    found = kit.fusion_loss()
    assert abs(found.item() - fusion.loss(values)) < 1e-4 * found.item()
    (run_loss(model, given) + found).backward()
    got = {own.get(id(t), "other") for t in model.parameters() if t.grad is not None and t.grad.any()}
    # a bias of the keys adds the same to every score: its gradient is zero but for rounding
    assert {name for name in own.values() if not name.endswith("key.bias")} <= got <= set(own.values())


def run_loss(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    return tiny.output(model(**given)).square().sum()


def test_a_fusion_is_saved_and_loaded_alone(tmp_path: Path) -> None:
    model, given = tiny.build("bert"), tiny.inputs("bert")
    kit = fused(model, KINDS["mlp"])
    output = run(model, given)
    for name in ("a", "b", "a+b"):
        kit.save(tmp_path / name.replace("+", "_"), name)
    other = tiny.build("bert")
    with pytest.raises(PlanError) as refused:
        ak.load(other, tmp_path / "a_b")
    assert refused.value.code == "no-such-adapter"
    for name in ("a", "b", "a_b"):
        kit = ak.load(other, tmp_path / name, trainable=True)
    assert list(kit) == ["a", "b", "a+b"]
    assert kit.active == ak.Fuse("a", "b")
    assert torch.equal(run(other, given), output)


def refused(kind: type[AdapterkitError], code: str, call: Any, *args: Any, **options: Any) -> None:
    with pytest.raises(kind) as error:
        call(*args, **options)
    assert error.value.code == code


@pytest.mark.parametrize("config", ["static", {"regularization": False}], ids=str)
def test_values_that_nothing_holds_have_no_loss(config: Any) -> None:
    kit = fused(tiny.build("bert"), KINDS["mlp"], config)
    refused(ConfigError, "bad-option", kit.fusion_loss)


def test_what_is_refused() -> None:
    model = tiny.build("bert")
    given = tiny.inputs("bert")
    kit = fused(model, {})
    output = run(model, given)
    refused(CompositionError, "bad-setup", ak.Fuse, "a")
    refused(CompositionError, "bad-setup", ak.Fuse, "a", "a")
    refused(CompositionError, "bad-setup", kit.activate, "a+b")
    refused(NotAttachedError, "no-fusion", kit.activate, ak.Fuse("b", "a"))
    refused(CompositionError, "no-fusion", kit.activate, ak.Fuse("b", "a", name="a+b"))
    refused(NotAttachedError, "no-such-adapter", kit.fuse, "a", "c")
    refused(ConfigError, "unknown-method", kit.fuse, "a", "b", config="dinamic", name="f")
    refused(ConfigError, "name-taken", kit.fuse, "a", "b")
    kit.attach("lora", name="l", activate=False)
    refused(PlanError, "nothing-selected", kit.fuse, "a", "l")
    for child in ("a", "b"):
        refused(PlanError, "in-use", kit.detach, child)
        refused(PlanError, "in-use", kit.attach, "seq_bn", name=child, replace=True)
    assert kit.active == ak.Fuse("a", "b")
    assert torch.equal(run(model, given), output), "a refusal changed something"
    kit.activate("a")
    refused(NotAttachedError, "not-active", kit.fusion_loss)
    kit.fuse("a", "b", config="static", name="s")
    kit.activate(ak.Fuse("a", "b", name="s"))
    refused(ConfigError, "bad-option", kit.fusion_loss)


def test_leaving() -> None:
    model, given = tiny.build("bert"), tiny.inputs("bert")
    keys, bare = list(model.state_dict()), run(model, given)
    kit = fused(model, {})
    kit.detach("a+b")
    assert list(kit) == ["a", "b"] and kit.active is None
    assert torch.equal(run(model, given), bare)
    kit.detach("a")
    kit.detach("b")
    assert list(model.state_dict()) == keys
    assert torch.equal(run(model, given), bare)


def test_adapters_before_the_norm_are_fused_there() -> None:
    """Identical adapters: their fusion, whose values start as they are, gives what one of them gives."""
    model, given = tiny.build("gemma2", dtype=torch.float64), tiny.inputs("gemma2", padded=False)
    before = {**BOTTLENECK, "branch": "before_norm"}
    for name in "ab":
        kit = ak.attach(model, before, name=name, seed=3, head=False)
        randomise(kit, name, seed=3)
    kit.fuse("a", "b", config="static", seed=9)
    kit.activate("a")
    alone = run(model, given)
    kit.activate(ak.Fuse("a", "b"))
    assert torch.allclose(run(model, given), alone, atol=1e-9)
    ak.attach(model, BOTTLENECK, name="c", head=False)
    with pytest.raises(PlanError) as caught:
        kit.fuse("a", "c")
    assert (caught.value.code, caught.value.address) == ("nothing-selected", "branch")


@pytest.mark.parametrize("other", ["seq_bn_inv", "double_seq_bn", "seq_bn|lora[targets=q]"])
def test_adapters_that_also_act_elsewhere_are_refused(other: str) -> None:
    """Inside the fusion what they have elsewhere would silently not act."""
    model, given = tiny.build("bert"), tiny.inputs("bert")
    kit = ak.attach(model, "seq_bn", name="a", activate=False)
    kit.attach(other, name="b", activate=False)
    before = run(model, given)
    with pytest.raises(PlanError) as caught:
        kit.fuse("a", "b")
    assert caught.value.code == "not-fused" and caught.value.address == "b"
    assert sorted(kit) == ["a", "b"] and torch.equal(run(model, given), before)


def test_a_partial_fusion_where_some_do_not_act(tmp_path: Path) -> None:
    """Also where only one acts, or none that the fusion has weights for; of bottlenecks and of updates."""
    for method, place in (
        ("seq_bn[dropout=0]", "encoder.{}.mlp"),
        ("lora[targets=[q]]", "encoder.{}.attention.q"),
    ):
        model, given = tiny.build("bert"), tiny.inputs("bert")
        for name, layer in (("a", "encoder.0"), ("b", "encoder.1")):
            kit = ak.attach(model, f"{method[:-1]}, leave_out=[{layer}]]", name=name, head=False)
            randomise(kit, name)
        with pytest.raises(PlanError):
            kit.fuse("a", "b")
        kit.fuse("a", "b", config={"partial": True, "value": False, "regularization": False})
        kit.activate(ak.Fuse("a", "b"))
        with kit.record() as record:
            found = run(model, given)
        assert sorted(record.fusion) == [place.format(0), place.format(1)]
        assert all(bool((share == 1).all()) for (share,) in record.fusion.values())
        # one adapter has all of the weight in each layer, so that it is as if both were stacked
        with kit.using(ak.Stack("a", "b")):
            torch.testing.assert_close(found, run(model, given), rtol=1e-5, atol=1e-5)
        kit.save(tmp_path / method[:4], setup=ak.Fuse("a", "b"))
        again = ak.load(tiny.build("bert"), tmp_path / method[:4])
        assert torch.equal(run(again.model, given), found)
