"""A drafted interface as the text of a file: in the order of the forward pass, comments beside the words."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from adapterkit.author.describe import Notes, Words
from adapterkit.versions import installed

Loc = tuple[str, ...]

_PLAIN = re.compile(r"^[A-Za-z_.][A-Za-z0-9_./*-]*$")
_RESERVED = {"true", "false", "null", "yes", "no", "on", "off", "y", "n", "~"}
_ONE_LINE = ("embeddings", "norm", "reads", "sizes", "inputs")


def written(data: Words, notes: Notes, model: str) -> str:
    """The whole file."""
    version = installed("transformers")
    lines = [
        "# yaml-language-server: $schema=schema.json",
        f"# drafted from one recorded forward pass of a tiny {model} (transformers {version})",
    ]
    beside = _beside(data, notes)
    lines += [f"# look at: {_place(loc)}{text}" for loc, text in notes.gaps]
    lines += [f"# look at: {text}" for text in beside.pop((), ())]
    lines += _lines(data, (), beside)
    return "\n".join(lines) + "\n"


def _beside(data: Words, notes: Notes) -> dict[Loc, list[str]]:
    """Remarks by the line that they stand above: that of their word, or of the nearest word around it."""
    lines = {(), *_own_lines(data, ())}
    found: dict[Loc, list[str]] = {}
    for loc, text in notes.remarks:
        near = max((line for line in lines if line == loc[: len(line)]), key=len)
        is_named = near == loc or re.search(rf"\b{re.escape(loc[-1])}\b", text)
        found.setdefault(near, []).append(text if is_named else f"{_place(loc[len(near) :])}{text}")
    return found


def _own_lines(data: Mapping[str, Any], loc: Loc) -> Iterator[Loc]:
    """Words that have a line of their own."""
    for key, value in data.items():
        here = (*loc, key)
        yield here
        if _is_block(key, value):
            yield from _own_lines(value, here)
        elif _is_list(value):
            for item in value:
                yield from _own_lines(item, (*here, ""))


def _is_block(key: str, value: Any) -> bool:
    """Whether a map is written word below word."""
    return isinstance(value, Mapping) and bool(value) and not (key in _ONE_LINE and _is_flat(value))


def _is_list(value: Any) -> bool:
    """Whether a list is written item below item."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def _place(loc: Loc) -> str:
    return f"{'.'.join(loc)}: " if loc else ""


def _lines(data: Mapping[str, Any], loc: Loc, beside: Mapping[Loc, list[str]]) -> list[str]:
    pad = "  " * len(loc)
    found: list[str] = []
    for key, value in data.items():
        here = (*loc, key)
        found += [f"{pad}# {text}" for text in beside.get(here, ())]
        word = _scalar(key)
        if _is_block(key, value):
            found.append(f"{pad}{word}:")
            found += _lines(value, here, beside)
        elif _is_list(value):
            found.append(f"{pad}{word}:")
            for item in value:
                inner = _lines(item, (*here, ""), beside)
                found.append(f"{pad}  - {inner[0].strip()}")
                found += inner[1:]
        else:
            found.append(f"{pad}{word}: {_flow(value)}")
    return found


def _is_flat(value: Mapping[str, Any]) -> bool:
    return all(not isinstance(one, Mapping) for one in value.values()) and len(_flow(value)) < 90


def _flow(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_scalar(k)}: {_flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return _scalar(value)


def _scalar(value: Any) -> str:
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)
    text = str(value)
    plain = bool(_PLAIN.match(text)) or bool(re.fullmatch(r"[A-Za-z][A-Za-z0-9 _./()-]*", text))
    return text if plain and text.lower() not in _RESERVED else json.dumps(text, ensure_ascii=False)
