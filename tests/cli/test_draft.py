"""`adapterkit draft`: an interface on standard output, what is left open on standard error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import adapterkit as ak
from adapterkit.spec import registry


def test_a_drafted_file_is_an_interface(run, tmp_path: Path) -> None:
    found = run("draft", "bert")
    assert (found.code, "not found" in found.err) == (0, False)
    assert found.out.startswith("# yaml-language-server: $schema=")
    interface = registry.load_text(found.out, "bert.yaml")
    assert set(interface.stacks) == {"encoder"} and interface.model_type == ("bert",)
    file = tmp_path / "mine.yaml"
    assert run("draft", "bert", "-o", str(file)).code == 0
    assert file.read_text(encoding="utf-8") == found.out
    assert run("check", str(file), "--model", "bert").code == 0


def test_work_is_not_overwritten(run, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("mine", encoding="utf-8")
    found = run("draft", "bert", "-o", str(file))
    assert found.code == 2 and "error[unwritable]" in found.err
    assert file.read_text(encoding="utf-8") == "mine"


def test_json_says_what_was_not_found(run) -> None:
    found = run("draft", "bert", "--no-like", "--json")
    data = json.loads(found.out)
    assert (data["complete"], data["not_found"]) == (True, [])
    assert data["interface"]["stacks"]["encoder"]["layers"] == "encoder.layer"


def test_any_module_by_a_function(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    found = run("draft", "tests.author.factories:classifier")
    assert found.code == 0
    assert ak.Interface.load(
        json.loads(run("draft", "tests.author.factories:classifier", "--json").out)["interface"]
    )


def test_errors_say_what_is_wrong(run) -> None:
    found = run("draft", "bertt")
    assert found.code == 2 and "did you mean 'bert'?" in found.err
    found = run("draft", "tests.author.factories:odd_with_inputs")
    assert found.code == 1 and "error[nothing-to-draft]" in found.err
