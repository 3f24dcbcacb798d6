"""Manifests in checkpoints that are damaged are told as such, with what is wrong in them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from adapterkit.errors import FileFormatError
from adapterkit.files import manifest
from adapterkit.inject.state import to_buffer

WHOLE: dict[str, Any] = {
    "format_version": 1,
    "name": "a",
    "config": {"method": "lora"},
    "interface": {"name": "bert"},
    "slots": {},
    "heads": [],
}


def test_a_whole_manifest_is_read_as_it_was_written() -> None:
    assert manifest.read(to_buffer(json.dumps(WHOLE).encode()), "model.safetensors") == WHOLE


@pytest.mark.parametrize("word", ["name", "config", "interface", "slots", "heads"])
@pytest.mark.parametrize("value", [None, 7])
def test_a_field_that_is_missing_or_of_another_kind_is_named(word: str, value: Any) -> None:
    data = {key: said for key, said in WHOLE.items() if key != word}
    content = json.dumps(data if value is None else {**data, word: value}).encode()
    with pytest.raises(FileFormatError) as refused:
        manifest.read(to_buffer(content), "model.safetensors")
    (problem,) = refused.value.problems
    assert problem.code == "bad-file" and problem.file == "model.safetensors"
    assert problem.message.endswith(f"lacks or misstates {word}")


@pytest.mark.parametrize("text", [" ", "{", "[]", "7", '"a"'])
def test_what_is_no_manifest_is_refused(text: str) -> None:
    with pytest.raises(FileFormatError) as refused:
        manifest.read(to_buffer(text.encode()), "model.safetensors")
    assert refused.value.problems[0].code == "bad-file"
