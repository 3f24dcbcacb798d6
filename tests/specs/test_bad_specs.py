"""Every wrong spec gives exactly the problems that its .txt says: all of them, sorted, never a traceback."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from adapterkit.errors import SpecError
from adapterkit.spec import registry
from adapterkit.spec.text import MAX_BYTES
from tests.docs.codes import collect
from tests.specs.files import BAD, names, report

NAMES = names(BAD)


@pytest.mark.parametrize("name", NAMES)
def test_a_bad_spec_gives_its_expected_text(
    name: str, monkeypatch: pytest.MonkeyPatch, update_golden: bool
) -> None:
    monkeypatch.chdir(BAD)
    found = report(name)
    expected = Path(name).with_suffix(".txt")
    if update_golden:
        expected.write_text(found, encoding="utf-8")
    assert found, f"{name} is good"
    assert found == expected.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_problems_are_sorted_by_place(name: str) -> None:
    text = (BAD / name).with_suffix(".txt").read_text(encoding="utf-8")
    places = re.findall(r"^([^\s:]+):(\d+):(\d+): error\[", text, re.MULTILINE)
    assert places == sorted(places, key=lambda place: (place[0], int(place[1]), int(place[2])))


def test_there_are_enough_and_each_has_its_text() -> None:
    assert len(NAMES) >= 60
    assert {Path(name).stem for name in NAMES} == {path.stem for path in BAD.glob("*.txt")}


def test_every_code_of_reading_and_resolving_has_a_bad_spec() -> None:
    rooms = ("adapterkit/spec/", "adapterkit/model/")
    raised = {code for code, places in collect()[0].items() if any(at.startswith(rooms) for at in places)}
    texts = "".join(path.read_text(encoding="utf-8") for path in BAD.glob("*.txt"))
    shown = set(re.findall(r"error\[([a-z0-9-]+)\]", texts))
    # about files that are too large to keep or not there, and about code of others: tested by name
    assert raised - shown == {"too-large", "unreadable", "bad-entry-point"}


def test_a_file_of_100_megabytes_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "large.yaml"
    with path.open("wb") as stream:
        stream.truncate(100_000_000)
    with pytest.raises(SpecError) as caught:
        registry.load(path)
    assert caught.value.code == "too-large"
    assert f"{MAX_BYTES:,}" in str(caught.value)


def test_a_file_of_the_largest_size_with_only_problems_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "junk.yaml"
    path.write_text("adapterkit: 1\n" + "".join(f"w{i}: x\n" for i in range(20_000)))
    with pytest.raises(SpecError) as caught:
        registry.load(path)
    # each unknown word, and that there are no stacks is not said: the words come first
    assert {problem.code for problem in caught.value.problems} == {"unknown-word"}
    assert len(caught.value.problems) == 20_000


def test_a_missing_file_and_a_directory_are_unreadable(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(SpecError) as caught:
            registry.load(path)
        assert caught.value.code == "unreadable"


def test_nothing_is_run_or_made_by_a_tag(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[object] = []
    monkeypatch.setattr("os.system", called.append)
    report(str(BAD / "tag-python-object.yaml"))
    assert not called
