"""A method is a name, a shorthand, a dict or a config; what is wrong with it is said with what there is."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

import adapterkit as ak
from adapterkit.errors import ConfigError, PlanError, Problem
from adapterkit.methods.names import METHODS, parse
from tests.unit.kit_scene import bert, refused

LORA_FAMILY = ("lora", "ia3", "vera", "dora", "dvora", "mtl_lora")


@pytest.mark.parametrize("name", LORA_FAMILY)
def test_names(name: str) -> None:
    config = parse(name)
    assert config.method == name
    assert parse(f" {name} ") == parse(f"{name}[]") == parse({"method": name}) == config
    assert parse(config) is config
    assert parse(config.to_dict()) == config
    assert METHODS[name] is type(config)


@pytest.mark.parametrize(
    ("text", "config"),
    [
        ("lora[r=4,alpha=16]", ak.LoRAConfig(r=4, alpha=16)),
        ("lora[ r = 4 , alpha = 16 ]", ak.LoRAConfig(r=4, alpha=16)),
        ("lora[targets=[q, v, up], layers=[0, -1]]", ak.LoRAConfig(targets=("q", "v", "up"), layers=(0, -1))),
        ("lora[targets=all]", ak.LoRAConfig(targets="all")),
        ("lora[targets=q, layers=1]", ak.LoRAConfig(targets=("q",), layers=(1,))),
        ("lora[r={q: 2, v: 4}]", ak.LoRAConfig(r={"q": 2, "v": 4})),
        ("lora[dropout=0.1, rslora=true, init=olora]", ak.LoRAConfig(dropout=0.1, rslora=True, init="olora")),
        ("ia3[sides={down: output}]", ak.IA3Config(sides={"down": "output"})),
        ("vera[alpha=null]", ak.VeRAConfig(alpha=None)),
        ("dora[norm_scaled=false]", ak.DoRAConfig(norm_scaled=False)),
        ("mtl_lora[n_up=3, task_matrix=full]", ak.MTLLoRAConfig(n_up=3, task_matrix="full")),
    ],
)
def test_shorthands(text: str, config: Any) -> None:
    assert parse(text) == config
    assert type(parse(text)) is type(config)


@pytest.mark.parametrize(
    ("method", "problem"),
    [
        ("lorra", Problem("unknown-method", "there is no method 'lorra'", hint="did you mean 'lora'?")),
        ("", Problem("unknown-method", "there is no method ''")),
        ({"r": 3}, Problem("unknown-method", "the dict names no method: its keys are r")),
        (3, Problem("unknown-method", "a method is a name, a dict or a config, not int")),
        ("lora[r=4", Problem("bad-shorthand", "'lora[r=4' has no closing ']'")),
        ("lora[r]", Problem("bad-shorthand", "'r' is not option=value")),
        ("lora[r=2,r=3]", Problem("bad-shorthand", "'r' is given twice")),
        ("lora[r={]", Problem("bad-shorthand", "the value of 'r={' cannot be read")),
        (
            "lora[alhpa=3]",
            Problem("unknown-option", "lora has no option 'alhpa'", hint="did you mean 'alpha'?"),
        ),
        (
            "LoRA[r=4]",
            Problem("unknown-method", "there is no method 'LoRA'", hint="did you mean 'lora'?"),
        ),
        ({"method": "ia3", "r": 3}, Problem("unknown-option", "ia3 has no option 'r'")),
        (
            "seq_bn_inv[reduction_factor=8]",
            Problem(
                "unknown-option",
                "seq_bn_inv has no options of its own",
                expected="options of its parts: 'seq_bn|invertible'",
            ),
        ),
        ("lora[r=x]", Problem("bad-option", "lora: 'x' does not fit 'r'", "r")),
        (
            "lora[dropout=1]",
            Problem("bad-option", "lora: 1 does not fit 'dropout'", "dropout", "expected less than 1"),
        ),
        (
            "seq_bn[stochastic_depth=1]",
            Problem(
                "bad-option",
                "bottleneck: 1 does not fit 'stochastic_depth'",
                "stochastic_depth",
                "expected less than 1",
            ),
        ),
        ("vera[r=0]", Problem("bad-option", "vera: 0 does not fit 'r'", "r")),
        (
            "seq_bn[reduction_factor=0]",
            Problem("bad-option", "bottleneck: 0 does not fit 'reduction_factor'", "reduction_factor"),
        ),
        (
            "compacter[reduction_factor={0: -2}]",
            Problem("bad-option", "compacter: -2 does not fit 'reduction_factor'", "reduction_factor"),
        ),
        ("seq_bn[scaling=.nan]", Problem("bad-option", "bottleneck: nan does not fit 'scaling'", "scaling")),
        ("prefix_tuning[init=-1]", Problem("bad-option", "prefix_tuning: -1 does not fit 'init'", "init")),
        ("lora[init=pisa]", Problem("bad-option", "lora: 'pisa' does not fit 'init'", "init")),
        ("ia3[sides={k: x}]", Problem("bad-option", "ia3: 'x' does not fit 'sides'", "sides")),
        (
            "dora[gating=true]",
            Problem("bad-option", "dora: DoRA has neither gating nor other starts than 'lora'"),
        ),
        (
            "mtl_lora[init=pissa]",
            Problem("bad-option", "mtl_lora: MTL-LoRA has neither gating nor other starts than 'lora'"),
        ),
        (
            "mtl_lora[task_matrix=round]",
            Problem("bad-option", "mtl_lora: 'round' does not fit 'task_matrix'", "task_matrix"),
        ),
    ],
    ids=str,
)
def test_what_is_wrong_is_said(method: Any, problem: Problem) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(method)
    found = caught.value.problems[0]
    assert (found.code, found.message, found.address) == (problem.code, problem.message, problem.address)
    assert found.hint == problem.hint
    assert problem.expected in found.expected
    if found.code == "unknown-option" and "of its own" not in found.message:
        assert "options: targets, layers" in found.expected
    if found.message.startswith("there is no method"):
        assert found.expected.startswith("one of lora, ia3, vera")


@pytest.mark.parametrize(
    ("method", "code", "addresses"),
    [
        ("lora[r=33]", "bad-rank", ["encoder.0.attention.q", "encoder.0.attention.v"]),
        ("lora[r=0]", "bad-rank", ["encoder.0.attention.q", "encoder.0.attention.v"]),
        ("lora[r={k: 3}]", "unknown-role", ["r"]),
        ("lora[alpha={k: 3, o: 1}]", "unknown-role", ["alpha", "alpha"]),
        ("ia3[sides={q: input}]", "unknown-role", ["sides"]),
        ("lora[init=pissa, alpha=-1]", "bad-option", ["encoder.0.attention.q", "encoder.0.attention.v"]),
        ("loreft[r=33]", "bad-rank", ["encoder.0.layer"]),
        ("seq_bn|", "unknown-method", [""]),
    ],
)
def test_options_that_do_not_fit_the_model(method: str, code: str, addresses: list[str]) -> None:
    error = refused(ConfigError, code, ak.attach, bert(num_hidden_layers=1), method)
    assert sorted(problem.address for problem in error.problems) == addresses


@pytest.mark.parametrize("word", ["encoder.2", "2", "encoder.0.norm", "-1", "decoder"])
@pytest.mark.parametrize("method", ["seq_bn", "compacter"])
def test_a_reduction_factor_for_no_layer_or_branch_is_refused(method: str, word: str) -> None:
    with pytest.raises(PlanError) as caught:
        ak.plan(bert(num_hidden_layers=2), {"method": method, "reduction_factor": {word: 4, "default": 2}})
    assert caught.value.code == "no-such-layer"


def test_configs_are_immutable_values() -> None:
    config = ak.LoRAConfig(r=4)
    with pytest.raises(ValidationError):
        config.r = 5
    assert config.replace(r=5) == ak.LoRAConfig(r=5)
    assert config == ak.LoRAConfig(r=4)
    assert config != ak.DoRAConfig(r=4)
    with pytest.raises(ValidationError):
        ak.LoRAConfig(rank=4)
    with pytest.raises(ValidationError):
        config.replace(rank=4)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("pfeiffer", "seq_bn"),
        ("houlsby", "double_seq_bn"),
        ("parallel", "par_bn"),
        ("scaled_parallel", "scaled_par_bn"),
        ("pfeiffer+inv", "seq_bn_inv"),
        ("houlsby+inv", "double_seq_bn_inv"),
        ("pfeiffer[reduction_factor=4]|lora", "seq_bn[reduction_factor=4]|lora"),
    ],
)
def test_names_that_adapterhub_used_before(old: str, new: str) -> None:
    assert parse(old) == parse(new)


@pytest.mark.parametrize(
    "method", ["ia3", "lora[r={q: 4}]", "mam", "seq_bn[reduction_factor={0: 2, default: 4}]"]
)
def test_configs_with_maps_are_hashed_and_come_back_from_their_data(method: str) -> None:
    config = parse(method)
    again = type(config).model_validate(config.model_dump())
    assert again == config and hash(again) == hash(config) and {config: 1}[again] == 1
    assert type(config).model_validate_json(config.model_dump_json()) == config
    assert config.replace() == config == parse(config.to_dict())
    assert hash(config) != hash(parse("lora"))
