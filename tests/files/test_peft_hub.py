"""Hub ids: adapters in huggingface_hub's cache; what is not there is refused in words. No network."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub.constants
import peft
import pytest
import torch

import adapterkit as ak
from adapterkit.errors import FileFormatError
from tests.files.peft_side import NOISE, run, same, theirs
from tests.models.tiny import build

pytestmark = NOISE

NAME = "someone/some-adapter"
COMMITS = {"main": "a" * 40, "v2": "b" * 40}


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Revision -> output with the adapter of that revision; the cache has the layout of huggingface_hub."""
    repository = tmp_path / "hub" / "models--someone--some-adapter"
    wanted = {}
    for rank, (revision, commit) in enumerate(COMMITS.items(), start=2):
        config = peft.LoraConfig(r=rank, target_modules=["query"])
        wanted[revision] = theirs("bert", None, config, tmp_path / revision)
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        shutil.copytree(tmp_path / revision, repository / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return wanted


@pytest.mark.parametrize("revision", [None, "main", "v2", "b" * 40])
def test_an_adapter_is_loaded_by_its_id(revision: str | None, cached: dict[str, torch.Tensor]) -> None:
    want = cached["v2" if revision in ("v2", "b" * 40) else "main"]
    model = build("bert")
    ak.load(model, NAME, revision=revision, local_files_only=True)
    same(run(model, "bert"), want)


def test_revisions_are_told_apart(cached: dict[str, torch.Tensor]) -> None:
    assert not torch.allclose(cached["main"], cached["v2"], atol=1e-3)


@pytest.mark.parametrize(("name", "revision"), [("someone/else", None), (NAME, "v3"), ("nobody", None)])
@pytest.mark.usefixtures("cached")
def test_what_is_not_in_the_cache_is_an_error_in_words(name: str, revision: str | None) -> None:
    with pytest.raises(FileFormatError) as caught:
        ak.load(build("bert"), name, revision=revision, local_files_only=True)
    assert caught.value.code == "not-found"
    assert name in str(caught.value)
    assert "no directory, and no hub id" in str(caught.value)


@pytest.mark.parametrize("name", ["./someone/some-adapter", "/no/such/place", "a/b/c", ""])
def test_a_path_is_never_looked_up_in_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **kwargs: object) -> str:
        raise AssertionError("a path went to the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", never)
    with pytest.raises(FileFormatError) as caught:
        ak.load(build("bert"), name)
    assert caught.value.code in ("not-found", "unknown-format")
