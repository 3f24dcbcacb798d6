"""A drafted interface as the text of a file: in the order of the forward pass, comments beside the words."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from adapterkit.author.describe import Notes, Words
from adapterkit.versions import installed

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
    lines += [f"# look at: {_place(loc)}{text}" for loc, text in notes.gaps]
    lines += _lines(data, (), notes)
    return "\n".join(lines) + "\n"


def _place(loc: tuple[str, ...]) -> str:
    return f"{'.'.join(loc)}: " if loc else ""


def _lines(data: Mapping[str, Any], loc: tuple[str, ...], notes: Notes) -> list[str]:
    pad = "  " * len(loc)
    found: list[str] = []
    for key, value in data.items():
        here = (*loc, key)
        found += [f"{pad}# {text}" for said, text in notes.remarks if said == here]
        word = _scalar(key)
        if isinstance(value, Mapping) and value and not (key in _ONE_LINE and _is_flat(value)):
            found.append(f"{pad}{word}:")
            found += _lines(value, here, notes)
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            found.append(f"{pad}{word}:")
            for item in value:
                inner = _lines(item, (*here, ""), notes)
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
