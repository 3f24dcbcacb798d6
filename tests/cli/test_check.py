"""`adapterkit check`: static by default, on models when asked."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from adapterkit.cli.report import annotation
from adapterkit.errors import Problem
from adapterkit.spec import registry
from tests.cli.conftest import Ran
from tests.specs.files import BAD, names

Run = Callable[..., Ran]
GOOD = "adapterkit: 1\nstacks:\n  decoder:\n    layers: blocks\n    mlp: {up: mlp.up, down: mlp.down}\n"


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.yaml"
    path.write_text(GOOD)
    return path


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    path = tmp_path / "bad.yaml"
    path.write_text(GOOD.replace("down:", "dwn:") + "heads: 5\n")
    return path


def test_everything_that_is_shipped_is_good(run: Run) -> None:
    found = run("check")
    assert (found.code, found.err) == (0, "")
    files = len(list(registry.shipped_directory().glob("*.yaml")))
    assert found.out == f"{files} files: structure ok, not verified against a model\n"


def test_one_good_file(run: Run, good: Path) -> None:
    found = run("check", str(good))
    assert (found.code, found.out) == (0, f"{good}: structure ok, not verified against a model\n")


@pytest.mark.parametrize("name", ["encoder_decoder", "encoder-decoder"])
def test_a_name_or_model_type_stands_for_its_file(run: Run, name: str) -> None:
    found = run("check", name)
    assert found.code == 0 and found.out.startswith("interfaces/encoder_decoder.yaml: structure ok")


def test_problems_are_printed_with_their_places(run: Run, bad: Path, good: Path) -> None:
    found = run("check", str(good), str(bad))
    assert found.code == 1
    assert found.out.startswith(f"{bad}:5:23: error[unknown-word] stacks.decoder.mlp.dwn\n")
    assert "did you mean 'down'?" in found.out
    assert f"{bad}:6:8: error[wrong-type] heads\n" in found.out
    assert found.out.endswith("2 problems in 1 of 2 files\n")


@pytest.mark.parametrize("name", [name for name in names(BAD) if not name.startswith("model-")])
def test_bad_specs_print_their_expected_text(name: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(BAD)
    found = run("check", name)
    assert found.code == 1
    expected = Path(name).with_suffix(".txt").read_text(encoding="utf-8")
    lines = found.out.replace(f"{registry.shipped_directory()}/", "interfaces/").splitlines(keepends=True)
    assert "".join(lines[:-1]) == expected


def test_a_directory_stands_for_its_files(run: Run, good: Path, bad: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no spec")
    below = tmp_path / "below"
    below.mkdir()
    (below / "unseen.yaml").write_text("junk")
    assert run("check", str(tmp_path)).out.endswith("2 problems in 1 of 2 files\n")
    (below / "unseen.yaml").unlink()
    nothing = run("check", str(below))
    assert (nothing.code, nothing.out) == (2, "")
    assert "error[nothing-to-check]" in nothing.err


def test_standard_input(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for text, code, shown in ((GOOD, 0, "<stdin>: structure ok"), ("", 1, "<stdin>:1:1: error[empty]")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        found = run("check", "-")
        assert found.code == code
        assert found.out.startswith(shown)


def test_a_missing_file_is_a_problem(run: Run) -> None:
    found = run("check", "nowhere.yaml")
    assert found.code == 1
    assert found.out.startswith("nowhere.yaml: error[unreadable]\n  cannot be read: No such file")


def test_files_of_the_search_path_are_checked_too(
    run: Run, bad: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(registry.SEARCH_PATH, str(bad))
    found = run("check")
    assert found.code == 1
    assert f"{bad}:5:23" in found.out


def test_json(run: Run, good: Path, bad: Path) -> None:
    found = run("check", "--json", str(good), str(bad))
    assert found.code == 1
    data = json.loads(found.out)
    assert data["ok"] is False
    first, second = data["files"]
    assert first == {"file": str(good), "ok": True, "verified_on": [], "problems": []}
    assert [(p["code"], p["line"], p["column"]) for p in second["problems"]] == [
        ("unknown-word", 5, 23),
        ("wrong-type", 6, 8),
    ]
    assert run("check", "--format", "json", str(good)).out == run("check", "--json", str(good)).out


def test_github_annotations(run: Run, bad: Path) -> None:
    found = run("check", "--format", "github", str(bad))
    assert found.code == 1
    first = found.out.splitlines()[0]
    assert first.startswith(
        f"::error file={bad},line=5,col=23,title=unknown-word::stacks.decoder.mlp.dwn%0A'dwn' is"
    )


def test_annotations_escape_what_would_end_them() -> None:
    problem = Problem("code", "100%, a\nb", "x:y", file="a,b:c.yaml", line=3, column=1)
    assert annotation(problem) == "::error file=a%2Cb%3Ac.yaml,line=3,col=1,title=code::x:y%0A100%25, a%0Ab"


def test_an_unknown_format_is_wrong_usage(run: Run) -> None:
    found = run("check", "--format", "jsn")
    assert found.code == 2
    assert "did you mean 'json'?" in found.err


def test_a_model_type_is_resolved_without_weights(run: Run) -> None:
    found = run("check", "--model", "bert")
    assert found.code == 0
    assert found.out.endswith("bert.yaml: structure ok, verified on BertModel\n")


def test_a_file_that_does_not_fit_the_model(run: Run) -> None:
    bert = registry.shipped_directory() / "bert.yaml"
    found = run("check", str(bert), "--model", "gpt2", "--json")
    assert found.code == 1
    (only,) = json.loads(found.out)["files"]
    assert {problem["code"] for problem in only["problems"]} == {"path-not-found"}
    assert "GPT2Model" in found.out


def test_require_model_takes_the_defaults_of_the_files_own_types(run: Run, good: Path) -> None:
    bert = registry.shipped_directory() / "bert.yaml"
    assert run("check", "--require-model", str(bert)).out == f"{bert}: structure ok, verified on BertModel\n"
    found = run("check", "--require-model", str(good))
    assert found.code == 1
    assert found.out.startswith(f"{good}: error[not-verified]\n  the file names no model type")


def test_an_unknown_model_is_wrong_usage(run: Run) -> None:
    found = run("check", "--model", "bertt")
    assert (found.code, found.out) == (2, "")
    assert "error[no-such-model]" in found.err
    assert "did you mean 'bert'?" in found.err


@pytest.mark.parametrize("form", [["--json"], ["--format", "json"], ["--format=json"]])
def test_what_fails_as_a_whole_is_json_too(form: list[str], run: Run, good: Path) -> None:
    found = run("check", str(good), "--model", "nonsense_model", *form)
    assert found.code == 2
    assert json.loads(found.out)["problems"][0]["code"] == "no-such-model"


def test_it_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from adapterkit.cli.main import main; sys.argv = ['adapterkit', 'check']\n"
        "try: main()\nexcept SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'transformers', 'numpy', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
