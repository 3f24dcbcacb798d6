"""Laws of `kit.average`: changes of weights add up on every family, one adapter of weight 1 is itself, and
the result is an adapter like any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import adapterkit as ak
from adapterkit.averaging.average import STRATEGIES
from adapterkit.errors import AdapterkitError
from tests.laws import branch_cases, matrix
from tests.laws.matrix import Case, run
from tests.models import tiny
from tests.oracles import averaging as oracle
from tests.unit.kit_scene import refused

SPECIMENS = ("bert", "gpt2", "phi3", "t5", "albert", "custom")
"""Norms, Conv1D and fused rows, a fused gate, two stacks, shared layers, a model without a config."""
TENSORS: dict[str, Any] = {
    **{name: config for name, config in branch_cases.METHODS.items() if "|" not in name},
    "prefix_tuning": "prefix_tuning[bottleneck_size=8, prefix_length=5]",
    "prefix_tuning_flat": "prefix_tuning_flat[prefix_length=5]",
    "prompt_tuning": "prompt_tuning[prompt_length=4]",
    "gated": "lora[gating=true]",
    "mam": "mam",
}
"""Methods that are averaged tensor by tensor."""
OTHERS: dict[str, Any] = {
    "lora": {"targets": ["q", "o"], "r": 3, "rslora": True, "alpha": 5},
    "ia3": {"alpha": 0.5},
    "vera": {"r": 5, "alpha": 3},
    "dora": {"r": 2},
    "dvora": {"r": 4},
    "mtl_lora": {"r": 3, "n_up": 3, "task_matrix": "diagonal"},
}
"""Method -> options of a second adapter, with other ranks, scales and targets."""


def cases() -> Iterator[Any]:
    for row in tiny.ROWS:
        for method in matrix.METHODS:
            marks = [] if row in SPECIMENS else [pytest.mark.full]
            yield pytest.param(Case(row, tiny.classes(row)[0], method), id=f"{row}-{method}", marks=marks)


def several(case: Case, methods: Mapping[str, Any], **options: Any) -> ak.Kit:
    """A fresh model with adapters of these names and methods, away from their start."""
    model = case.model()
    for seed, (name, method) in enumerate(methods.items()):
        kit = ak.attach(model, method, name=name, interface=case.interface, seed=seed, **options)
        randomise(kit, name, seed)
    return kit


@torch.no_grad()
def randomise(kit: ak.Kit, name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tensor in kit[name].parameters():
        tensor.add_((0.1 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype))


def merged(kit: ak.Kit, name: str | None = None) -> dict[str, Tensor]:
    """The model's own weights and biases, with an adapter folded in."""
    if name is not None:
        kit.merge(name)
    found = {n: p.detach().double() for n, p in kit.model.named_parameters() if "adapterkit" not in n}
    if name is not None:
        kit.unmerge()
    return found


def assert_adds_up(kit: ak.Kit, name: str, weights: Mapping[str, float]) -> None:
    """W + sum w_i (W_i - W), weights and biases."""
    own, found, parts = merged(kit), merged(kit, name), {child: merged(kit, child) for child in weights}
    changed = 0
    for path, weight in own.items():
        changes = [parts[child][path] - weight for child in weights]
        expected = weight + oracle.weighted_sum(changes, list(weights.values()))
        torch.testing.assert_close(found[path], expected, rtol=1e-5, atol=2e-6)
        changed += bool((expected - weight).abs().max() > 1e-4)
    assert changed


@pytest.mark.parametrize("update_case", list(cases()))
@pytest.mark.parametrize("weights", [{"a": 0.3, "b": 0.7}, {"a": 1.5, "b": -0.4}], ids=["mean", "negated"])
def test_changes_of_weights_add_up(update_case: Case, weights: dict[str, float]) -> None:
    case = update_case
    kit = several(case, {"a": case.config, "b": {**case.config, **OTHERS[case.method]}})
    kit.average(weights, name="ab", normalize=False)
    assert_adds_up(kit, "ab", weights)


