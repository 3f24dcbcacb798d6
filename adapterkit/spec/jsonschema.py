"""The JSON Schema of the language, made from the models, for editors that complete and check."""

from __future__ import annotations

import json
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from adapterkit.spec.schema import Interface

FILE = "schema.json"
"""Its name beside the shipped interfaces."""


def schema() -> dict[str, Any]:
    """The schema. It says less than the loader: with `like` words may be left out or removed by null."""
    found = Interface.model_json_schema()
    about = {f"#/$defs/{name}": part["description"] for name, part in found["$defs"].items()}
    for node in (found, *found["$defs"].values()):
        _tidy(node, about)
        if node is not found:
            node.pop("required", None)
    return {
        "$schema": GenerateJsonSchema.schema_dialect,
        "title": "adapterkit interface",
        **{key: value for key, value in found.items() if key != "title"},
    }


def text() -> str:
    """The schema as the text of the committed file."""
    return json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"


def _tidy(node: dict[str, Any], about: dict[str, str]) -> None:
    """Describe every word, let it be null, and drop what only repeats its name."""
    for name, word in node.get("properties", {}).items():
        word.pop("title", None)
        word.pop("default", None)
        if name in node.get("required", ()) and "const" in word:
            continue
        described = {"description": word.pop("description")} if "description" in word else {}
        options = word["anyOf"] if word.keys() == {"anyOf"} else [dict(word)]
        for option in options:  # else the word means what its only form means
            inside = option.pop("description", None) or about.get(option.get("$ref", ""))
            if inside:
                described.setdefault("description", inside)
        nullable = [option for option in options if option != {"type": "null"}] + [{"type": "null"}]
        word.clear()
        word |= described
        word |= nullable[0] if len(nullable) == 1 else {"anyOf": nullable}
