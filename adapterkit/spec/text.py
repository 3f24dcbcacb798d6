"""YAML text -> plain data plus the place of every value. No anchors, aliases, tags, merge keys.

Built from parser events, so that alias bombs and unknown tags are refused before anything is made.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from adapterkit.errors import Problem, SpecError

try:
    from yaml import CSafeLoader as _Loader
except ImportError:  # PyYAML without libyaml
    from yaml import SafeLoader as _Loader  # type: ignore[assignment]

MAX_BYTES = 1_000_000
MAX_DEPTH = 40

Loc = tuple[str | int, ...]


@dataclass(frozen=True)
class Mark:
    """A place in a file, counted from 1."""

    file: str
    line: int
    column: int


@dataclass(frozen=True)
class Document:
    """Data of one YAML file. `marks` holds the place of each value, `keys` the place of each key.

    `problems` are those that leave the rest readable, so that all of a file can be reported at once.
    """

    data: dict[str, Any]
    marks: dict[Loc, Mark]
    keys: dict[Loc, Mark]
    file: str = ""
    problems: tuple[Problem, ...] = ()

    def mark(self, loc: Loc, *, key: bool = False) -> Mark | None:
        """Place of `loc`, or of its nearest parent that stands in the file."""
        while True:
            for table in (self.keys, self.marks) if key else (self.marks, self.keys):
                if loc in table:
                    return table[loc]
            if not loc:
                return None
            loc, key = loc[:-1], True

    def problem(
        self, loc: Loc, code: str, message: str, expected: str = "", hint: str = "", *, key: bool = False
    ) -> Problem:
        """A problem at the place of `loc`, or of its key."""
        mark = self.mark(loc, key=key) or Mark(self.file, 0, 0)
        address = ".".join(cut(part) for part in loc)
        return Problem(code, message, address, expected, hint, mark.file, mark.line, mark.column)


def cut(text: object, limit: int = 80) -> str:
    """Text that is not too long for a message."""
    shown = str(text)
    return shown if len(shown) <= limit else f"{shown[: limit - 3]}..."


_INT = re.compile(r"^[-+]?[0-9]+$")
_FLOAT = re.compile(r"^[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)([eE][-+]?[0-9]+)?$")
_WORDS: dict[str, Any] = {"true": True, "false": False, "null": None, "~": None, "": None}


def _scalar(value: str, plain: bool) -> Any:
    # YAML 1.2's core schema: `on`, `no` and the like are words here, not booleans.
    if not plain:
        return value
    if value in _WORDS:
        return _WORDS[value]
    if _INT.match(value):
        # Python refuses huge integers; they are no numbers of a spec either
        return int(value) if len(value) < 20 else value
    return float(value) if _FLOAT.match(value) else value


_WRITTEN_OUT = "expected every value written out; 'like' copies a whole interface or stack"
_BEGINNING = "expected an interface, which begins with 'adapterkit: 1'"


class _Builder:
    """Builds data from events and gathers every problem on the way."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.marks: dict[Loc, Mark] = {}
        self.keys: dict[Loc, Mark] = {}
        self.problems: list[Problem] = []
        self.aliases: set[str | None] = set()

    def place(self, event: Any) -> Mark:
        return Mark(self.file, event.start_mark.line + 1, event.start_mark.column + 1)

    def refuse(self, mark: Mark, code: str, message: str, expected: str = "") -> None:
        self.problems.append(
            Problem(code, message, expected=expected, file=mark.file, line=mark.line, column=mark.column)
        )

    def build(self, events: Any, event: Any, loc: Loc) -> Any:
        mark = self.place(event)
        self.marks[loc] = mark
        if len(loc) > MAX_DEPTH:
            self.refuse(mark, "too-deep", f"nested more than {MAX_DEPTH} deep")
            raise SpecError(self.problems)
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self.aliases:  # each is said once: a bomb has thousands
                self.aliases.add(event.anchor)
                self.refuse(mark, "alias", f"alias '*{event.anchor}' is not allowed", _WRITTEN_OUT)
            return None
        if event.anchor:
            self.refuse(mark, "alias", f"anchor '&{event.anchor}' is not allowed", _WRITTEN_OUT)
        if event.tag and event.tag != "!":
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            self.refuse(mark, "tag", f"tag {tag!r} is not allowed", "expected words, numbers, lists and maps")
        if isinstance(event, yaml.ScalarEvent):
            return _scalar(event.value, bool(event.implicit[0]))
        if isinstance(event, yaml.SequenceStartEvent):
            return self._list(events, loc)
        return self._map(events, loc)

    def _list(self, events: Any, loc: Loc) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            items.append(self.build(events, event, (*loc, len(items))))
        return items

    def _map(self, events: Any, loc: Loc) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            mark = self.place(event)
            if not isinstance(event, yaml.ScalarEvent):
                self.refuse(mark, "bad-key", "a key must be a plain word")
                self.build(events, event, (*loc, "?"))
                self.build(events, next(events), (*loc, "?"))
                continue
            key = event.value
            if event.anchor or (event.tag and event.tag != "!"):
                self.refuse(mark, "alias" if event.anchor else "tag", "a key takes no anchor and no tag")
            if key in found:
                first = self.keys[(*loc, key)]
                self.refuse(mark, "duplicate-key", f"{key!r} stands twice; first in line {first.line}")
            if key == "<<":
                self.refuse(mark, "alias", "merge key '<<' is not allowed", _WRITTEN_OUT)
            self.keys.setdefault((*loc, key), mark)
            value = self.build(events, next(events), (*loc, "?" if key in found else key))
            found.setdefault(key, value)
        return found


