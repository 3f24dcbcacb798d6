"""Configs of files with values that nobody would expect: an error with a code, and the model as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapterkit as ak
from adapterkit.errors import FileFormatError
from tests.models.tiny import build

INF = float("inf")
CASES: dict[str, tuple[str, str, tuple[str | int, ...], Any]] = {
    "a shape without end": ("lora", "adapterkit", ("slots", "encoder.0.attention.q", 1), INF),
    "an interface that is a number": ("lora", "adapterkit", ("interface", "spec"), -2.5),
    "an interface that is a list": ("lora", "adapterkit", ("interface", "spec"), ["bert"]),
    "a type that is a map": ("lora", "peft", ("peft_type",), {}),
    "an architecture that is a list": ("prefix_tuning", "adapterhub", ("config", "architecture"), [None]),
    "no number": ("prefix_tuning", "adapterhub", ("config", "dropout"), float("nan")),
    "a text among configs": ("mam", "adapterhub", ("config", "configs", 1), ""),
    "no configs": ("mam", "adapterhub", ("config", "configs"), None),
    "no dimension": (
        "compacter[reduction_factor=4,phm_dim=2]",
        "adapterhub",
        ("config", "phm_dim"),
        False,
    ),
}


@pytest.mark.parametrize(("method", "form", "place", "value"), CASES.values(), ids=CASES)
def test_junk_in_a_config(method: str, form: Any, place: tuple[Any, ...], value: Any, tmp_path: Path) -> None:
    ak.attach(build("bert"), method, name="a").save(tmp_path, format=form)
    file = tmp_path / "adapter_config.json"
    data = json.loads(file.read_text())
    there = data
    for word in place[:-1]:
        there = there[word]
    assert place[-1] in there or isinstance(place[-1], int)
    there[place[-1]] = value
    file.write_text(json.dumps(data))
    model = build("bert")
    keys = list(model.state_dict())
    with pytest.raises(FileFormatError) as caught:
        ak.load(model, tmp_path)
    assert caught.value.problems[0].code and str(tmp_path) in str(caught.value)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("listed", [None, [], {"a": 1}, {"a": "../model.safetensors"}, "model.safetensors"])
def test_an_index_that_names_no_files(listed: Any, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    with pytest.raises(FileFormatError):
        ak.load(build("bert"), tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.bool, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    ("form", "key"), [("adapterkit", "encoder.0.attention.q.B"), ("adapterkit", "head.classifier.weight")]
)
def test_numbers_that_are_none(form: Any, key: str, dtype: torch.dtype, tmp_path: Path) -> None:
    cls = "BertForSequenceClassification"
    ak.attach(build("bert", cls), "lora", name="a").save(tmp_path, format=form)
    file = tmp_path / "adapter.safetensors"
    tensors = load_file(file)
    save_file({**tensors, key: tensors[key].to(dtype)}, file)
    kit = ak.attach(build("bert", cls), "lora", name="a")
    for call in (lambda: ak.load(build("bert", cls), tmp_path), lambda: kit.swap("a", tmp_path)):
        with pytest.raises(FileFormatError) as caught:
            call()
        found = [problem.address for problem in caught.value.problems if problem.code == "bad-file"]
        assert len(found) == 1 and key.endswith(found[0]) and str(dtype) in str(caught.value)


def test_a_unit_has_the_widest_type_of_its_tensors(tmp_path: Path) -> None:
    ak.attach(build("bert"), "lora", name="a").save(tmp_path)
    file = tmp_path / "adapter.safetensors"
    tensors = {key: torch.randn(value.shape) for key, value in load_file(file).items()}
    halves = {key: value.bfloat16() if key.endswith("A") else value for key, value in tensors.items()}
    save_file(halves, file)
    found = ak.load(build("bert"), tmp_path)["a"].state_dict()
    assert all(torch.equal(found[key], value.float()) for key, value in halves.items())
