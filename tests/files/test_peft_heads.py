"""Heads and poolers in files of PEFT: what it calls modules_to_save."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch

import adapterkit as ak
from tests.files.peft_side import NOISE, loaded_there, put, run, same, shake, tensors, theirs
from tests.models.tiny import build

pytestmark = NOISE

HEADED = [
    ("bert", "BertForSequenceClassification", ["classifier"]),
    ("roberta", "RobertaForTokenClassification", ["classifier"]),
    ("llama", "LlamaForQuestionAnswering", ["qa_outputs"]),
    ("distilbert", "DistilBertForSequenceClassification", ["pre_classifier", "classifier"]),
    ("roberta", "RobertaForSequenceClassification", ["classifier", "score"]),
]


@pytest.mark.parametrize(("row", "cls", "saved"), HEADED)
def test_modules_to_save_are_the_heads(row: str, cls: str, saved: list[str], tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["query", "q_proj", "q_lin"], modules_to_save=saved)
    want = theirs(row, cls, config, tmp_path)
    model = build(row, cls)
    kit = ak.load(model, tmp_path)
    same(run(model, row, cls), want)
    with kit.disabled():
        assert torch.equal(run(model, row, cls), run(build(row, cls), row, cls))


def test_without_its_head_an_adapter_leaves_that_of_the_model(tmp_path: Path) -> None:
    row, cls = HEADED[0][:2]
    theirs(row, cls, peft.LoraConfig(target_modules=["query"], modules_to_save=["classifier"]), tmp_path)
    model = build(row, cls)
    kit = ak.load(model, tmp_path, head=False)
    assert not kit["default"].heads
    bare = build("bert")
    with pytest.raises(ak.errors.FileFormatError) as caught:
        ak.load(bare, tmp_path)
    assert caught.value.code == "head-unknown"
    ak.load(bare, tmp_path, head=False)


def test_the_names_of_older_versions_of_modules_to_save_are_read(tmp_path: Path) -> None:
    row, cls = HEADED[0][:2]
    want = theirs(
        row, cls, peft.LoraConfig(target_modules=["query"], modules_to_save=["classifier"]), tmp_path
    )
    named = tensors(tmp_path)
    renamed = {
        key.replace(".classifier.", ".classifier.modules_to_save."): value for key, value in named.items()
    }
    assert renamed.keys() != named.keys()
    put(tmp_path, renamed)
    model = build(row, cls)
    ak.load(model, tmp_path)
    same(run(model, row, cls), want)


def test_a_trained_pooler_comes_with_the_adapter_of_a_base_model(tmp_path: Path) -> None:
    want = theirs(
        "bert", None, peft.LoraConfig(target_modules=["query"], modules_to_save=["pooler"]), tmp_path
    )
    model = build("bert")
    kit = ak.load(model, tmp_path)
    same(run(model, "bert"), want)
    for form in ("peft", "adapterkit"):
        kit.save(tmp_path / form, format=form)
        again = build("bert")
        ak.load(again, tmp_path / form)
        same(run(again, "bert"), want)
    same(loaded_there("bert", None, tmp_path / "peft"), want)


def test_the_pooler_below_a_head_is_written_along(tmp_path: Path) -> None:
    """A pooler that was newly initialised must not be drawn anew where the adapter is loaded."""
    row, cls = HEADED[0][:2]
    model = build(row, cls, seed=1)
    kit = ak.attach(model, "lora", seed=0)
    shake(kit["default"].parameters())
    want = run(model, row, cls)
    kit.save(tmp_path / "adapter", format="peft")
    other = build(row, cls, seed=1)
    shake(other.bert.pooler.parameters(), seed=5)
    same(run(peft.PeftModel.from_pretrained(other, tmp_path / "adapter"), row, cls), want)
