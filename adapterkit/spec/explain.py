"""What pydantic found wrong with a document, in the words of the language and with places."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Self, get_args, get_origin

from pydantic import BaseModel, ValidationError

from adapterkit.errors import Problem, did_you_mean, listing
from adapterkit.spec.schema import Interface
from adapterkit.spec.text import Document, Loc, cut

_CODES = {
    "extra_forbidden": "unknown-word",
    "missing": "missing-word",
    "literal_error": "wrong-value",
    "none_required": "reserved-word",
}

_WANTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "dict_type": "a map",
    "tuple_type": "a list",
    "string_too_short": "a sentence",
    "too_short": "at least one entry",
}

_SHORT = ("Embeddings", "Path", "Layers", "Unembed")
"""Models that may be said as the path alone."""


def problems(error: ValidationError, document: Document) -> list[Problem]:
    """Every problem, one for each place: the branches of an 'either or' are put together."""
    grouped: dict[tuple[Loc, str], list[Any]] = {}
    for item in error.errors(include_url=False):
        missing = item["type"] == "missing"
        grouped.setdefault((_in_text(item["loc"], document, missing), _code(item)), []).append(item)
    return [_problem(loc, code, items, document) for (loc, code), items in grouped.items()]


def _code(item: Any) -> str:
    # our own errors name their code themselves
    kind: str = item["type"]
    return _CODES.get(kind) or (kind.replace("_", "-") if "text" in item.get("ctx", {}) else "wrong-type")


def _in_text(loc: tuple[str | int, ...], document: Document, missing: bool) -> Loc:
    """`loc` without the parts that pydantic adds: for these there is no data. A missing word is kept."""
    kept: list[str | int] = []
    node: Any = document.data
    for number, part in enumerate(loc, 1):
        if isinstance(node, dict) and part in node:
            node = node[part]
        elif isinstance(node, list) and isinstance(part, int) and part < len(node):
            node = node[part]
        elif not (missing and number == len(loc)):
            continue
        kept.append(part)
    return tuple(kept)


def _problem(loc: Loc, code: str, items: list[Any], document: Document) -> Problem:
    first = items[0]
    message, expected, hint = str(first["msg"]), "", ""
    word = next((cut(part) for part in reversed(loc) if isinstance(part, str)), "")
    if code == "unknown-word":
        words = words_at(loc[:-1])
        message, hint = f"{word!r} is not a word of the language here", did_you_mean(word, words)
        expected = f"words here: {listing(words, 24)}"
    elif first["type"] == "missing":
        message = f"{word!r} is missing"
    elif code == "reserved-word":
        message = f"{word!r} is reserved for a later version of the language"
    elif code == "wrong-value":
        values = first["ctx"]["expected"]
        message, expected = f"{_shown(first['input'])} is not a value of {word!r}", f"expected {values}"
        hint = did_you_mean(str(first["input"]), re.findall(r"'([^']+)'", values))
    elif code == "wrong-type":
        wanted = list(dict.fromkeys(_wanted(item) for item in items))
        either = f"{', '.join(wanted[:-1])} or {wanted[-1]}" if wanted[1:] else wanted[0]
        message, expected = f"{_shown(first['input'])} does not fit here", f"expected {either}"
    of_key = code in ("unknown-word", "reserved-word") or first["loc"][-1:] == ("[key]",)
    return document.problem(loc, code, message, expected, hint, key=of_key)


def _wanted(item: Any) -> str:
    if item["type"] == "model_type":
        return "a path or a map" if item["ctx"]["class_name"] in _SHORT else "a map"
    return _WANTED.get(item["type"], str(item["msg"]))


def _shown(value: Any) -> str:
    """A value as it may stand in the file."""
    return cut(json.dumps(value, ensure_ascii=False, default=str))


def words_at(loc: Loc) -> list[str]:
    """Words that the schema knows in the map at `loc`."""
    owner: type[BaseModel] = Interface
    here: Any = Interface
    for part in loc:
        here = _step(here, part, owner)
        owner = next((kind for kind in _kinds(here, owner) if _is_model(kind)), owner)
    return [name for kind in _kinds(here, owner) if _is_model(kind) for name in kind.model_fields]


def _step(annotation: Any, part: str | int, owner: type[BaseModel]) -> Any:
    """What an annotation says about one member."""
    for kind in _kinds(annotation, owner):
        if _is_model(kind) and part in kind.model_fields:
            return kind.model_fields[part].annotation
        if get_origin(kind) is dict:
            return get_args(kind)[1]
        if get_origin(kind) is tuple:
            return get_args(kind)[0]
    return None


def _kinds(annotation: Any, owner: type[BaseModel]) -> list[Any]:
    """The plain types inside optional, annotated and united ones."""
    if annotation is Self:
        return [owner]
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0], owner)
    if get_origin(annotation) in (dict, tuple) or _is_model(annotation):
        return [annotation]
    return [kind for argument in get_args(annotation) for kind in _kinds(argument, owner)]


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