@pytest.mark.parametrize(
    ("first", "second"), [("lora", "vera"), ("mtl_lora", "lora"), ("lora", "dora"), ("dvora", "dora")]
)
def test_methods_may_differ(first: str, second: str) -> None:
    case = Case("gpt2", "GPT2Model", "lora")
    kit = several(
        case, {"a": matrix.METHODS[first], "b": {**matrix.METHODS[second], "targets": ["q", "down"]}}
    )
    kit.average({"a": 2.0, "b": 0.5}, name="ab", normalize=False)
    assert_adds_up(kit, "ab", {"a": 2.0, "b": 0.5})


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_a_start_took_out_is_no_part_of_the_change(init: str) -> None:
    case = Case("bert", "BertModel", "lora")
    kit = several(case, {"a": f"lora[init={init}]", "b": "lora[r=4]"})
    kit.average({"a": 1.0, "b": 3.0}, name="ab")
    assert_adds_up(kit, "ab", {"a": 0.25, "b": 0.75})


def test_ranks_that_are_too_many_together_are_made_fewer() -> None:
    case = Case("bert", "BertModel", "lora")
    names = ("a", "b", "c")
    kit = several(case, dict.fromkeys(names, "lora[r=16, targets=q]"))
    kit.average(names, name="abc")
    assert kit["abc"].units["encoder.0.attention.q"].A.shape[0] <= 32 < 48
    assert_adds_up(kit, "abc", dict.fromkeys(names, 1 / 3))


# ------------------------------------------------------------------------------------------------ strategies


@pytest.mark.parametrize("strategy", ["svd", "ties", "dare", "magnitude"])
@pytest.mark.parametrize("method", ["lora", "dora", "vera", "mtl_lora"])
def test_strategies_act_on_whole_changes(strategy: str, method: str) -> None:
    case, rank, density = Case("bert", "BertModel", method), 3, 1.0 if strategy == "svd" else 0.4
    kit = several(case, {"a": {**case.config, "targets": ["q"]}, "b": {**case.config, "targets": ["q", "v"]}})
    kit.average({"a": 1, "b": 3}, name="ab", strategy=strategy, rank=rank, density=density, seed=5)
    own, weights = merged(kit), {"a": 0.25, "b": 0.75}
    parts, found = {name: merged(kit, name) for name in weights}, kit["ab"]
    for slot in found.plan.slots:
        path = f"{slot.path}.weight"
        deltas = [parts[name][path] - own[path] for name in weights if slot.address in kit[name].units]
        told = [w for name, w in weights.items() if slot.address in kit[name].units]
        unit = found.units[slot.address]
        change = unit.B.double() @ unit.A.double() * unit.scaling
        assert unit.A.shape[0] == rank
        if strategy == "dare":  # what it drops is drawn: only the rank is known
            continue
        expected = {
            "svd": oracle.weighted_sum,
            "ties": lambda d, w: oracle.ties(d, w, density, 1.0),
            "magnitude": lambda d, w: oracle.magnitude(d, w, density),
        }[strategy](deltas, told)
        torch.testing.assert_close(change, oracle.truncated(expected, rank), rtol=1e-3, atol=1e-4)


def test_without_a_rank_nothing_is_cut() -> None:
    case = Case("bert", "BertModel", "lora")
    kit = several(case, {"a": "lora[r=2]", "b": "lora[r=3, targets=[k, v]]"})
    weights = {"a": 0.5, "b": 0.5}
    for strategy, density in (("svd", 1.0), ("dare", 1.0), ("magnitude", 1.0)):
        kit.average(weights, name="ab", strategy=strategy, density=density, replace=True)
        assert_adds_up(kit, "ab", weights)
        ranks = {a: unit.A.shape[0] for a, unit in kit["ab"].units.items() if a.startswith("encoder.0")}
        assert ranks == {f"encoder.0.attention.{role}": r for role, r in zip("qkv", (2, 3, 5), strict=True)}


def test_dare_repeats_with_a_seed() -> None:
    kit = several(Case("bert", "BertModel", "lora"), {"a": "lora", "b": "lora"})
    for name, seed in (("x", 1), ("y", 1), ("z", 2)):
        kit.average(["a", "b"], name=name, strategy="dare", density=0.5, seed=seed)
    x, y, z = (kit[name].units["encoder.0.attention.q"] for name in "xyz")
    assert torch.equal(x.B, y.B) and not torch.equal(x.B[:, :1], z.B[:, :1])