def parse(content: bytes | str, file: str) -> Document:
    """Parse one YAML document. Duplicate keys, aliases and tags are listed in `problems` of the result.

    Raises: SpecError: what cannot be read at all: not UTF-8, too large, no YAML, not a map.
    """
    if len(content) > MAX_BYTES:
        raise SpecError(_whole("too-large", f"larger than {MAX_BYTES:,} bytes, which is the limit", file))
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
    except UnicodeDecodeError as error:
        raise SpecError(
            _whole("not-utf8", f"not UTF-8 text: byte {error.start} cannot be read", file)
        ) from None
    builder = _Builder(file)
    try:
        events = iter(yaml.parse(text, Loader=_Loader))
        next(events)  # the stream starts
        if isinstance(event := next(events), yaml.StreamEndEvent):
            raise SpecError(_whole("empty", "the file is empty", file, _BEGINNING))
        data = builder.build(events, next(events), ())
        next(events)  # the document ends
        if not isinstance(event := next(events), yaml.StreamEndEvent):
            builder.refuse(
                builder.place(event),
                "two-documents",
                "a second document begins here",
                "expected one in a file",
            )
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = " ".join(str(part) for part in (error.context, error.problem) if part)
        place = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        raise SpecError(
            [*builder.problems, Problem("not-yaml", what, file=file, line=place[0], column=place[1])]
        ) from None
    except (yaml.YAMLError, ValueError) as error:  # unprintable characters
        what = str(getattr(error, "reason", error))[:200]
        raise SpecError(_whole("not-yaml", f"characters that no YAML has: {what}", file)) from None
    except RecursionError:
        raise SpecError(_whole("too-deep", f"nested more than {MAX_DEPTH} deep", file)) from None
    if not isinstance(data, dict):
        kind = "empty" if data is None else "not-a-map"
        raise SpecError([*builder.problems, _whole(kind, "the file holds no map", file, _BEGINNING)])
    return Document(data, builder.marks, builder.keys, file, tuple(builder.problems))


def _whole(code: str, message: str, file: str, expected: str = "") -> Problem:
    return Problem(code, message, expected=expected, file=file, line=1, column=1)


def read(path: Path, shown: str | None = None) -> Document:
    """Parse the file at `path`; it is called `shown` in messages."""
    name = shown or str(path)
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise SpecError(Problem("unreadable", f"cannot be read: {error.strerror}", file=name)) from None
    except ValueError:  # a name that no file system takes
        raise SpecError(Problem("unreadable", f"{name!r} is not the name of a file")) from None
    return _parse_once(content, name)


_parse_once = lru_cache(maxsize=256)(parse)
"""Many interfaces copy a few: these are parsed once. Keyed by content, so that it is never stale."""
