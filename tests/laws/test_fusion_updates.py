"""Fusions of LoRA and its relatives: against the oracle in float64, trained, saved, beside other blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.composition import Average, BatchSplit, Fuse, MultiTask, Parallel, Route, Setup, Split, Stack
from adapterkit.errors import AdapterkitError, ConfigError, PlanError
from tests.laws.branch_cases import randomise
from tests.laws.composition_cases import BATCH, assert_rows
from tests.laws.matrix import loss, run
from tests.models import tiny
from tests.oracles import fusion
from tests.oracles.lora import lora_delta
from tests.oracles.mtl_lora import mtl_lora_delta
from tests.oracles.vera import vera_delta
from tests.unit.kit_scene import refused

CONFIGS: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"value": False, "regularization": False, "value_initialized": False},
    "with the output": {"query_before_ln": True, "residual_before": True},
    "value behind": {"value_before_softmax": False, "key": False, "temperature": 2.0},
}
METHODS = {"a": "lora[r=3, alpha=6]", "b": "vera[r=4]", "c": "mtl_lora[r=2, n_up=2]"}
Rows = slice


def _each(path: str, address: str, layers: int, rows: Rows = slice(None)) -> list[tuple[str, str, Rows]]:
    return [(path.format(i), address.format(i), rows) for i in range(layers)]


PLACES: dict[str, Callable[[Any], list[tuple[str, str, Rows]]]] = {
    "bert": lambda config: [
        *_each("encoder.layer.{}.attention.self.query", "encoder.{}.attention.q", config.num_hidden_layers),
        *_each("encoder.layer.{}.attention.self.value", "encoder.{}.attention.v", config.num_hidden_layers),
    ],
    "llama": lambda config: [  # values are narrower than what they are made of
        *_each("layers.{}.self_attn.q_proj", "decoder.{}.attention.q", config.num_hidden_layers),
        *_each("layers.{}.self_attn.v_proj", "decoder.{}.attention.v", config.num_hidden_layers),
    ],
    "gpt2": lambda config: [  # one fused map, transposed: two fusions at one module
        *_each("h.{}.attn.c_attn", "decoder.{}.attention.q", config.n_layer, slice(0, config.n_embd)),
        *_each("h.{}.attn.c_attn", "decoder.{}.attention.v", config.n_layer, slice(2 * config.n_embd, None)),
    ],
}
"""Row -> (path, address, rows) of every map that is adapted."""


def fused(model: nn.Module, config: dict[str, Any], *children: Setup) -> ak.Kit:
    for seed, (name, method) in enumerate(METHODS.items()):
        kit = ak.attach(model, method, name=name, seed=seed, head=False)
        randomise(kit, name, seed=seed)
    kit.fuse(*children, config=config, seed=9)
    setup = Fuse(*children)
    randomise(kit, setup.name, seed=9)
    kit.activate(setup)
    return kit


def deltas(kit: ak.Kit, address: str, d_in: int) -> dict[str, Tensor]:
    """The updates of the weight at an address, by the papers' formulas."""
    a, b, c = (kit[name].state_dict() for name in "abc")
    vera = {key: b[f"{address}.{key}"] for key in "db"}
    mtl = {key: c[f"{address}.{key}"] for key in ("A", "B", "L", "w")}
    sharpness, scale = kit["c"].config.sharpness, kit["c"].config.scaling(kit["c"].plan.slots[0])  # type: ignore[attr-defined]
    return {
        "a": lora_delta(a[f"{address}.A"], a[f"{address}.B"], 6),
        "b": vera_delta(b["shared.A"], b["shared.B"], vera["d"], vera["b"], d_in),
        "c": mtl_lora_delta(mtl["A"], mtl["B"], mtl["L"], mtl["w"], sharpness, scale),
    }