def test_negation_is_in_the_up_projection_alone() -> None:
    kit = several(Case("bert", "BertModel", "lora"), {"a": "lora[alpha=4]", "b": "lora[alpha=4]"})
    kit.average({"a": 1.0, "b": -0.4}, name="ab", strategy="negate_b", normalize=False)
    assert kit["ab"].config == kit["a"].config
    for address, unit in kit["ab"].units.items():
        units = [kit[name].units[address] for name in "ab"]
        expected = oracle.negated([u.A for u in units], [u.B for u in units], [1.0, -0.4])
        torch.testing.assert_close((unit.B @ unit.A).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strategy", ["ties", "magnitude", "dare"])
def test_factors_are_changes_of_one(strategy: str) -> None:
    kit = several(
        Case("bert", "BertModel", "ia3"), {"a": "ia3", "b": "ia3[alpha=0.5]", "c": "ia3[targets=k]"}
    )
    weights = {"a": 0.5, "b": 1.0, "c": -0.25}
    kit.average(weights, name="abc", strategy=strategy, density=0.5, normalize=False, seed=0)
    for address, unit in kit["abc"].units.items():
        own = {n: kit[n].units[address] for n in weights if address in kit[n].units}
        deltas = [u.scale.double() * u.alpha - 1 for u in own.values()]
        told = [weights[name] for name in own]
        if strategy == "dare":
            # every entry is one of the sums of some of the doubled changes
            chosen = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * len(own))
            sums = chosen.view(-1, len(own)) @ torch.stack(
                [2 * w * d for w, d in zip(told, deltas, strict=True)]
            )
            assert ((unit.scale.double() - 1 - sums).abs().min(dim=0).values < 1e-6).all()
            continue
        expected = (
            oracle.ties(deltas, told, 0.5, 1.75)
            if strategy == "ties"
            else oracle.magnitude(deltas, told, 0.5)
        )
        torch.testing.assert_close(unit.scale.double(), 1 + expected, rtol=1e-6, atol=1e-6)


# -------------------------------------------------------------------------------------------- every tensor


@pytest.mark.parametrize("method", TENSORS)
def test_other_methods_are_averaged_tensor_by_tensor(method: str, tmp_path: Path) -> None:
    case = Case("bert", "BertForSequenceClassification", "lora")
    kit = several(case, {"a": TENSORS[method], "b": TENSORS[method]})
    kit.average({"a": 1, "b": 3}, name="ab", activate=True)
    a, b, ab = (kit[name].state_dict() for name in ("a", "b", "ab"))
    assert a.keys() == ab.keys() and kit["ab"].config == kit["a"].config
    for key, value in ab.items():
        expected = 0.25 * a[key].double() + 0.75 * b[key].double()
        torch.testing.assert_close(value, expected.float(), rtol=1e-7, atol=0)
    refused(ak.errors.PlanError, "cannot-average", kit.average, ["a", "b"], name="x", strategy="ties")


