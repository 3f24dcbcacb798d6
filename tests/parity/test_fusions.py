"""Directories of AdapterHub's fusions: what they become, and why some are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import nn

import adapterkit as ak
from adapterkit.errors import FileFormatError, PlanError
from tests.parity.compare import adapter_directory, base
from tests.parity.editing import Tensors
from tests.parity.recordings import COMPACT, Case

NAMED = Case(COMPACT, "bert", "BertModel", "fuse_named")
WEIGHTS = "model_adapter_fusion.safetensors"
LAYER = "encoder.layer.1.output.adapter_fusion_layer.my_fusion"


def with_children(work: Path, *names: str) -> nn.Module:
    model = base(NAMED, "eager")
    for name in names:
        ak.load(model, adapter_directory(NAMED, work, name), head=False, name=name)
    return model


def edited(work: Path, *, gone: str = "", added: str = "", **config: Any) -> Path:
    """A copy of a recorded fusion with other tensors, other options."""
    directory = work / "edited"
    shutil.copytree(NAMED.directory / "fusions" / "my_fusion", directory)
    file = directory / "adapter_fusion_config.json"
    said = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**said, "config": {**said["config"], **config}}), encoding="utf-8")
    found: Tensors = {k: v for k, v in load_file(directory / WEIGHTS).items() if not gone or gone not in k}
    if added:
        found[added] = next(iter(found.values())).clone()
    save_file(found, directory / WEIGHTS)
    return directory


def test_a_fusion_is_detected_and_acts(tmp_path: Path) -> None:
    kit = ak.load(with_children(tmp_path, "a", "b"), edited(tmp_path))
    assert kit.active == ak.Fuse("a", "b", name="my_fusion")
    theirs = load_file(NAMED.directory / "fusions" / "my_fusion" / WEIGHTS)
    own = kit["my_fusion"].state_dict()
    assert own["encoder.1.mlp.query.weight"].equal(theirs[f"{LAYER}.query.weight"])
    assert len(own) == len(theirs)


def test_a_name_with_a_comma_is_written_with_a_plus(tmp_path: Path) -> None:
    case = Case(COMPACT, "bert", "BertModel", "fuse2")
    model = with_children(tmp_path, "a", "b")
    with pytest.raises(FileFormatError) as caught:
        ak.load(model, case.directory / "fusions" / "a+b")
    assert caught.value.code == "bin-file"
    assert "a+b" in ak.load(model, case.directory / "fusions" / "a+b", allow_bin=True)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"temperature": True}, "not-reproducible"),
        ({"heads": 2}, "unknown-option"),
        ({"key": "many"}, "bad-option"),
        ({"gone": "layer.1.output.adapter_fusion_layer.my_fusion.key.bias"}, "missing-tensors"),
        ({"key": False}, "unknown-tensors"),
        ({"added": f"{LAYER}.dense.weight"}, "unknown-tensors"),
    ],
)
def test_what_is_refused(change: dict[str, Any], code: str, tmp_path: Path) -> None:
    model = with_children(tmp_path, "a", "b")
    with pytest.raises(FileFormatError) as caught:
        ak.load(model, edited(tmp_path, **change))
    assert caught.value.code == code
    assert set(ak.of(model)) == {"a", "b"}


def test_its_adapters_come_first(tmp_path: Path) -> None:
    model = with_children(tmp_path, "a")
    with pytest.raises(PlanError) as caught:
        ak.load(model, edited(tmp_path))
    assert caught.value.code == "no-such-adapter"
    assert set(ak.of(model)) == {"a"}


def test_it_has_weights_wherever_its_adapters_are(tmp_path: Path) -> None:
    model = with_children(tmp_path, "a", "b")
    with pytest.raises(PlanError) as caught:
        ak.load(model, edited(tmp_path, gone="layer.1."))
    assert (caught.value.code, caught.value.address) == ("no-fusion", "encoder.1.mlp")
