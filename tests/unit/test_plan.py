"""Plans: what attach would do, in words and numbers, on any device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import adapterkit as ak
from adapterkit.author import tiny as author_tiny
from adapterkit.errors import ConfigError, NotAttachedError, PlanError
from tests.models import tiny
from tests.unit.kit_scene import bert, picture, refused, trained

METHODS = ["lora[targets=all]", "ia3", "vera[r=4]", "dora[r=2]", "dvora[r=4]", "mtl_lora[n_up=2]"]


@pytest.mark.parametrize("method", METHODS)
def test_a_plan_changes_nothing_and_is_what_attach_does(method: str) -> None:
    model = bert()
    before = picture(model)
    state = torch.get_rng_state()
    plan = ak.plan(model, method, name="a")
    assert picture(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    refused(NotAttachedError, "not-attached", ak.of, model)
    kit = ak.attach(model, method, name="a")
    assert kit["a"].plan.to_dict() == plan.to_dict()
    numbers = sum(parameter.numel() for parameter in kit.model.parameters() if parameter.requires_grad)
    assert plan.parameters + plan.head_parameters == numbers
    assert kit.plan(method, name="a").to_dict() == plan.to_dict()
    assert plan.base_parameters == sum(parameter.numel() for parameter in bert().parameters())


@pytest.mark.parametrize("method", ["lora[targets=all]", "ia3", "vera[r=4]", "mtl_lora"])
@pytest.mark.parametrize("row", ["bert", "gpt2", "t5", "phi3"])
def test_a_plan_on_the_meta_device(row: str, method: str) -> None:
    real = ak.plan(tiny.build(row), method)
    assert real.slots
    with torch.device("meta"):
        model = tiny.model_class(row)(tiny.config(row))
    assert ak.plan(model, method).to_dict() == real.to_dict()


def test_methods_that_read_the_weight_are_planned_but_not_attached_without_it() -> None:
    model = bert().to("meta")
    assert len(ak.plan(model, "lora[init=pissa]").slots) == 4
    error = refused(PlanError, "weight-unreadable", ak.attach, model, "lora[init=pissa]")
    assert error.address == "encoder.0.attention.q"


def test_the_text_of_a_plan() -> None:
    plan = ak.plan(bert(), "lora[targets=[q, v, up, gate], r=4]", name="a", strict=False)
    assert str(plan) == (
        "lora 'a' on bert: 6 slots\n"
        "  encoder.attention.q     2 x  32 -> 32\n"
        "  encoder.attention.v     2 x  32 -> 32\n"
        "  encoder.mlp.up          2 x  32 -> 40\n"
        "  head  classifier\n"
        "  missing  this model has no 'gate' (bert)\n"
        "  1,600 parameters + 99 in heads (8.78 % of 19,347)"
    )
    assert repr(plan) == str(plan)


def test_a_plan_as_data() -> None:
    found = ak.plan(bert(), "ia3[targets=k, layers=1]", name="a").to_dict()
    assert found.pop("config") == {
        "method": "ia3",
        "targets": ["k"],
        "layers": [1],
        "leave_out": [],
        "alpha": 1.0,
        "sides": {},
        "gating": False,
    }
    assert found == {
        "name": "a",
        "interface": "bert",
        "slots": {
            "encoder.1.attention.k": {"path": "bert.encoder.layer.1.attention.self.key", "shape": [32, 32]}
        },
        "counts": {"encoder.attention.k": 1},
        "heads": ["classifier"],
        "missing": [],
        "parameters": 32,
        "head_parameters": 99,
        "base_parameters": 19347,
    }


SELECTIONS: list[tuple[str, str, dict[str, int]]] = [
    ("bert", "lora", {"encoder.attention.q": 2, "encoder.attention.v": 2}),
    ("bert", "lora[layers=-1]", {"encoder.attention.q": 1, "encoder.attention.v": 1}),
    ("bert", "lora[leave_out=0, targets=o]", {"encoder.attention.o": 1}),
    ("bert", "lora[targets=mlp.up]", {"encoder.mlp.up": 2}),
    ("bert", "lora[targets=encoder.1.mlp]", {"encoder.mlp.up": 1, "encoder.mlp.down": 1}),
    (
        "t5",
        "lora[targets=q]",
        {f"{s}.q": 2 for s in ("encoder.attention", "decoder.attention", "decoder.cross_attention")},
    ),
    ("t5", "lora[targets=attention.q]", {"encoder.attention.q": 2, "decoder.attention.q": 2}),
    ("t5", "lora[targets=cross_attention.q]", {"decoder.cross_attention.q": 2}),
    ("t5", "lora[targets=decoder.q]", {"decoder.attention.q": 2, "decoder.cross_attention.q": 2}),
    ("t5", "lora[targets=decoder.attention.q]", {"decoder.attention.q": 2}),
    ("t5", "lora[targets=decoder.1.cross_attention.k]", {"decoder.cross_attention.k": 1}),
    ("t5", "lora[targets=up, layers=decoder]", {"decoder.mlp.up": 2}),
    ("t5", "lora[targets=up, layers=[decoder.0, encoder]]", {"encoder.mlp.up": 2, "decoder.mlp.up": 1}),
    ("gpt2", "lora[targets=v]", {"decoder.attention.v": 2}),
    ("gpt2", "lora[targets=fused]", {"decoder.attention.fused": 2}),
]


@pytest.mark.parametrize(
    ("row", "method", "counts"), SELECTIONS, ids=[f"{row}-{text}" for row, text, _ in SELECTIONS]
)
def test_targets_and_layers(row: str, method: str, counts: dict[str, int]) -> None:
    assert ak.plan(tiny.build(row), method).counts == counts


def test_a_role_and_its_fused_matrix_share_a_host() -> None:
    plan: Any = ak.plan(tiny.build("gpt2"), "lora[targets=[q, v]]")
    assert {slot.path for slot in plan.slots} == {"h.0.attn.c_attn", "h.1.attn.c_attn"}
    assert {slot.shape for slot in plan.slots} == {(32, 32)}


def test_a_plan_after_attach_sees_the_model_without_adapters() -> None:
    model = bert()
    flags = trained(model)
    first = ak.plan(model, "lora[targets=all]").to_dict()
    kit = ak.attach(model, "dora[targets=all]", name="other")
    assert kit.plan("lora[targets=all]").to_dict() == first
    kit.detach()
    assert ak.plan(model, "lora[targets=all]").to_dict() == first
    assert trained(model) == flags


@pytest.mark.parametrize(
    ("method", "found"),
    [
        ("lora", True),
        ("lora[targets=gate]", False),
        ("lora[r=99]", False),
        ("invertible[inverse=true]", False),
    ],
)
def test_supports(method: str, found: bool) -> None:
    kit = ak.attach(bert(), "ia3")
    assert kit.supports(method) is found
    assert list(kit) == ["default"]


@pytest.mark.parametrize(
    ("method", "code"), [("laro", "unknown-method"), ("lora[ranks=3]", "unknown-option")]
)
def test_what_is_no_method_is_not_merely_unsupported(method: str, code: str) -> None:
    with pytest.raises(ConfigError) as refused:
        ak.attach(bert(), "ia3").supports(method)
    assert refused.value.code == code


@pytest.mark.parametrize("method", ["lora", "seq_bn", "prefix_tuning", "loreft"])
def test_layers_with_an_address_reach_a_part_that_words_alone_do_not(method: str) -> None:
    model, _ = author_tiny.build("llava")

    def layers(*asked: str) -> set[str]:
        plan = ak.plan(model, {"method": method, **({"layers": asked} if asked else {})})
        return {f"{slot.stack}.{slot.layer}" for slot in plan.slots}

    assert layers() == {"language/decoder.0", "language/decoder.1"}
    assert layers("vision/vision.0") == {"vision/vision.0"}
    assert layers("vision/vision") == {"vision/vision.0", "vision/vision.1"}
    assert layers("vision/vision.1", "language/decoder.0") == {"vision/vision.1", "language/decoder.0"}
