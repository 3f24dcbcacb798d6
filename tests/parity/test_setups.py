"""AdapterHub's setups: what theirs computes in another way is refused, or becomes an option."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import adapterkit as ak
from adapterkit.errors import FileFormatError
from adapterkit.files.adapterhub.setup_options import repeated
from adapterkit.files.adapterhub.setup_refusals import refusals
from adapterkit.files.content import Content
from adapterkit.methods.names import parse
from tests.models import tiny
from tests.parity.compare import base, loaded, setup_directory
from tests.parity.recordings import COMPACT, Case

REFUSED: list[tuple[Any, tuple[str, ...], str]] = [
    (ak.Average("a", "b"), ("seq_bn", "seq_bn"), "once more"),
    (ak.Stack("a", "b"), ("lora", "dora"), "one LoRA to the next"),
    (ak.Stack("a", "b"), ("ia3", "lora"), "one LoRA to the next"),
    (ak.Parallel("a", "b"), ("dora", "dora"), "magnitude of its last DoRA"),
    (ak.MultiTask("a", "b"), ("dvora", "vera"), "magnitude of its last DoRA"),
    (ak.BatchSplit("a", "b", batch_sizes=[1, 1]), ("lora", "ia3"), "adds (IA)"),
    (ak.Stack("a", "b"), ("seq_bn", "par_bn"), "beside others"),
    (ak.Parallel("a", "b"), ("prefix_tuning[prefix_length=3]", "prefix_tuning"), "shorter prefixes"),
    (ak.Stack("a", "b"), ("par_bn", "par_bn"), "beside others"),
    (ak.Stack("a", "b"), ("mam", "par_bn"), "beside others"),
    (ak.Parallel("a", "b"), ("prefix_tuning", "prefix_tuning[leave_out=[encoder.0]]"), "shorter prefixes"),
    (ak.BatchSplit("a", "b", batch_sizes=1), ("prefix_tuning", "lora"), "shorter prefixes"),
    (
        ak.MultiTask(ak.Stack("a", "b"), "a"),
        ("prefix_tuning[prefix_length=3]", "prefix_tuning[prefix_length=3]"),
        "shorter prefixes",
    ),
    (ak.Split("a", "b", splits=[1, 1]), ("par_bn", "double_seq_bn"), "alike"),
    (ak.Parallel("a", "b"), ("seq_bn", "prompt_tuning"), "not those of 'b'"),
    (ak.Stack("a", "b", ak.BatchSplit("a", "b", batch_sizes=1)), ("noreft", "lora"), "of 'a' once"),
    (ak.BatchSplit("a", "b", batch_sizes=[1, 1]), ("lora", "loreft"), "not those of 'b'"),
    (ak.Parallel("a", "b"), ("seq_bn_inv", "seq_bn"), "of 'a' alone, and of all examples"),
    (ak.Parallel("a", "b"), ("seq_bn", "double_seq_bn"), "alike"),
    (ak.Stack("a", "b"), ("seq_bn", "seq_bn[original_ln_after=false]"), "alike"),
]


@pytest.mark.parametrize(("setup", "methods", "words"), REFUSED, ids=str)
def test_what_is_computed_in_another_way(setup: Any, methods: tuple[str, ...], words: str) -> None:
    contents = {name: Content(name, parse(method), {}) for name, method in zip("ab", methods, strict=True)}
    found = list(refusals(setup, contents))
    assert {problem.code for problem in found} == {"not-reproducible"}
    assert any(words in problem.message for problem in found)


def test_what_is_the_same_is_not_refused() -> None:
    for setup, methods in (
        (ak.Stack("a", "b"), ("ia3", "ia3")),
        (ak.Stack("a", "b"), ("seq_bn_inv", "double_seq_bn")),
        (ak.Stack("a", "b"), ("seq_bn_inv", "seq_bn_inv")),
        (ak.Stack("a", "b"), ("seq_bn", "noreft")),
        (ak.Stack("a", "b"), ("seq_bn", "prompt_tuning")),
        (ak.Stack("a", ak.Parallel("b", "b")), ("prompt_tuning", "lora")),
        (ak.Parallel("a", "b"), ("lora", "lora")),
        (ak.Stack("a", "b"), ("prefix_tuning[prefix_length=3]", "prefix_tuning")),
        (ak.Stack("a", "b"), ("mam", "lora")),
        (ak.Parallel("a", "b"), ("par_bn", "par_bn[scaling=2]")),
        (ak.Parallel("a", "b"), ("mam", "mam")),
    ):
        contents = {n: Content(n, parse(method), {}) for n, method in zip("ab", methods, strict=True)}
        assert not list(refusals(setup, contents))


def nested(work: Path, setup: Any) -> Path:
    """The recorded adapters a, b and c in another setup."""
    return setup_directory(Case(COMPACT, "bert", "BertModel", "parallel_stack"), work, setup)


def test_the_residual_that_is_added_twice_is_an_option(tmp_path: Path) -> None:
    case = Case(COMPACT, "bert", "BertModel", "parallel_stack")
    setup = {"type": "Parallel", "children": [{"type": "Stack", "children": ["a", "b"]}, "c"]}
    kit = ak.load(base(case, "eager"), nested(tmp_path, setup), head=False)
    options = {name: getattr(kit[name].config, "original_ln_first", None) for name in kit}
    assert options == {"a": True, "b": False, "c": False}
    assert kit.active == ak.Parallel(ak.Stack("a", "b"), "c")


def test_an_adapter_before_which_it_is_added_once_and_twice() -> None:
    """As a child of the fusion once, at the start of a Stack in it twice."""
    contents = {name: Content(name, parse("seq_bn"), {}) for name in "abc"}
    found = repeated(ak.Fuse(ak.Stack("a", "b"), "c"), contents)
    assert [found[name].config.original_ln_first for name in "abc"] == [True, False, False]
    with pytest.raises(FileFormatError) as caught:
        repeated(ak.Fuse(ak.Stack("c", "a"), "c"), contents)
    assert caught.value.code == "not-reproducible"


def test_what_acts_in_the_first_adapter_alone_is_an_option(tmp_path: Path) -> None:
    case = Case(COMPACT, "bert", "BertModel", "stack_seq_bn_prefix_reft")
    kit = loaded(case, base(case, "eager"), tmp_path)
    assert [getattr(kit[name].config, "first_only", None) for name in "abc"] == [None, None, True]
    case = Case(COMPACT, "bert", "BertModel", "stack_inv")
    kit = loaded(case, base(case, "eager"), tmp_path)
    options = {name: [getattr(c, "first_only", None) for c in kit[name].config.configs] for name in "ab"}
    assert options == {"a": [None, False], "b": [None, True]}


def block(word: str, *children: Any) -> dict[str, Any]:
    return {"type": word, "children": list(children)}


INNER = block("Stack", "a", "b")


@pytest.mark.parametrize(
    ("setup", "code"),
    [
        (block("MultiTask", INNER, "c"), "not-reproducible"),  # before 'a' it is added three times
        (block("Stack", block("Parallel", INNER, "a")), "not-reproducible"),  # once and twice before 'a'
        (block("Pile", "a", "b"), "bad-setup"),
        (block("Stack", "../a"), "bad-file"),
        (block("Stack", "z"), "bad-file"),
    ],
)
def test_setups_that_are_refused(setup: dict[str, Any], code: str, tmp_path: Path) -> None:
    model = base(Case(COMPACT, "bert", "BertModel", "parallel_stack"), "eager")
    directory = nested(tmp_path, setup)
    with pytest.raises(FileFormatError) as caught:
        ak.load(model, directory, head=False)
    assert caught.value.code == code
    assert "_adapterkit" not in model.__dict__


def test_a_family_whose_batch_grows_within_attention(tmp_path: Path) -> None:
    """Their library has cut heads for the old batch then, and takes the examples of others for tokens."""
    case = Case(COMPACT, "vit", "ViTModel", "lora_all")
    with pytest.raises(FileFormatError) as caught:
        ak.load(base(case, "eager"), setup_directory(case, tmp_path, block("Parallel", "a", "a")))
    assert caught.value.code == "not-reproducible"
    assert "attention.q" in str(caught.value)
    kit = ak.load(base(case, "eager"), setup_directory(case, tmp_path, block("Stack", "a")))
    assert kit.active == ak.Stack("a")


def test_their_heads_are_not_dropped_in_silence(tmp_path: Path) -> None:
    directory = nested(tmp_path, {"type": "Stack", "children": ["a", "b"]})
    file = directory / "adapter_setup.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "head_setup": "mood"}))
    model = base(Case(COMPACT, "bert", "BertModel", "parallel_stack"), "eager")
    with pytest.raises(FileFormatError) as caught:
        ak.load(model, directory)
    assert caught.value.code == "head-unknown"
    assert len(ak.load(model, directory, head=False)) == 2


@pytest.mark.parametrize(
    ("option", "refused"), [("original_ln_before=true", True), ("original_ln_before=false", False)]
)
def test_groups_in_which_some_lack_a_layer(option: str, refused: bool, tmp_path: Path) -> None:
    """Their library adds the residual for all groups, where it adds one, also for those that pass."""
    model = tiny.build("bert")
    for name, more in (("a", ""), ("b", ", leave_out=[encoder.0]"), ("c", "")):
        kit = ak.attach(model, f"seq_bn[{option}{more}]", name=name, head=False)
        kit.save(tmp_path / "out" / name, name, format="adapterhub")
    groups = block("BatchSplit", "c", "b") | {"kwargs": {"batch_sizes": [1, 1]}}
    said = {"adapter_setup": block("Stack", "a", groups), "head_setup": None}
    (tmp_path / "out" / "adapter_setup.json").write_text(json.dumps(said))
    if not refused:
        assert len(ak.load(tiny.build("bert"), tmp_path / "out")) == 3
        return
    with pytest.raises(FileFormatError) as caught:
        ak.load(tiny.build("bert"), tmp_path / "out")
    assert caught.value.code == "not-reproducible" and "lack a layer" in str(caught.value)
