"""Masks under any name, and of either meaning: found by a draft, looked for by a check, heeded by methods."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.author.draft import Draft
from tests.author import masked

MAKERS = {"keep": masked.keeping, "padding": masked.hiding}


@cache
def _draft(name: str) -> Draft:
    model, inputs = MAKERS[name]()
    return ak.draft(model, inputs=inputs)


def drafted(name: str) -> dict[str, Any]:
    return copy.deepcopy(_draft(name).data)


def test_a_draft_names_the_mask_of_its_model() -> None:
    (stack,) = drafted("keep")["stacks"].values()
    assert stack["inputs"]["mask"] == "keep"
    assert "mask_hides" not in stack["inputs"]


def test_a_draft_tells_that_ones_hide() -> None:
    data = drafted("padding")
    first, second = data["stacks"].values()
    assert first["inputs"]["mask"] == second["reads"]["mask"] == "padding"
    assert first["inputs"]["mask_hides"] is second["reads"]["mask_hides"] is True
    assert second["inputs"]["mask"] is None  # the decoder's own attention has none
    assert data["heads"] == ["speak"]


def test_a_mask_that_is_not_given_is_found_as_well() -> None:
    model, inputs = masked.keeping()
    (stack,) = ak.draft(model, inputs={"words": inputs["words"]}).data["stacks"].values()
    assert stack["inputs"]["mask"] == "keep"


@pytest.mark.parametrize("hides", [False, True])
def test_a_mask_of_patches_is_found_and_its_meaning_is_proved(hides: bool) -> None:
    """Patches are no ids: their states are made to differ where they enter the layers."""

    class Seeing(masked.Keeping):
        def __init__(self) -> None:
            super().__init__()
            self.cut = nn.Conv1d(3, masked.WIDTH, 2, 2)

        def forward(self, sound: Tensor, seen: Tensor | None = None) -> Tensor:  # type: ignore[override]
            x = self.cut(sound).mT
            for layer in self.layers:
                x = layer(x, ~seen.bool() if hides and seen is not None else seen)
            return self.classify(self.norm(x))

    def make() -> tuple[nn.Module, dict[str, Tensor]]:
        torch.manual_seed(0)
        return Seeing(), {"sound": torch.randn(2, 3, 12)}

    model, inputs = make()
    data = ak.draft(model, inputs=inputs).data
    (stack,) = data["stacks"].values()
    assert stack["inputs"]["mask"] == "seen"
    assert stack["inputs"].get("mask_hides", False) is hides
    assert ak.check(data, make, methods=()).ok
    stack["inputs"]["mask_hides"] = not hides
    (problem,) = ak.check(data, make, methods=()).problems
    assert problem.expected == f"they {'hide' if hides else 'show'}"


def test_a_mask_of_frames_that_the_layers_alone_get() -> None:
    """Samples are given, with a mask of samples: drafted, and missed where nothing is said."""
    found = ak.draft("hubert", like=False).data
    inputs = found["stacks"]["encoder"]["inputs"]
    assert (inputs["mask"], inputs["layer_mask"]) == (None, "attention_mask")
    told = {
        None: "they get 'attention_mask' if the entry gets 'attention_mask'",
        "attended": "HubertEncoderLayer does not",
    }
    for said, observed in told.items():
        inputs["layer_mask"] = said
        (problem,) = ak.check(found, "hubert", methods=["lora"]).problems
        assert (problem.address, problem.expected) == ("stacks.encoder.inputs.layer_mask", observed)


def test_a_model_without_a_mask_gets_none() -> None:
    class Deaf(masked.Keeping):
        def forward(self, words: Tensor, keep: Tensor | None = None) -> Tensor:
            """Takes a mask, and looks away."""
            return super().forward(words)

    _, inputs = masked.keeping()
    (stack,) = ak.draft(Deaf(), inputs=inputs).data["stacks"].values()
    assert stack["inputs"]["mask"] is None


@pytest.mark.parametrize("name", MAKERS)
def test_what_was_drafted_holds_and_a_prompt_keeps_its_laws(name: str) -> None:
    report = ak.check(drafted(name), MAKERS[name], methods=("prompt_tuning", "reft"))
    assert [str(problem) for problem in report.problems] == []
    assert [claim.text for claim in report.unseen] == []
    assert {verdict.state for verdict in report.methods} == {"proved"}


def problems(data: dict[str, Any], name: str) -> list[str]:
    found = ak.check(data, MAKERS[name], methods=()).problems
    return [str(problem) for problem in found]


@pytest.mark.parametrize("name", MAKERS)
def test_a_mask_that_is_denied_is_refuted(name: str) -> None:
    data = drafted(name)
    for stack in data["stacks"].values():
        for block in ("inputs", "reads"):
            if block in stack:
                stack[block] = {**stack[block], "mask": None, "mask_hides": False}
    told = problems(data, name)
    assert told
    assert all(f"'{name}' hides" in text and f"say 'mask: {name}'" in text for text in told)
    assert all(("mask_hides: true" in text) is (name == "padding") for text in told)


@pytest.mark.parametrize("name", MAKERS)
def test_the_other_meaning_is_refuted(name: str) -> None:
    data = drafted(name)
    hides = name == "padding"
    for stack in data["stacks"].values():
        for block in ("inputs", "reads"):
            if stack.get(block, {}).get("mask"):
                stack[block] = {**stack[block], "mask_hides": not hides}
    told = problems(data, name)
    assert told
    assert all(f"say 'mask_hides: {str(hides).lower()}'" in text for text in told)


def moved(name: str, method: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model with an adapter whose every tensor is another than at the start."""
    model, inputs = MAKERS[name]()
    kit = ak.attach(model.eval(), method, interface=drafted(name))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in kit["default"].parameters():
            parameter.add_(torch.randn_like(parameter))
    return model, inputs


