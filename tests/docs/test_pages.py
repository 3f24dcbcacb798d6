"""Pages say what is so: their examples run, and every error code has its paragraph."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest
import yaml

import adapterkit as ak
from adapterkit.methods.names import METHODS, PRESETS
from adapterkit.spec import registry
from tests.docs.codes import collect

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

pytestmark = [
    # sizes of a tiny model that its config class has not foreseen; the page is about something else
    pytest.mark.filterwarnings("ignore:.*loss_type=None.*"),
]


def blocks(page: Path) -> list[tuple[str, str, int]]:
    """Language, text and line of every fenced block of a page."""
    text = page.read_text(encoding="utf-8")
    return [(m[1], m[2], text.count("\n", 0, m.start()) + 1) for m in FENCE.finditer(text)]


RUN = [page for page in PAGES if any(language in ("python", "pycon") for language, _, _ in blocks(page))]


def play(page: Path) -> None:
    """Run a page from top to bottom: `python` as a script, `pycon` as a session, `yaml` becomes its file."""
    names: dict[str, object] = {"__name__": "page"}
    for language, text, line in blocks(page):
        if language == "yaml" and (found := re.match(r"# (\w+\.yaml)\n", text)):
            Path(found[1]).write_text(text, encoding="utf-8")
        elif language == "python":
            exec(compile("\n" * line + text, str(page), "exec"), names)
        elif language == "pycon":
            test = doctest.DocTestParser().get_doctest(text, names, page.name, str(page), line)
            report: list[str] = []
            runner = doctest.DocTestRunner(optionflags=OPTIONS, verbose=False)
            runner.run(test, out=report.append, clear_globs=False)
            assert runner.failures == 0, "".join(report)
            names = test.globs


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    play(page)


def test_a_wrong_example_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 2\n```\n```pycon\n>>> x + 1\n4\n```\n")
    with pytest.raises(AssertionError, match=r"Got:\s+3"):
        play(page)


def test_links_lead_somewhere() -> None:
    """Relative links between the files of the repository."""
    broken = []
    for page in (*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"):
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
            if not (page.parent / target).exists():
                broken.append(f"{page.name}: {target}")
    assert broken == []


# ------------------------------------------------------------------------------------------- error codes


def explained() -> list[str]:
    """Codes that the page of errors explains, in its order."""
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    return re.findall(r"^### ([a-z0-9-]+)$", text, re.MULTILINE)


def test_every_code_can_be_read_from_the_source() -> None:
    assert collect()[1] == []


def test_every_code_is_explained_once() -> None:
    assert sorted(explained()) == sorted(collect()[0])


def test_explanations_say_something() -> None:
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    short = [code for code in explained() if len(text.split(f"### {code}\n")[1].split("\n#")[0].split()) < 8]
    assert short == []


# -------------------------------------------------------------------------------------------------- API


def test_everything_public_has_a_place_in_the_reference() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    told = set(re.findall(r"^\.\. auto\w+:: ([\w.]+)", text, re.MULTILINE))
    public = {"adapterkit.errors" if name == "errors" else name for name in ak.__all__}
    assert sorted(public - {"__version__"} - told) == []


# ----------------------------------------------------------------------------------------------- README


def test_readme_lists_every_family() -> None:
    """Model types that the README promises are those of the shipped interfaces."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    promised = re.search(r"<!-- model types -->\n(.*?)<!-- end -->", text, re.DOTALL)
    assert promised is not None
    assert set(re.findall(r"`([\w-]+)`", promised[1])) == set(registry.model_types())


def test_readme_shows_the_real_interface() -> None:
    """The interface in the README is a shipped one, word for word, without what it says on foreign files."""
    shown = [yaml.safe_load(text) for language, text, _ in blocks(ROOT / "README.md") if language == "yaml"]
    assert shown
    for data in shown:
        path = ROOT / "interfaces" / f"{data['model_type']}.yaml"
        shipped = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert data == {word: value for word, value in shipped.items() if word not in ("adapterhub", "peft")}


TRAINED = [name for name, config in METHODS.items() if config.trains]
ROWS = ("Paper", "Use it", "Learning rate", "Trained numbers", "Merges")


@pytest.mark.parametrize("method", TRAINED)
def test_every_method_has_a_page_with_all_that_one_asks(method: str) -> None:
    """Its options, formula, picture, paper, when to use it, how fast to train it, what it costs."""
    pages = (ROOT / "docs" / "methods").glob("*.md")
    (text,) = (t for page in pages if f"```{{options}} {method}\n" in (t := page.read_text(encoding="utf-8")))
    missing = [row for row in ROWS if not re.search(rf"^\| {row}\b[^|]*\| \S", text, re.MULTILINE)]
    assert not missing
    assert text.count("$$") >= 2 or method == "union", "no formula"
    assert "```text\n" in text, "no picture"
    assert "arxiv.org" in text, "no paper"
    listed = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    names = [name for name, (own, _) in PRESETS.items() if own == method] or [method]
    assert all(f"`{name}`" in listed or f"`{name}`" in text for name in names if method != "fusion")
