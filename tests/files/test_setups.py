"""Setups in directories: adapters, fusions, and how they act together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adapterkit as ak
from adapterkit.errors import AdapterkitError, CompositionError, ConfigError, FileFormatError
from tests.models import tiny

IDS = torch.arange(2, 38).view(3, 12) % 90


def hidden(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(IDS).last_hidden_state
    return out


def crew(*names: str) -> ak.Kit:
    """Adapters that do something, and the fusion of the last two."""
    model = tiny.build("bert").eval()
    for seed, name in enumerate(names):
        kit = ak.attach(model, "double_seq_bn[reduction_factor=4]", name=name, seed=seed, head=False)
        with torch.no_grad():
            for parameter in kit[name].parameters():
                parameter.add_(
                    0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
                )
    kit.fuse(*names[-2:], seed=7)
    return kit


SETUPS: list[Any] = [
    ak.Stack("a", "b"),
    ak.Stack("a", ak.Fuse("b", "c")),
    ak.BatchSplit("a", ak.Stack("b", "c"), batch_sizes=[1, 2]),
    ak.Average("a", "c", weights=[0.25, 0.75]),
    ak.Parallel("a", "b"),
]


@pytest.mark.parametrize("setup", SETUPS, ids=repr)
def test_a_setup_is_saved_with_its_adapters(setup: Any, tmp_path: Path) -> None:
    kit = crew("a", "b", "c")
    kit.activate(setup)
    kit.save(tmp_path / "crew", setup=kit.active)
    fresh = tiny.build("bert").eval()
    loaded = ak.load(fresh, tmp_path / "crew", head=False)
    assert loaded.active == setup
    assert torch.equal(hidden(fresh), hidden(kit.model))
    # each adapter of it can be had alone
    assert "a" in ak.load(tiny.build("bert"), tmp_path / "crew" / "a", head=False)


def test_it_is_not_active_where_that_is_not_wanted(tmp_path: Path) -> None:
    kit = crew("a", "b")
    kit.save(tmp_path / "crew", setup="Fuse(a, b)")
    fresh = tiny.build("bert").eval()
    plain = hidden(fresh)
    loaded = ak.load(fresh, tmp_path / "crew", head=False, activate=False)
    assert loaded.active is None and set(loaded) == {"a", "b", "a+b"}
    assert torch.equal(hidden(fresh), plain)


def test_what_stood_there_is_replaced_if_it_was_a_setup(tmp_path: Path) -> None:
    kit = crew("a", "b")
    kit.save(tmp_path / "crew", setup=ak.Fuse("a", "b"))
    kit.save(tmp_path / "crew", setup=ak.Stack("a", "b"))
    assert sorted(path.name for path in (tmp_path / "crew").iterdir()) == ["a", "adapterkit_setup.json", "b"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("keep")
    with pytest.raises(FileFormatError) as caught:
        kit.save(tmp_path / "mine", setup=ak.Stack("a", "b"))
    assert caught.value.code == "bad-file"
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes"]
    assert {path.name for path in tmp_path.iterdir()} == {"crew", "mine"}


@pytest.mark.parametrize(
    ("call", "error", "code"),
    [
        ({"setup": ak.Stack("a", "z")}, AdapterkitError, "no-such-adapter"),
        ({"setup": ak.Stack("a", "b"), "name": "a"}, ConfigError, "bad-option"),
        ({"setup": ak.Stack("a", "b"), "format": "peft"}, ConfigError, "bad-option"),
        ({"setup": ak.Route("a", ak.Parallel("b"))}, CompositionError, "bad-nesting"),
    ],
)
def test_what_cannot_be_saved(call: dict[str, Any], error: Any, code: str, tmp_path: Path) -> None:
    with pytest.raises(error) as caught:
        crew("a", "b").save(tmp_path / "crew", **call)
    assert caught.value.code == code
    assert not (tmp_path / "crew").exists()


def broken(directory: Path, **changes: Any) -> Path:
    file = directory / "adapterkit_setup.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return directory


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"setup": {"block": "Pile", "children": ["a", "b"]}}, "bad-setup"),
        ({"setup": "../a"}, "bad-file"),
        ({"setup": "z"}, "bad-file"),
        ({"format_version": 99}, "newer-format"),
    ],
)
def test_files_that_are_refused(changes: dict[str, Any], code: str, tmp_path: Path) -> None:
    directory = crew("a", "b").save(tmp_path / "crew", setup=ak.Stack("a", "b"))
    model = tiny.build("bert")
    with pytest.raises(FileFormatError) as caught:
        ak.load(model, broken(directory, **changes), head=False)
    assert caught.value.code == code
    assert "_adapterkit" not in model.__dict__ or not ak.of(model)


def test_all_of_it_or_nothing(tmp_path: Path) -> None:
    """The setup of the file has no meaning for its adapters: none of them stays."""
    kit = ak.attach(tiny.build("bert"), "seq_bn[use_gating=true]", name="a", head=False)
    kit.attach("seq_bn[use_gating=true]", name="b", head=False)
    directory = kit.save(tmp_path / "crew", setup=ak.Stack("a", "b"))
    data = {"block": "Split", "children": ["a", "b"], "splits": [6, 6]}
    model = tiny.build("bert")
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(CompositionError) as caught:
        ak.load(model, broken(directory, setup=data), head=False)
    assert caught.value.code == "undefined-block"
    assert [(name, type(module)) for name, module in model.named_modules()] == before


def test_a_setup_has_no_single_name(tmp_path: Path) -> None:
    directory = crew("a", "b").save(tmp_path / "crew", setup=ak.Stack("a", "b"))
    with pytest.raises(ConfigError) as caught:
        ak.load(tiny.build("bert"), directory, name="c", head=False)
    assert caught.value.code == "several-adapters"


def test_layers_that_are_skipped_stay_skipped(tmp_path: Path) -> None:
    kit = crew("a", "b")
    kit.activate(ak.Stack("a", "b"), skip_layers=["encoder.0"])
    kit.save(tmp_path / "crew", setup=kit.active)
    expected = hidden(kit.model)
    fresh = tiny.build("bert").eval()
    ak.load(fresh, tmp_path / "crew", head=False)
    assert torch.equal(hidden(fresh), expected)
    kit.activate(ak.Stack("a", "b"))
    assert not torch.equal(hidden(kit.model), expected)


def test_what_is_shared_stays_shared(tmp_path: Path) -> None:
    model = tiny.build("bert").eval()
    for seed, name in enumerate("abc"):
        kit = ak.attach(model, "mtl_lora[n_up=2]", name=name, seed=seed)
    kit.share("a", "b", "c").save(tmp_path / "crew", setup=ak.MultiTask("a", "b"))
    loaded = ak.load(tiny.build("bert").eval(), tmp_path / "crew")
    assert loaded.shared == (("a", "b"),)
    a, b = (loaded[name].units["encoder.0.attention.q"] for name in "ab")
    assert a.A is b.A and a.L is not b.L


def test_files_beside_a_setup_are_not_lost(tmp_path: Path) -> None:
    kit = crew("a", "b")
    kit.save(tmp_path / "crew", setup=ak.Stack("a", "b"))
    (tmp_path / "crew" / "README.md").write_text("keep")
    with pytest.raises(FileFormatError) as caught:
        kit.save(tmp_path / "crew", setup=ak.Stack("b", "a"))
    assert caught.value.code == "bad-file"
    assert (tmp_path / "crew" / "README.md").read_text() == "keep"


def test_an_adapter_is_not_hidden_behind_a_setup(tmp_path: Path) -> None:
    """`ak.load` would read the setup that is there, and not the adapter that was written last."""
    kit = crew("a", "b")
    kit.save(tmp_path, setup=ak.Stack("a", "b"))
    for form in ("adapterkit", "peft", "adapterhub"):
        with pytest.raises(FileFormatError) as caught:
            kit.save(tmp_path, "a", format=form)
        assert caught.value.code == "bad-file" and "adapterkit_setup.json" in str(caught.value)
    assert not (tmp_path / "adapter_config.json").exists()


def test_a_fusion_has_no_head_of_its_own_to_be_missed(tmp_path: Path) -> None:
    def classifier() -> nn.Module:
        return tiny.build("bert", "BertForSequenceClassification").eval()

    kit = ak.attach(classifier(), "seq_bn", name="a", seed=0).attach("seq_bn", name="b", seed=1)
    fusion = ak.FusionConfig(temperature=2.0)
    kit.fuse(ak.Fuse("a", "b"), config=fusion, seed=2).activate(ak.Fuse("a", "b"))
    assert kit["a+b"].config.temperature == 2.0
    for module in kit["b"].heads.values():
        nn.init.normal_(module.weight)
    kit.save(tmp_path / "crew", setup=ak.Fuse("a", "b"))
    loaded = ak.load(classifier(), tmp_path / "crew")
    with torch.no_grad():
        assert torch.equal(loaded.model(IDS).logits, kit.model(IDS).logits)
    again = ak.load(classifier(), tmp_path / "crew" / "a").load(tmp_path / "crew" / "b")
    with torch.no_grad():
        assert torch.equal(again.load(tmp_path / "crew" / "a+b").model(IDS).logits, kit.model(IDS).logits)
    with pytest.raises(ConfigError):
        kit.attach("fusion", name="none")


@pytest.mark.parametrize("file", ["adapterkit_setup.json", "a/adapter_config.json"])
def test_an_unknown_key_is_refused(file: str, tmp_path: Path) -> None:
    directory = crew("a", "b").save(tmp_path / "crew", setup=ak.Stack("a", "b"))
    path = directory / file
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 1}))
    with pytest.raises(FileFormatError) as caught:
        ak.load(tiny.build("bert"), directory, head=False)
    assert caught.value.code == "bad-file" and "'version'" in str(caught.value)


@pytest.mark.parametrize("place", ["a/notes.txt", "a/runs/log.txt", "b/head_config.json"])
@pytest.mark.parametrize("form", ["adapterkit", "adapterhub"])
def test_files_beside_an_adapter_of_a_setup_are_not_lost(form: Any, place: str, tmp_path: Path) -> None:
    kit = crew("a", "b")
    kit.save(tmp_path / "crew", setup=ak.Stack("a", "b"), format=form)
    kit.save(tmp_path / "crew", setup=ak.Stack("b", "a"), format=form)
    kept = tmp_path / "crew" / place
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("keep")
    with pytest.raises(FileFormatError) as caught:
        kit.save(tmp_path / "crew", setup=ak.Stack("a", "b"), format=form)
    assert caught.value.code == "bad-file" and kept.read_text() == "keep"


@pytest.mark.parametrize("how", ["setup", "alone", "checkpoint"])
def test_a_fusion_of_adapters_with_heads_has_none_of_its_own(how: str, tmp_path: Path) -> None:
    cls = "BertForSequenceClassification"
    kit = ak.attach(tiny.build("bert", cls), "seq_bn", name="a", seed=1)
    kit.attach("seq_bn", name="b", seed=2)
    kit.fuse("a", "b", seed=3).activate(ak.Fuse("a", "b"))
    with torch.no_grad():
        for adapter in kit.values():
            for tensor in adapter.parameters():
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(4)))
    model, fresh = kit.model.eval(), tiny.build("bert", cls).eval()
    given = tiny.inputs("bert", cls)
    with torch.no_grad():
        expected = model(**given).logits
    if how == "setup":
        ak.load(fresh, kit.save(tmp_path / "crew", setup=kit.active))
    elif how == "checkpoint":
        model.save_pretrained(tmp_path)
        ak.load(fresh, tmp_path)
    else:
        for name in ("a", "b", "a+b"):
            ak.load(fresh, kit.save(tmp_path / name, name))
    with torch.no_grad(), ak.of(fresh).using(ak.Fuse("a", "b")):
        assert torch.equal(fresh(**given).logits, expected)