def by_hand(
    plain: nn.Module, row: str, kit: ak.Kit, setup: Fuse, config: dict[str, Any]
) -> dict[str, Tensor]:
    """Let the maps of a plain model be fused; returns where the weights of the adapters are put."""
    chains = [child.children if isinstance(child, Stack) else (child,) for child in setup.children]
    own, weights = kit[setup.name].state_dict(), dict[str, Tensor]()
    more = {
        k: v for k, v in config.items() if k in ("residual_before", "value_before_softmax", "temperature")
    }

    def place(path: str, address: str, rows: Rows) -> None:
        def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            x, h = args[0], out[..., rows]
            found = deltas(kit, address, x.shape[-1])
            outputs = [sum(x @ found[str(name)].T for name in chain) for chain in chains]
            t = {k.removeprefix(f"{address}."): v for k, v in own.items() if k.startswith(f"{address}.")}
            query = h if config.get("query_before_ln") else x
            mixed, weights[address] = fusion.fuse(query, outputs, h, t, **more)  # type: ignore[arg-type]
            result = out.clone()
            result[..., rows] = mixed
            return result

        plain.get_submodule(path).register_forward_hook(hook)

    for each in PLACES[row](plain.config):
        place(*each)
    return weights


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("row", PLACES)
def test_it_equals_the_oracle(row: str, config: dict[str, Any]) -> None:
    model, plain = (tiny.build(row, dtype=torch.float64) for _ in range(2))
    given = tiny.inputs(row, padded=False)
    kit = fused(model, config, "a", "b", "c")
    weights = by_hand(plain, row, kit, Fuse("a", "b", "c"), config)
    with kit.record() as record:
        found = run(model, given)
    torch.testing.assert_close(found, run(plain, given), rtol=1e-9, atol=1e-9)
    assert record.fusion.keys() == weights.keys()
    for address, (share,) in record.fusion.items():
        torch.testing.assert_close(share, weights[address], rtol=1e-9, atol=1e-9)
    assert max(share.std() for (share,) in record.fusion.values()) > 1e-4
    kit.activate("a")
    assert not torch.allclose(run(model, given), found, atol=1e-4)
    kit.activate(None)
    assert torch.equal(run(model, given), run(tiny.build(row, dtype=torch.float64), given))


@pytest.mark.parametrize("row", ["bert", "gpt2"])
def test_a_stack_gives_the_sum_of_its_updates(row: str) -> None:
    model, plain = (tiny.build(row, dtype=torch.float64) for _ in range(2))
    given, setup = tiny.inputs(row, padded=False), Fuse(Stack("a", "b"), "c")
    kit = fused(model, {}, *setup.children)
    by_hand(plain, row, kit, setup, {})
    torch.testing.assert_close(run(model, given), run(plain, given), rtol=1e-9, atol=1e-9)


def test_identical_adapters_are_fused_to_one_of_them() -> None:
    """Whatever the weights of the adapters: they add up to 1."""
    model, given = tiny.build("llama", dtype=torch.float64), tiny.inputs("llama", padded=False)
    for name in "ab":
        kit = ak.attach(model, "lora", name=name, seed=3, head=False)
        randomise(kit, name, seed=3)
    kit.fuse("a", "b", config="static", seed=9)
    randomise(kit, "a+b", seed=4)
    kit.activate("a")
    alone = run(model, given)
    kit.activate(Fuse("a", "b"))
    torch.testing.assert_close(run(model, given), alone, rtol=1e-9, atol=1e-9)


def test_what_is_trained() -> None:
    model, given = tiny.build("bert"), tiny.inputs("bert")
    kit = fused(model, {}, "a", "b", "c")
    kit.freeze("a", "b", "c")
    own = {id(t): name for name, t in kit["a+b+c"].named_parameters()}
    values = [t.detach() for name, t in kit["a+b+c"].named_parameters() if name.endswith("value.weight")]
    found = kit.fusion_loss()
    assert abs(found.item() - fusion.loss(values)) < 1e-4 * found.item()
    (loss(model, given) + found).backward()
    got = {own.get(id(t), "other") for t in model.parameters() if t.grad is not None and t.grad.any()}
    # a bias of the keys adds the same to every score
    assert {name for name in own.values() if not name.endswith("key.bias")} <= got <= set(own.values())


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    model, given = tiny.build("gpt2"), tiny.inputs("gpt2")
    kit = fused(model, {}, "a", "b", "c")
    output = run(model, given)
    kit.save(tmp_path / "all", setup=Fuse("a", "b", "c"))
    other = tiny.build("gpt2")
    assert ak.load(other, tmp_path / "all").active == Fuse("a", "b", "c")
    assert torch.equal(run(other, given), output)
    kit.detach("a+b+c")
    for name in METHODS:
        kit.detach(name)
    bare = tiny.build("gpt2")
    assert torch.equal(run(model, given), run(bare, given))
    assert list(model.state_dict()) == list(bare.state_dict())