@pytest.mark.parametrize("method", ["prompt_tuning[prompt_length=3]", "loreft[r=2]"])
@pytest.mark.parametrize("name", MAKERS)
@torch.no_grad()
def test_a_padded_example_is_the_example_without_padding(name: str, method: str) -> None:
    """No code of adapterkit says what is right here: the shorter example needs no mask."""
    model, inputs = moved(name, method)
    plain, _ = MAKERS[name]()
    words = next(iter(inputs))
    short = {
        key: value[1:, : masked.SEEN] if key in (words, name) else value[1:] for key, value in inputs.items()
    }
    whole, alone = model(**inputs)[1:], model(**short)
    torch.testing.assert_close(whole, alone)
    del short[name]
    torch.testing.assert_close(model(**short), alone)
    assert not torch.allclose(whole, plain.eval()(**inputs)[1:], atol=1e-3)


def test_a_table_of_segments_is_not_where_the_stream_begins() -> None:
    class Sided(masked.Keeping):
        def __init__(self) -> None:
            super().__init__()
            self.side = nn.Embedding(2, masked.WIDTH)

        def forward(self, words: Tensor, sides: Tensor) -> Tensor:  # type: ignore[override]
            x = self.table(words) + self.side(sides)
            for layer in self.layers:
                x = layer(x, None)
            return self.classify(self.norm(x))

    def make() -> tuple[nn.Module, dict[str, Tensor]]:
        words = masked.keeping()[1]["words"]
        return Sided(), {"words": words, "sides": words % 2}

    model, inputs = make()
    data = ak.draft(model, inputs=inputs).data
    (stack,) = data["stacks"].values()
    assert stack["embeddings"] == {"table": "table", "out": "table"}
    assert ak.check(data, make, methods=()).ok
    stack["embeddings"]["out"] = "side"
    assert [problem.code for problem in ak.check(data, make, methods=()).problems] == ["refuted"]


def test_nothing_is_said_of_the_ones_of_a_mask_that_is_not_taken() -> None:
    class Open(masked.Keeping):
        def forward(self, words: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(words)

    def make() -> tuple[nn.Module, dict[str, Tensor]]:
        return Open(), {"words": masked.keeping()[1]["words"]}

    data = ak.draft(Open(), inputs=make()[1]).data
    (stack,) = data["stacks"].values()
    assert stack["inputs"].pop("mask") is None
    assert ak.check(data, make, methods=()).ok
    stack["inputs"]["mask_hides"] = True
    (problem,) = ak.check(data, make, methods=()).problems
    assert (problem.address, problem.expected) == ("stacks.encoder.inputs.mask_hides", "Open takes none")