def test_every_member_of_a_union_is_averaged_in_its_own_way() -> None:
    case, union = Case("bert", "BertModel", "lora"), "lora[r=2]|seq_bn|ia3"
    kit = several(case, {"a": union, "b": union, "lora_a": "lora[r=2]", "lora_b": "lora[r=2]"})
    for name in "ab":  # the same numbers on their own
        for address, unit in kit[f"lora_{name}"].units.items():
            unit.load_state_dict(kit[name].units[f"0:{address}"].state_dict())
    kit.average({"a": 1, "b": 3}, name="ab").average({"lora_a": 1, "lora_b": 3}, name="lora_ab")
    assert [config.method for config in kit["ab"].config.configs] == ["lora", "bottleneck", "ia3"]
    for address, unit in kit["lora_ab"].units.items():
        found = kit["ab"].units[f"0:{address}"]
        assert torch.equal(found.A, unit.A) and torch.equal(found.B, unit.B) and found.scaling == 1
    a, b, ab = (kit[name].state_dict() for name in ("a", "b", "ab"))
    for key in (key for key in a if not key.startswith("0:")):
        expected = 0.25 * a[key].double() + 0.75 * b[key].double()
        torch.testing.assert_close(ab[key].double(), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_members_without_tensors_stay(strategy: str) -> None:
    kit = several(Case("xmod", "XmodModel", "lora"), dict.fromkeys("ab", "lora|silence"))
    kit.average(["a", "b"], name="ab", strategy=strategy)
    assert [member.method for member in kit["ab"].config.configs] == ["lora", "silence"]
    silent = {address for address in kit["a"].units if address.startswith("1:")}
    assert silent and silent == {address for address in kit["ab"].units if address.startswith("1:")}


# --------------------------------------------------------------------------------------- the result itself


@pytest.mark.parametrize("method", [*matrix.METHODS, *TENSORS])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_adapter_of_weight_one_is_itself(method: str, strategy: str) -> None:
    case = Case("bert", "BertForSequenceClassification", "lora")
    kit = several(case, {"a": {**matrix.METHODS, **TENSORS}[method]})
    kit.average({"a": 0.5}, name="x", strategy=strategy)  # weights are made to sum to one
    assert kit["x"].config == kit["a"].config
    own, inputs = kit["a"].state_dict(), case.inputs()
    assert own and all(torch.equal(value, own[key]) for key, value in kit["x"].state_dict().items())
    expected = run(kit.model, inputs)
    with kit.using("x"):
        assert torch.equal(run(kit.model, inputs), expected)


@pytest.mark.parametrize("method", [*matrix.METHODS, *TENSORS])
def test_the_result_is_saved_and_comes_back_bit_for_bit(method: str, tmp_path: Path) -> None:
    case = Case("bert", "BertForSequenceClassification", "lora")
    options = {**matrix.METHODS, **TENSORS}[method]
    second = {**options, **OTHERS[method]} if method in OTHERS else options
    kit, inputs = several(case, {"a": options, "b": second}), case.inputs()
    before = run(kit.model, inputs)
    for strategy in STRATEGIES:
        try:
            kit.average(["a", "b"], name="ab", strategy=strategy, replace=True)
        except AdapterkitError as error:
            assert error.code == "cannot-average" and strategy != "linear"
            continue
        assert torch.equal(run(kit.model, inputs), before), "it must not act unless it is asked to"
        assert kit.plan(kit["ab"].config).slots == kit["ab"].plan.slots
        assert not any(p.requires_grad for p in kit["ab"].parameters())
        with kit.using("ab"):
            output = run(kit.model, inputs)
        kit.save(tmp_path / strategy, "ab")
        loaded = ak.load(case.model(), tmp_path / strategy)
        assert torch.equal(run(loaded.model, inputs), output)
    kit.train("ab").activate("ab")
    matrix.loss(kit.model, case.inputs(labels=True)).backward()
    assert any(p.grad is not None and p.grad.any() for p in kit["ab"].parameters())


def test_types_stay(tmp_path: Path) -> None:
    case = Case("bert", "BertModel", "lora")
    model = case.model(torch.bfloat16)
    for seed, name in enumerate("ab"):
        kit = ak.attach(model, "lora", name=name, seed=seed)
        randomise(kit, name, seed)
    kit.average(["a", "b"], name="ab")
    assert {p.dtype for p in kit["ab"].parameters()} == {torch.bfloat16}
    kit.to("b", dtype=torch.float32).average(["a", "b"], name="wide")
    assert {p.dtype for p in kit["wide"].parameters()} == {torch.float32}


# ------------------------------------------------------------------------------------------------- heads


def test_heads_are_averaged_by_weights_that_sum_to_one() -> None:
    case = Case("bert", "BertForSequenceClassification", "lora")
    kit = several(case, {"a": "lora", "b": "lora"})
    kit.average({"a": 2, "b": 1}, name="sum", normalize=False)
    kit.average({"a": 2, "b": 1}, name="bare", head=False)
    a, b, found = (kit[name].heads["head.classifier"] for name in ("a", "b", "sum"))
    expected = (2 * a.weight.double() + b.weight.double()) / 3
    torch.testing.assert_close(found.weight, expected.float(), rtol=1e-6, atol=1e-7)
    assert not kit["bare"].heads
    error = refused(
        ak.errors.ConfigError, "bad-weights", kit.average, {"a": 1, "b": -1}, name="x", normalize=False
    )
    assert "head=False" in str(error)
    kit.average({"a": 1, "b": -1}, name="x", normalize=False, head=False)


def test_a_head_that_only_some_have_is_refused() -> None:
    case = Case("bert", "BertForSequenceClassification", "lora")
    kit = several(case, {"a": "lora"}).attach("lora", name="b", head=False)
    refused(ak.errors.PlanError, "cannot-average", kit.average, ["a", "b"], name="x")
    refused(ak.errors.PlanError, "cannot-average", kit.average, ["b"], name="x", head=True)
    kit.average(["a", "b"], name="x", head=False)


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("adapters", "options", "code"),
    [
        ({}, {}, "bad-weights"),
        ("a", {}, "bad-weights"),
        ({"a": float("nan")}, {}, "bad-weights"),
        ({"a": "1"}, {}, "bad-weights"),
        ({"a": True}, {}, "bad-weights"),
        ({"a": 0.0}, {"normalize": False}, "bad-weights"),
        ({"a": 1, "b": -1}, {}, "bad-weights"),
        ({"a": 1, "z": 1}, {}, "no-such-adapter"),
        (["a"], {"strategy": "tie"}, "bad-option"),
        (["a"], {"rank": 2}, "bad-option"),
        (["a"], {"strategy": "svd", "rank": 0}, "bad-option"),
        (["a", "b"], {"strategy": "svd", "rank": 99}, "bad-rank"),
        (["a"], {"strategy": "svd", "density": 0.5}, "bad-option"),
        (["a"], {"strategy": "ties", "density": 0}, "bad-option"),
        (["a"], {"name": "a"}, "name-taken"),
        (["a"], {"name": "a b"}, "bad-name"),
    ],
)
def test_what_was_asked_wrongly(adapters: Any, options: dict[str, Any], code: str) -> None:
    kit = several(Case("bert", "BertModel", "lora"), {"a": "lora", "b": "lora"})
    with pytest.raises(AdapterkitError) as caught:
        kit.average(adapters, **{"name": "x", **options})
    assert caught.value.code == code
    assert list(kit) == ["a", "b"]


