"""YAML text -> data with the place of every value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterkit.errors import SpecError
from adapterkit.spec import registry, text

SHIPPED = sorted(registry.shipped_directory().glob("*.yaml"))


def places(node: yaml.Node, loc: tuple[str | int, ...] = ()) -> dict[tuple[str | int, ...], tuple[int, int]]:
    """Place of every value, counted from 1, from PyYAML's own node tree."""
    found = {loc: (node.start_mark.line + 1, node.start_mark.column + 1)}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            found |= places(value, (*loc, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            found |= places(item, (*loc, index))
    return found


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_value_of_a_shipped_file_has_its_place(path: Path) -> None:
    document = text.read(path)
    found = {loc: (mark.line, mark.column) for loc, mark in document.marks.items()}
    assert found == places(yaml.compose(path.read_text()))
    assert {mark.file for mark in document.marks.values()} == {str(path)}


def test_keys_have_places_of_their_own() -> None:
    document = text.parse("a:\n  b: [c]\n", "f")
    assert {loc: (mark.line, mark.column) for loc, mark in document.keys.items()} == {
        ("a",): (1, 1),
        ("a", "b"): (2, 3),
    }
    # what is not there is placed at its nearest parent
    missing = document.mark(("a", "b", 7, "x"))
    assert missing is not None
    assert (missing.line, missing.column) == (2, 3)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**15), 10**15)
    | st.text(st.characters(codec="utf-8"), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text("abcxyz_", min_size=1, max_size=5), inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(deadline=None, max_examples=150)
@given(st.dictionaries(st.text("abcxyz", min_size=1, max_size=4), values, min_size=1, max_size=4))
def test_what_is_written_is_read(data: dict[str, Any]) -> None:
    written = yaml.safe_dump(data, allow_unicode=True, sort_keys=False, default_style='"')
    # double quotes make everything text; what is then tagged as null, number or bool is refused
    if "!!" in written:
        assert text.parse(written, "f").problems
    else:
        assert text.parse(written, "f").data == data


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("true", True),
        ("false", False),
        ("null", None),
        ("~", None),
        ("yes", "yes"),
        ("on", "on"),
        ("True", "True"),
        ("12", 12),
        ("-3", -3),
        ("1.5", 1.5),
        ("1e3", 1000.0),
        ("0x10", "0x10"),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("'12'", "12"),
        ("'true'", "true"),
        ("9" * 30, "9" * 30),
    ],
)
def test_plain_words_follow_the_core_schema(word: str, value: Any) -> None:
    found = text.parse(f"a: {word}\n", "f").data["a"]
    assert found == value
    assert type(found) is type(value)


def test_the_loader_without_libyaml_reads_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = [text.parse(path.read_bytes(), str(path)) for path in SHIPPED]
    monkeypatch.setattr(text, "_Loader", yaml.SafeLoader)
    assert [text.parse(path.read_bytes(), str(path)) for path in SHIPPED] == fast


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=300))
def test_random_bytes_give_spec_errors_only(content: bytes) -> None:
    try:
        registry.load_text(content, "f")
    except SpecError as error:
        assert error.problems


PIECES = [
    "&a",
    "*a",
    "!!python/name:os.system ",
    "- ",
    "? ",
    ": ",
    "{",
    "}",
    "[",
    "]",
    "\t",
    "\n",
    "'",
    "|",
    "null",
]


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_mutated_shipped_files_give_spec_errors_only(data: st.DataObject) -> None:
    lines = data.draw(st.sampled_from(SHIPPED)).read_text().splitlines()
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(lines) - 1))
        kind = data.draw(st.sampled_from(["drop", "repeat", "cut", "insert", "swap", "indent"]))
        column = data.draw(st.integers(0, len(lines[at])))
        if kind == "drop" and len(lines) > 1:
            del lines[at]
        elif kind == "repeat":
            lines.insert(at, lines[at])
        elif kind == "cut":
            lines[at] = lines[at][:column]
        elif kind == "insert":
            lines[at] = lines[at][:column] + data.draw(st.sampled_from(PIECES)) + lines[at][column:]
        elif kind == "swap":
            other = data.draw(st.integers(0, len(lines) - 1))
            lines[at], lines[other] = lines[other], lines[at]
        else:
            lines[at] = "  " + lines[at]
    try:
        registry.load_text("\n".join(lines), "f")
    except SpecError as error:
        assert all(problem.code and problem.message for problem in error.problems)


def test_a_text_that_cannot_be_encoded_is_refused() -> None:
    with pytest.raises(SpecError) as caught:
        registry.load_text("a: \ud800\n", "f")
    assert caught.value.code == "not-yaml"
