"""Laws of `kit.share`: one tensor for several adapters, whatever is done to the model."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.errors import ConfigError, FileFormatError, NotAttachedError, PlanError
from tests.laws.matrix import loss, run
from tests.models import tiny
from tests.oracles import mtl_lora as oracle
from tests.unit.kit_scene import refused

CLS = "BertForSequenceClassification"
INPUTS = tiny.inputs("bert", CLS)
LABELLED = tiny.inputs("bert", CLS, labels=True)
MTL = {"method": "mtl_lora", "r": 3, "alpha": 5, "n_up": 2, "task_matrix": "full"}
Q = "encoder.0.attention.q"


def kit_of(method: Any = MTL, names: str = "ab", **options: Any) -> ak.Kit:
    """Adapters that differ in every tensor."""
    model = tiny.build("bert", CLS)
    for seed, name in enumerate(names):
        kit = ak.attach(model, method, name=name, seed=seed, **options)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor in kit[name].parameters():
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
    return kit


def output(kit: ak.Kit, setup: Any, **rows: Any) -> Tensor:
    with kit.using(setup, **rows):
        return run(kit.model, INPUTS)


def tied(kit: ak.Kit, first: str = "a", second: str = "b") -> set[str]:
    """Names of tensors ('address.tensor') that are one object for two adapters."""
    one, two = dict(kit[first].named_parameters()), dict(kit[second].named_parameters())
    return {key for key in one if one[key] is two.get(key)}


def common(kit: ak.Kit) -> set[str]:
    return {key for key, _ in kit["a"].named_parameters() if key.endswith((".A", ".B"))}


# ------------------------------------------------------------------------------------------ what is shared


def test_tasks_have_both_projections_in_common() -> None:
    kit = kit_of()
    own, before = kit["b"].state_dict(), output(kit, "a")
    own = {key: value.clone() for key, value in own.items()}
    assert not tied(kit)
    kit.share("a", "b")
    assert tied(kit) == common(kit) != set()
    assert torch.equal(output(kit, "a"), before), "the first one's tensors stay"
    host: Any = kit.model.get_submodule("bert.encoder.layer.0.attention.self.query")
    x = torch.randn(2, 5, 32)
    a, b = kit["a"].units[Q], kit["b"].units[Q]
    expected = oracle.mtl_lora_output(
        x, host.weight, host.bias, a.A, a.B, own[f"{Q}.L"], own[f"{Q}.w"], 0.05, scaling=5 / 3
    )
    with torch.no_grad(), kit.disabled():
        found = b(host(x), x, host)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "method",
    [
        "lora",
        "dora",
        "vera[r=4]",
        "ia3",
        "seq_bn",
        "compacter[reduction_factor=4]",
        "prefix_tuning[bottleneck_size=4]",
        "prompt_tuning[prompt_length=3]",
        "loreft",
        "seq_bn_inv",
        "mam",
    ],
)
def test_other_methods_are_shared_whole_but_for_heads(method: str) -> None:
    kit = kit_of(method)
    before = output(kit, "b")
    kit.share("a", "b")
    heads = {key for key, _ in kit["a"].named_parameters() if key.startswith("head.")}
    assert heads and tied(kit) == {key for key, _ in kit["a"].named_parameters()} - heads
    with torch.no_grad():
        for name, head in kit["b"].heads.items():
            head.load_state_dict(kit["a"].heads[name].state_dict())
    after = output(kit, "b")
    assert torch.equal(after, output(kit, "a")) and not torch.equal(after, before)


def test_groups_grow_together() -> None:
    kit = kit_of(names="abcd")
    values = kit["c"].units[Q].A.clone()
    kit.share("a", "b").share("c", "d")
    kit.share("d", "a")
    assert all(tied(kit, first, second) for first in "abcd" for second in "abcd")
    assert torch.equal(kit["a"].units[Q].A, values), (
        "the tensors of the first that is named, which were those of c"
    )


# ------------------------------------------------------------------------------------------------ training


def test_gradients_of_all_tasks_meet() -> None:
    kit, apart = kit_of(), kit_of()
    kit.share("a", "b")
    with torch.no_grad():  # the same numbers without sharing
        for key in common(kit):
            dict(apart["b"].named_parameters())[key].copy_(dict(apart["a"].named_parameters())[key])
    for found in (kit, apart):
        for name in "ab":
            found.activate(name)
            loss(found.model, LABELLED).backward()
    shared, a, b = (dict(k[n].named_parameters()) for k, n in ((kit, "a"), (apart, "a"), (apart, "b")))
    for key in common(kit):
        torch.testing.assert_close(shared[key].grad, a[key].grad + b[key].grad, rtol=1e-5, atol=1e-7)
    own = dict(kit["b"].named_parameters())[f"{Q}.L"].grad
    torch.testing.assert_close(own, b[f"{Q}.L"].grad, rtol=1e-5, atol=1e-7)


def test_one_optimizer_moves_one_tensor() -> None:
    kit = kit_of().share("a", "b")
    wanted = [p for p in kit.model.parameters() if p.requires_grad]
    assert len({id(p) for p in wanted}) == len(wanted)
    optimizer = torch.optim.SGD(wanted, lr=0.1)
    before = output(kit, "b")
    kit.activate("a")
    loss(kit.model, LABELLED).backward()
    optimizer.step()
    assert tied(kit) == common(kit) and not torch.equal(output(kit, "b"), before)


def test_it_is_trained_as_long_as_one_adapter_is() -> None:
    kit = kit_of().share("a", "b")

    def trained() -> tuple[bool, bool, bool]:
        return tuple(
            unit.requires_grad for unit in (kit["a"].units[Q].A, kit["a"].units[Q].L, kit["b"].units[Q].L)
        )

    assert trained() == (True, True, True)
    kit.freeze("a")
    assert trained() == (True, False, True)
    kit.freeze("b")
    assert trained() == (False, False, False)
    kit.train("a")
    assert trained() == (True, True, False)
    kit.unshare()
    assert kit["a"].units[Q].A.requires_grad and not kit["b"].units[Q].A.requires_grad


def test_frozen_tensors_of_a_method_stay_frozen() -> None:
    kit = kit_of("vera[r=4]").share("a", "b")
    assert tied(kit) and not any(p.requires_grad for p in kit["a"].shared.parameters())
    assert kit["a"].units[Q].d.requires_grad


def test_tasks_in_one_batch() -> None:
    kit = kit_of().share("a", "b")
    a, b = (output(kit, name).view(2, -1) for name in "ab")
    assert not torch.equal(a, b)
    for tasks, rows in (([1, 0], (b[0], a[1])), (["b", "b"], (b[0], b[1]))):
        found = output(kit, ak.MultiTask("a", "b"), task_ids=tasks).view(2, -1)
        torch.testing.assert_close(found, torch.stack(rows), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------- the model moves


def test_copies_share_among_themselves() -> None:
    kit = kit_of().share("a", "b")
    twin = ak.of(copy.deepcopy(kit.model))
    assert tied(twin) == common(kit)
    before = output(kit, "b")
    with torch.no_grad():
        twin["a"].units[Q].A.add_(1)
    assert torch.equal(output(kit, "b"), before)
    buffer = io.BytesIO()
    torch.save(kit.model, buffer)
    buffer.seek(0)
    assert tied(ak.of(torch.load(buffer, weights_only=False))) == common(kit)
    twin.unshare()
    assert not tied(twin) and tied(kit)


def test_other_types() -> None:
    kit = kit_of().share("a", "b")
    kit.model.to(torch.bfloat16)
    assert tied(kit) == common(kit) and kit["b"].units[Q].A.dtype == torch.bfloat16
    kit.to("a", dtype=torch.float64)
    assert tied(kit) == common(kit)
    assert {p.dtype for n in "ab" for p in kit[n].units[Q].parameters()} == {torch.float64}, (
        "all of the group"
    )


@pytest.mark.parametrize("assign", [False, True])
def test_checkpoints(assign: bool) -> None:
    kit, other = kit_of().share("a", "b"), kit_of(names="ab").share("b", "a")
    with torch.no_grad():
        for tensor in other["a"].parameters():
            tensor.mul_(0.5)
    state = {key: value.clone() for key, value in kit.model.state_dict().items()}
    expected = [output(kit, name) for name in "ab"]
    other.model.load_state_dict(state, assign=assign)
    assert tied(other) == common(kit)
    assert all(torch.equal(output(other, name), value) for name, value in zip("ab", expected, strict=True))


def test_a_checkpoint_that_holds_every_tensor_once() -> None:
    kit, other = kit_of().share("a", "b"), kit_of(names="ab").share("a", "b")
    with torch.no_grad():
        other["a"].units[Q].A.zero_()
    expected, seen, state = output(kit, "b"), set[int](), {}
    for key, value in kit.model.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen.add(id(value))
            state[key] = value.detach()
    assert len(state) < len(kit.model.state_dict())
    other.model.load_state_dict(state)
    assert torch.equal(output(other, "b"), expected)
    refused(FileFormatError, "missing-tensors", kit_of().model.load_state_dict, state)


def test_a_checkpoint_of_adapters_that_were_apart_is_refused() -> None:
    state, kit = kit_of().model.state_dict(), kit_of().share("a", "b")
    before = output(kit, "b")
    refused(FileFormatError, "not-shared", kit.model.load_state_dict, state)
    assert torch.equal(output(kit, "b"), before)
    kit.unshare().model.load_state_dict(state)


def test_adapters_come_out_of_a_full_checkpoint_as_they_were(tmp_path: Path) -> None:
    kit = kit_of().share("a", "b")
    kit.model.save_pretrained(tmp_path)
    expected = [output(kit, name) for name in "ab"]
    loaded = ak.load(tiny.build("bert", CLS), tmp_path)
    assert tied(loaded) == common(kit)
    assert all(torch.equal(output(loaded, name), value) for name, value in zip("ab", expected, strict=True))


@pytest.mark.parametrize("how", ["replaced", "attached again"])
def test_who_has_left_is_alone_in_a_checkpoint_too(how: str, tmp_path: Path) -> None:
    kit = kit_of().share("a", "b")
    if how == "attached again":
        kit.detach("b")
    kit.attach(MTL, name="b", replace=how == "replaced", seed=9)
    want = {name: output(kit, name) for name in "ab"}
    assert not torch.equal(
        kit["a"].units["encoder.0.attention.q"].A, kit["b"].units["encoder.0.attention.q"].A
    )
    kit.model.save_pretrained(tmp_path)
    loaded = ak.load(type(kit.model).from_pretrained(tmp_path), tmp_path)
    assert loaded.shared == () and not tied(loaded, "a", "b")
    assert all(torch.equal(output(loaded, name), value) for name, value in want.items())


def test_a_replacement_that_fails_leaves_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    kit = kit_of().share("a", "b")
    layer = kit.model.get_submodule("bert.encoder.layer.1.output.dense")
    monkeypatch.setattr(layer, "forward", lambda x: x)
    refused(PlanError, "wrapped-forward", kit.attach, "lora[targets=down]", name="b", replace=True)
    assert kit.shared == (("a", "b"),) and tied(kit, "a", "b")


def test_a_file_of_one_adapter_holds_all_of_it(tmp_path: Path) -> None:
    kit = kit_of().share("a", "b")
    kit.save(tmp_path, "b")
    alone = ak.load(tiny.build("bert", CLS), tmp_path)
    assert torch.equal(output(alone, "b"), output(kit, "b"))
    kit.unshare()
    kit.save(tmp_path, "b")
    alone = ak.load(tiny.build("bert", CLS), tmp_path)
    assert torch.equal(output(alone, "b"), output(kit, "b"))


# --------------------------------------------------------------------------------------------------- parting


def test_parting_keeps_the_numbers() -> None:
    kit = kit_of(names="abc").share("a", "b", "c")
    before = [output(kit, name) for name in "abc"]
    kit.unshare("b")
    assert tied(kit, "a", "c") and not tied(kit, "a", "b")
    assert all(torch.equal(output(kit, name), value) for name, value in zip("abc", before, strict=True))
    with torch.no_grad():
        kit["b"].units[Q].A.zero_()
    assert torch.equal(output(kit, "a"), before[0])
    kit.unshare("a")
    assert not tied(kit, "a", "c")
    refused(PlanError, "not-shared", kit.unshare, "a")


def test_who_leaves_takes_nothing_away() -> None:
    kit = kit_of(names="abc").share("a", "b", "c")
    before = output(kit, "b")
    kit.detach("a")
    assert torch.equal(output(kit, "b"), before) and tied(kit, "b", "c")
    kit.attach(MTL, name="c", replace=True, seed=9)
    assert not tied(kit, "b", "c") and torch.equal(output(kit, "b"), before)
    kit.detach()
    assert not any("adapterkit" in key for key in kit.model.state_dict())


def test_what_would_change_other_adapters_is_refused(tmp_path: Path) -> None:
    kit = kit_of().share("a", "b")
    kit.save(tmp_path, "a")
    refused(PlanError, "shares-tensors", kit.swap, "b", tmp_path)
    kit.unshare().swap("b", tmp_path)
    prefix = kit_of("prefix_tuning[bottleneck_size=4]").share("a", "b")
    refused(PlanError, "shares-tensors", prefix.eject, "a")
    prefix.unshare().eject("a")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("lora", "seq_bn"),
        ("lora", "lora[r=4]"),
        ("lora", "lora[targets=q]"),
        ("mtl_lora", "mtl_lora[n_up=3]"),
        ("lora|seq_bn", "lora"),
    ],
)
def test_what_cannot_be_shared(first: str, second: str) -> None:
    model = tiny.build("bert", CLS)
    kit = ak.attach(model, first, name="a").attach(second, name="b")
    refused(PlanError, "cannot-share", kit.share, "a", "b")
    assert not tied(kit)


def test_what_is_no_group() -> None:
    kit = kit_of("seq_bn").fuse("a", "b")
    refused(PlanError, "cannot-share", kit.share, "a+b", "a")
    refused(ConfigError, "bad-option", kit.share, "a")
    refused(ConfigError, "bad-option", kit.share, "a", "a")
    refused(NotAttachedError, "no-such-adapter", kit.share, "a", "z")
    kit = kit_of("lora")
    kit.to("b", dtype=torch.float64)
    refused(PlanError, "cannot-share", kit.share, "a", "b")
    kit = kit_of("lora").merge("a")
    refused(PlanError, "merged", kit.share, "a", "b")


def test_a_model_of_parameters_alone_is_not_confused() -> None:
    """Tied weights of the model itself are no tensors of adapters."""
    model: nn.Module = tiny.build("bert", "BertForMaskedLM")
    kit = ak.attach(model, "lora", name="a", seed=0)
    state = copy.deepcopy(model.state_dict())
    model.load_state_dict(state)
    assert kit["a"].state_dict().keys()
