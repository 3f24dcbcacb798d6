"""The JSON Schema of the language and the models behind it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from adapterkit.errors import SpecError
from adapterkit.spec import jsonschema as made
from adapterkit.spec import registry, vocabulary
from adapterkit.spec.explain import words_at
from adapterkit.spec.schema import Attention, Interface, Mlp

DIRECTORY = registry.shipped_directory()
SHIPPED = sorted(DIRECTORY.glob("*.yaml"))
COMMITTED = DIRECTORY / made.FILE


def test_the_committed_schema_is_up_to_date(update_golden: bool) -> None:
    if update_golden:
        COMMITTED.write_text(made.text(), encoding="utf-8")
    assert COMMITTED.read_text(encoding="utf-8") == made.text(), (
        "run `adapterkit schema --write interfaces/schema.json`"
    )


def test_it_is_a_valid_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(made.schema())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_file_names_the_schema_and_fits_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith(f"# yaml-language-server: $schema={made.FILE}\n")
    jsonschema.validate(yaml.safe_load(text), json.loads(COMMITTED.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"adapterkit": 2},
        {"adapterkit": 1, "stack": {}},
        {"adapterkit": 1, "stacks": {"a": {"layers": 3}}},
        {"adapterkit": 1, "stacks": {"a": {"layers": "l", "attention": {"quary": "x"}}}},
        {"adapterkit": 1, "stacks": {"a": {"layers": "l", "mlp": {"experts": {}}}}},
        {"adapterkit": 1, "stacks": {"a": {"layers": "l", "block": "paralel"}}},
    ],
)
def test_it_refuses_what_the_loader_refuses(wrong: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, made.schema())
    with pytest.raises(SpecError):
        registry.load(wrong)


def test_every_word_is_described() -> None:
    found = made.schema()
    silent = [
        f"{part}.{word}"
        for part, node in {"Interface": found, **found["$defs"]}.items()
        for word, said in node["properties"].items()
        if len(said.get("description", "")) < 5
    ]
    assert silent == []


def test_the_vocabulary_and_the_models_have_the_same_words() -> None:
    assert set(vocabulary.ATTENTION_ROLES) <= set(Attention.model_fields)
    assert set(vocabulary.MLP_ROLES) <= set(Mlp.model_fields)
    assert set(vocabulary.SUBLAYERS) <= set(words_at(("stacks", "any")))
    assert {*vocabulary.ATTENTION_ROLES, *vocabulary.MLP_ROLES, "fused"} == set(vocabulary.ROLES)


@pytest.mark.parametrize(
    ("loc", "word"),
    [
        ((), "stacks"),
        (("stacks", "mlp"), "layers"),  # a stack may be called like a word
        (("stacks", "a", "mlp", "any_of", 1), "gate"),
        (("stacks", "a", "attention", "extra", "path"), "was"),
        (("stacks", "a", "kinds", "of", "full"), "cross_attention"),
        (("stacks", "a", "attention", "q", "any_of", 0), "path"),
        (("parts", "a", "reads"), "states"),
    ],
)
def test_words_are_known_at_every_depth(loc: tuple[str | int, ...], word: str) -> None:
    assert word in words_at(loc)


def test_an_interface_cannot_be_changed() -> None:
    found = registry.by_name("bert")
    with pytest.raises(Exception, match="frozen"):
        found.source = "other"  # type: ignore[misc]
    assert isinstance(found, Interface)


def test_dump_is_complete_without_other_files() -> None:
    for path in SHIPPED:
        found = registry.load(path)
        again = registry.load(registry.dump(found))
        assert registry.digest(again) == registry.digest(found)


def test_the_hash_is_about_the_words_not_about_the_file(tmp_path: Path) -> None:
    text = (DIRECTORY / "bert.yaml").read_text()
    copy = tmp_path / "other_name.yaml"
    copy.write_text("# a comment\n" + text)
    changed = tmp_path / "changed.yaml"
    changed.write_text(text.replace("layers: encoder.layer", "layers: encoder.layers"))
    bert = registry.digest(registry.by_name("bert"))
    assert registry.digest(registry.load(copy)) == bert
    assert registry.digest(registry.load(changed)) != bert


@pytest.mark.parametrize(
    "code", ["import adapterkit", "import adapterkit.spec.registry as r; r.by_name('bert')"]
)
def test_neither_torch_nor_transformers_is_imported(code: str) -> None:
    check = "import sys; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), sys.modules.keys()"
    subprocess.run([sys.executable, "-c", f"{code}; {check}"], check=True)
