"""Fields of PEFT's configs are honoured as PEFT honours them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.ia3.model import IA3Model
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

import adapterkit as ak
from adapterkit.files.peft.config import IDLE, REFUSED, TYPES, IA3File, LoRAFile, parse
from tests.files.peft_side import NOISE, loaded_there, put, run, said, same, tensors, theirs
from tests.models.tiny import build

pytestmark = NOISE

# models whose paths differ in depth, in the place of the layer's number, and in how often a number occurs
PATHS = sorted(
    {
        name
        for row, cls in (
            ("bert", "BertForSequenceClassification"),
            ("llama", "LlamaModel"),
            ("t5", "T5Model"),
            ("gpt2", "GPT2LMHeadModel"),
            ("albert", "AlbertModel"),
        )
        for name, _ in build(row, cls).named_modules()
        if name
    }
)
MATCHING: list[dict[str, Any]] = [
    {"target_modules": ["query", "v", "c_attn"]},
    {"target_modules": ["layers.0.self_attn.q_proj", "attention.output.dense", "encoder"]},
    {"target_modules": ["query", "q_proj"], "layers_to_transform": 1},
    {"target_modules": ["query", "q_proj", "q", "c_fc", "ffn"], "layers_to_transform": [0]},
    {"target_modules": ["query", "q_proj", "q"], "layers_to_transform": [1], "layers_pattern": "layer"},
    {"target_modules": ["q", "q_proj"], "layers_to_transform": [0, 1], "layers_pattern": ["block", "layers"]},
    {"target_modules": ["bert.encoder.layer.1.attention.self.key"], "layers_to_transform": [0]},
    {"target_modules": r".*layer\.1\.(attention|output).*dense|h\.0\.attn\.c_attn"},
    {"target_modules": "query"},
    {"target_modules": ["dense"], "exclude_modules": ["pooler.dense", "bert.encoder.layer.0.output.dense"]},
    {"target_modules": ["dense", "q_proj"], "exclude_modules": r".*\.0\..*"},
    {"target_modules": ["dense"], "modules_to_save": ["pooler", "intermediate"]},
]


@pytest.mark.parametrize("fields", MATCHING, ids=range(len(MATCHING)))
def test_the_same_modules_match(fields: dict[str, Any]) -> None:
    there = peft.LoraConfig(**fields)
    here = LoRAFile.model_validate({"peft_type": "LORA", **fields})
    want = [path for path in PATHS if check_target_module_exists(there, path)]
    assert [path for path in PATHS if here.matches(path)] == want


def test_the_matching_configs_match_something() -> None:
    found = [
        [path for path in PATHS if check_target_module_exists(peft.LoraConfig(**f), path)] for f in MATCHING
    ]
    # a name that is taken for a pattern of the whole path, as PEFT takes it, matches nothing
    assert [MATCHING[i]["target_modules"] for i, paths in enumerate(found) if not paths] == ["query"]


@pytest.mark.parametrize(
    "patterns",
    [
        {"q_proj": 2, "0.self_attn.q_proj": 3},
        {"0.self_attn.q_proj": 3, "q_proj": 2},
        {"^layers.1.mlp.up_proj": 5, "up_proj": 7},
        {r"layer\.\d\.attention\.self\.(query|key)": 4, "attn.c_attn|mlp.c_fc": 6, "proj": 9},
        {},
    ],
)
def test_the_same_pattern_holds(patterns: dict[str, int]) -> None:
    here = LoRAFile.model_validate({"peft_type": "LORA", "r": 1, "rank_pattern": patterns})
    want = [patterns.get(get_pattern_key(patterns.keys(), path), 1) for path in PATHS]
    assert [here.rank(path) for path in PATHS] == want
    assert set(want) > {1} or not patterns


@pytest.mark.parametrize(
    "modules", [["dense", "wo"], r".*\.0\..*(dense|c_fc)", ["output.dense", "down_proj"], []]
)
def test_the_same_modules_are_feedforward(modules: Any) -> None:
    there = peft.IA3Config(target_modules=r".*", feedforward_modules=modules)
    here = IA3File.model_validate({"peft_type": "IA3", "feedforward_modules": modules})
    want = [IA3Model._check_target_module_feedforward(there, path) for path in PATHS]
    assert [here.is_feedforward(path) for path in PATHS] == want
    assert any(want) or not modules


@pytest.mark.parametrize(
    ("kind", "config", "given"),
    [
        ("LORA", peft.LoraConfig, {"target_modules": ["q"]}),
        ("IA3", peft.IA3Config, {"target_modules": ["q"]}),
        ("VERA", peft.VeraConfig, {"target_modules": ["q"]}),
        ("PROMPT_TUNING", peft.PromptTuningConfig, {"num_virtual_tokens": 2}),
    ],
)
def test_every_field_of_this_peft_is_judged(
    kind: str, config: type, given: dict[str, Any], tmp_path: Path
) -> None:
    honoured = set(TYPES[kind].model_fields)
    fields = {field.name for field in dataclasses.fields(config)}
    assert fields <= honoured | IDLE | REFUSED.keys()
    config(**given).save_pretrained(tmp_path)
    assert parse(said(tmp_path), "").peft_type == kind


LORA: dict[str, dict[str, Any]] = {
    "rank and alpha by pattern": {
        "target_modules": ["query", "value", "output.dense"],
        "rank_pattern": {"query": 2, "layer.1.output.dense": 7},
        "alpha_pattern": {"layer.0.attention.self.query": 11, "dense": 5},
    },
    "rslora": {"target_modules": ["query"], "use_rslora": True, "rank_pattern": {"layer.0.*": 9}},
    "some layers": {"target_modules": ["key", "intermediate.dense"], "layers_to_transform": [1]},
    "a pattern": {"target_modules": r".*layer\.\d\.(attention\.self\.key|output\.dense)"},
    "a part left out": {
        "target_modules": ["value", "output.dense"],
        "exclude_modules": ["layer.0.output.dense"],
    },
    "dora with patterns": {"target_modules": ["query", "key"], "use_dora": True, "rank_pattern": {"key": 1}},
    "another start": {"target_modules": ["query"], "init_lora_weights": "orthogonal"},
    "random start": {"target_modules": ["query"], "init_lora_weights": False},
}


@pytest.mark.parametrize("fields", LORA.values(), ids=LORA)
def test_lora_fields_give_the_same_outputs(fields: dict[str, Any], tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=6, **fields)
    want = theirs("bert", None, config, tmp_path)
    model = build("bert")
    ak.load(model, tmp_path)
    same(run(model, "bert"), want)
    assert not torch.allclose(run(build("bert"), "bert"), want, atol=1e-3)


@pytest.mark.parametrize(
    ("row", "cls", "excluded"),
    # the maps before the vocabulary are no slots
    [("llama", "LlamaForCausalLM", None), ("bert", "BertForMaskedLM", ["transform.dense"])],
)
def test_all_linear_gives_the_same_outputs(row: str, cls: str, excluded: Any, tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules="all-linear", exclude_modules=excluded)
    want = theirs(row, cls, config, tmp_path)
    model = build(row, cls)
    ak.load(model, tmp_path)
    same(run(model, row, cls), want)


@pytest.mark.parametrize("forward", [["self.value"], r".*layer\.1.*", [], ["layer.0.attention.self.value"]])
def test_ia3_scales_the_side_that_the_config_says(forward: Any, tmp_path: Path) -> None:
    """Query, key and value are square: only the config tells which side a vector is for."""
    targets = ["self.query", "self.value", "layer.0.attention.self.value"]
    config = peft.IA3Config(target_modules=targets, feedforward_modules=forward)
    want = theirs("bert", None, config, tmp_path)
    model = build("bert")
    ak.load(model, tmp_path)
    same(run(model, "bert"), want)


def test_dropout_and_rank_arrive_in_the_config(tmp_path: Path) -> None:
    theirs(
        "bert",
        None,
        peft.LoraConfig(r=3, lora_alpha=12, lora_dropout=0.25, target_modules=["query"]),
        tmp_path,
    )
    config = ak.load(build("bert"), tmp_path)["default"].config
    assert config == ak.LoRAConfig(targets=("q",), r=3, alpha=12, dropout=0.25)


def test_half_precision_is_computed_in_float32_as_peft_does(tmp_path: Path) -> None:
    theirs("llama", None, peft.LoraConfig(target_modules=["q_proj", "down_proj"]), tmp_path)
    put(tmp_path, {key: value.bfloat16() for key, value in tensors(tmp_path).items()})
    model = build("llama")
    kit = ak.load(model, tmp_path)
    assert {p.dtype for p in kit["default"].parameters()} == {torch.float32}
    same(run(model, "llama"), loaded_there("llama", None, tmp_path))
