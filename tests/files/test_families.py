"""Files of one family at models of another, where addresses and shapes happen to fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adapterkit as ak
from adapterkit.errors import FileFormatError
from tests.models import tiny

OTHERS = ["roberta", "electra"]


def refused(call: Any, model: nn.Module) -> FileFormatError:
    """The error of a call, which leaves the model as it was."""
    keys = list(model.state_dict())
    with pytest.raises(FileFormatError) as caught:
        call()
    assert caught.value.code == "other-model" and list(model.state_dict()) == keys
    return caught.value


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return ak.attach(tiny.build("bert"), "lora", name="a").save(tmp_path / "a")


def rewritten(directory: Path, **changes: Any) -> None:
    """Other words in what the file says of its interface, or none for None."""
    file = directory / "adapter_config.json"
    data = json.loads(file.read_text())
    for word, value in changes.items():
        if value is None:
            data["interface"].pop(word, None)
        else:
            data["interface"][word] = value
    file.write_text(json.dumps(data))


@pytest.mark.parametrize("row", OTHERS)
def test_a_file_of_another_family_is_refused(row: str, saved: Path) -> None:
    model = tiny.build(row)
    error = refused(lambda: ak.load(model, saved), model)
    (problem,) = error.problems
    assert "'bert'" in problem.message and row in problem.message and problem.expected
    assert problem.file == str(saved)


def test_whose_addresses_and_shapes_do_fit(saved: Path) -> None:
    """Else the tests above would prove nothing: by hand, the user says that the model is of the family."""
    model = tiny.build("electra")
    kit = ak.load(model, saved, interface="bert")
    assert kit["a"].num_parameters == ak.load(tiny.build("bert"), saved)["a"].num_parameters


def test_nor_is_it_swapped_in(saved: Path) -> None:
    kit = ak.attach(tiny.build("electra"), "lora", name="a")
    before = {key: value.clone() for key, value in kit["a"].state_dict().items()}
    refused(lambda: kit.swap("a", saved), kit.model)
    assert all(torch.equal(value, before[key]) for key, value in kit["a"].state_dict().items())


def test_nor_are_those_of_a_setup_and_of_a_checkpoint(tmp_path: Path) -> None:
    kit = ak.attach(tiny.build("bert"), "seq_bn", name="a").attach("seq_bn", name="b")
    kit.save(tmp_path / "setup", setup=ak.Stack("a", "b"))
    kit.model.save_pretrained(tmp_path / "checkpoint")
    for source in ("setup", "checkpoint"):
        model = tiny.build("electra")
        refused(lambda source=source, model=model: ak.load(model, tmp_path / source), model)
        assert list(ak.load(tiny.build("bert"), tmp_path / source)) == ["a", "b"]


def test_between_classes_of_one_family(saved: Path) -> None:
    ak.load(tiny.build("bert", "BertForSequenceClassification"), saved, head=False)


def test_between_types_that_one_interface_describes(tmp_path: Path) -> None:
    ak.attach(tiny.build("clip", "CLIPTextModel"), "lora[targets=[text.0.attention.q]]", name="a").save(
        tmp_path
    )
    ak.load(tiny.build("clip", "CLIPModel"), tmp_path, head=False)


def test_a_file_from_before_types_were_recorded(saved: Path) -> None:
    rewritten(saved, model_type=None)
    ak.load(tiny.build("bert"), saved)
    refused(lambda: ak.load(model, saved), model := tiny.build("electra"))


def test_an_interface_that_is_divided_later(saved: Path) -> None:
    """The name is unknown here, the type of the model is not."""
    rewritten(saved, name="bert_of_old")
    ak.load(tiny.build("bert"), saved)
    refused(lambda: ak.load(model, saved), model := tiny.build("electra"))


def test_an_interface_by_hand(tmp_path: Path) -> None:
    """It travels in the file, and is for the types that it says and for the one it was used on."""
    spec = {**ak.Interface.load("bert").model_dump(mode="json", exclude_unset=True), "source": "mine"}
    spec.pop("like", None)
    ak.attach(tiny.build("bert"), "lora", name="a", interface=spec).save(tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["interface"]["name"] == "custom"
    ak.load(tiny.build("bert"), tmp_path / "a")
    ak.attach(tiny.build("bert"), "ia3", name="shipped").load(tmp_path / "a")
    model = tiny.build("electra")
    refused(lambda: ak.load(model, tmp_path / "a"), model)
    kit = ak.attach(tiny.build("electra"), "ia3", name="shipped")
    refused(lambda: kit.load(tmp_path / "a"), kit.model)
    ak.load(model, tmp_path / "a", interface=spec)

    ak.attach(tiny.build("electra"), "lora", name="a", interface=spec).save(tmp_path / "b")
    ak.load(tiny.build("electra"), tmp_path / "b")


def test_parts_of_other_families(tmp_path: Path) -> None:
    """The whole is described by one interface, its parts by their own."""
    kit = ak.attach(tiny.build("encoder_decoder"), "lora", name="a")
    kit.save(tmp_path)
    (part, said), *_ = json.loads((tmp_path / "adapter_config.json").read_text())["interface"][
        "parts"
    ].items()
    ak.load(tiny.build("encoder_decoder"), tmp_path)
    rewritten(tmp_path, parts={part: {"name": "electra", "model_type": ["electra"]}})
    model = tiny.build("encoder_decoder")
    error = refused(lambda: ak.load(model, tmp_path), model)
    assert error.address == part and said["name"] in str(error) and "'electra'" in str(error)