@pytest.mark.parametrize(
    ("first", "second", "strategy"),
    [
        ("lora", "seq_bn", "linear"),
        ("seq_bn", "compacter[reduction_factor=4]", "linear"),
        ("seq_bn", "seq_bn[non_linearity=gelu]", "linear"),
        ("seq_bn", "seq_bn[reduction_factor=8]", "linear"),
        ("seq_bn", "seq_bn[layers=0]", "linear"),
        ("prefix_tuning_flat", "prefix_tuning_flat[prefix_length=3]", "linear"),
        ("lora|seq_bn", "lora", "linear"),
        ("lora|seq_bn", "lora|seq_bn", "negate_b"),
        ("lora", "lora[r=4]", "negate_b"),
        ("lora", "lora[alpha=3]", "negate_b"),
        ("ia3", "ia3", "svd"),
        ("ia3", "ia3[sides={k: input}]", "linear"),
        ("ia3", "ia3", "negate_b"),
        ("dora", "dora[scale_bias=true]", "linear"),
        ("dora[scale_bias=true]", "dora[scale_bias=true]", "svd"),
        ("lora[gating=true]", "lora[gating=true]", "magnitude"),
        ("loreft", "loreft", "svd"),
    ],
)
def test_what_has_no_average(first: str, second: str, strategy: str) -> None:
    kit = several(Case("bert", "BertModel", "lora"), {"a": first, "b": second})
    refused(ak.errors.PlanError, "cannot-average", kit.average, ["a", "b"], name="x", strategy=strategy)
    assert list(kit) == ["a", "b"]


def test_fusions_and_merged_adapters_are_not_averaged() -> None:
    kit = several(Case("bert", "BertModel", "lora"), {"a": "seq_bn", "b": "seq_bn", "c": "lora"})
    kit.fuse("a", "b")
    refused(ak.errors.PlanError, "cannot-average", kit.average, ["a+b"], name="x")
    kit.merge("c")
    refused(ak.errors.PlanError, "merged", kit.average, ["a", "b"], name="x")
