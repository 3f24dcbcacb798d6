"""What is written stands there as a whole, and a source is what its name says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import adapterkit as ak
from adapterkit.errors import FileFormatError
from tests.models.tiny import build


@pytest.mark.parametrize("fails", ["adapter.safetensors", "adapter_config.json"])
def test_a_write_that_breaks_off_leaves_what_was_there(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit = ak.attach(build("bert"), "lora[r=4]", name="a", seed=1)
    kit.attach("lora[r=8]", name="b", seed=2)
    kit.save(tmp_path, "a")
    (tmp_path / "README.md").write_text("keep")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    rename = Path.rename

    def broken(self: Path, target: Any) -> Path:
        if self.parent.name == "new" and self.name == fails:
            raise OSError("the disk is full")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises(OSError, match="full"):
        kit.save(tmp_path, "b")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    monkeypatch.undo()
    kit.save(tmp_path, "b")
    loaded = ak.load(build("bert"), tmp_path)
    assert torch.equal(
        loaded["b"].units["encoder.0.attention.q"].A, kit["b"].units["encoder.0.attention.q"].A
    )
    assert (tmp_path / "README.md").read_text() == "keep"


@pytest.mark.parametrize("name", ["model.safetensors", "README.md"])
def test_a_file_is_no_directory(name: str, tmp_path: Path) -> None:
    """Beside it lies an adapter, which is not what was named."""
    kit = ak.attach(build("bert"), "lora", name="a")
    kit.model.save_pretrained(tmp_path)
    kit.save(tmp_path, "a")
    (tmp_path / "README.md").write_text("text")
    with pytest.raises(FileFormatError) as caught:
        ak.load(build("bert"), tmp_path / name)
    assert caught.value.code == "not-found" and "is a file" in str(caught.value)


def test_a_head_of_theirs_is_not_read_with_another_adapter(tmp_path: Path) -> None:
    kit = ak.attach(build("bert"), "lora", name="a")
    (tmp_path / "head_config.json").write_text("{}")
    with pytest.raises(FileFormatError) as caught:
        kit.save(tmp_path, "a", format="adapterhub")
    assert caught.value.code == "bad-file"
    assert [path.name for path in tmp_path.iterdir()] == ["head_config.json"]


@pytest.mark.parametrize("again", [False, True])
def test_the_directory_stays_the_one_that_it_is(
    again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link, or where the process works."""
    kit = ak.attach(build("bert"), "lora", name="a").attach("lora", name="b")
    for name in ("real", "here"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path / "here")
    for place in ("link", "here"):
        for _ in range(1 + again):
            kit.save(tmp_path / "link" if place == "link" else ".", setup=ak.Stack("a", "b"))
        assert sorted(path.name for path in (tmp_path / place).iterdir()) == [
            "a",
            "adapterkit_setup.json",
            "b",
        ]
    assert (tmp_path / "link").is_symlink() and len(list((tmp_path / "real").iterdir())) == 3
    assert Path.cwd() == tmp_path / "here" and list(ak.load(build("bert"), ".")) == ["a", "b"]


def test_what_is_in_the_way_is_kept(tmp_path: Path) -> None:
    kit = ak.attach(build("bert"), "lora", name="a")
    (tmp_path / "adapter_config.json").mkdir()
    (tmp_path / "adapter_config.json" / "mine").write_text("keep")
    (tmp_path / "file").write_text("keep")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    for place in (tmp_path, tmp_path / "file", tmp_path / "file" / "below", tmp_path / "link"):
        for options in ({"name": "a"}, {"setup": "a"}):
            with pytest.raises(FileFormatError) as caught:
                kit.save(place, **options)
            assert caught.value.code == "bad-file"
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
    with pytest.raises(FileFormatError) as caught:
        ak.load(build("bert"), "")
    assert caught.value.code == "not-found"


def test_tensors_that_are_elsewhere_are_not_written(tmp_path: Path) -> None:
    """As ZeRO-3 leaves them between passes: empty, on the device where they were."""
    kit = ak.attach(build("bert"), "lora", name="a")
    kit["a"].units["encoder.0.attention.q"].A.data = torch.empty(0)
    for format in ("adapterkit", "adapterhub", "peft"):
        with pytest.raises(FileFormatError) as error:
            kit.save(tmp_path / "a", format=format)
        assert error.value.code == "sharded" and not (tmp_path / "a").exists()