@pytest.mark.parametrize("row", ["bert", "gpt2", "t5"])
def test_beside_other_blocks_every_row_is_what_its_example_gets_alone(row: str) -> None:
    kit = fused(tiny.build(row), {}, "a", "b", "c")
    inner, given = Fuse("a", "b", "c"), tiny.inputs(row, tiny.classes(row)[0], batch=BATCH)
    for setup in (
        Parallel(inner, "a"),
        Route(inner, "b"),
        MultiTask("c", inner),
        BatchSplit(inner, "a", batch_sizes=[3, 1]),
        Stack("a", Parallel("b", inner)),
    ):
        assert_rows(kit, setup, given)


def test_segments_and_means() -> None:
    kit, given = fused(tiny.build("llama"), {}, "a", "b", "c"), tiny.inputs("llama", padded=False)
    inner, length = Fuse("a", "b", "c"), given["input_ids"].shape[1]

    def under(setup: Setup) -> Tensor:
        with kit.using(setup), torch.no_grad():
            return kit.model(**given).last_hidden_state  # type: ignore[no-any-return]

    cut = under(Split(inner, "a", splits=[3, length - 3]))
    torch.testing.assert_close(cut[:, :3], under(inner)[:, :3], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(cut[:, 3:], under(inner)[:, 3:], atol=1e-3)
    assert torch.equal(under(Average(inner, "a", weights=[1, 0])), under(inner))


def test_half_precision_and_a_compiled_model() -> None:
    model, given = tiny.build("bert", dtype=torch.bfloat16), tiny.inputs("bert")
    kit = fused(model, {}, "a", "b", "c")
    assert {t.dtype for t in kit["a+b+c"].parameters()} == {torch.bfloat16}
    half = run(model, given).float()
    wide = run(model.float(), given)
    assert (half - wide).norm() < 0.1 * wide.norm()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(tiny.output(compiled(**given)), wide, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "code"),
    [
        ("dora", "nothing-selected"),
        ("ia3[targets=[q, v]]", "nothing-selected"),
        ("lora[gating=true]", "nothing-selected"),
        ("lora[targets=[k]]", "nothing-selected"),
        ("lora[targets=[q, v, k]]", "not-fused"),
        ("lora|double_seq_bn", "not-fused"),
    ],
)
def test_what_is_refused(method: str, code: str) -> None:
    model, given = tiny.build("bert"), tiny.inputs("bert")
    kit = ak.attach(model, "lora", name="a", activate=False)
    kit.attach(method, name="b", activate=False)
    before = run(model, given)
    refused(PlanError, code, kit.fuse, "a", "b")
    assert sorted(kit) == ["a", "b"] and torch.equal(run(model, given), before)


def test_without_its_projection_the_query_is_as_wide_as_the_outputs() -> None:
    kit = ak.attach(tiny.build("llama"), "lora", name="a", activate=False)
    kit.attach("lora", name="b", activate=False)
    error: AdapterkitError = refused(ConfigError, "bad-option", kit.fuse, "a", "b", config={"query": False})
    assert error.address.endswith("attention.v")
    kit.fuse("a", "b", config={"query": False, "query_before_ln": True})


def test_unions_are_fused_at_branches_and_maps() -> None:
    model, given = tiny.build("bert", dtype=torch.float64), tiny.inputs("bert", padded=False)
    for name in "ab":
        kit = ak.attach(model, "lora|double_seq_bn", name=name, seed=3, head=False)
        randomise(kit, name, seed=3)
    kit.fuse("a", "b", config="static", seed=9)
    assert len(kit["a+b"].plan.slots) == 4 * model.config.num_hidden_layers  # type: ignore[union-attr, operator]
    kit.activate("a")
    alone = run(model, given)
    kit.activate(Fuse("a", "b"))
    torch.testing.assert_close(run(model, given), alone, rtol=1e-9, atol=1e-9)
