"""A vocabulary that is resized after attach or before it: adapters act where they acted, or it is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.errors import PlanError
from tests.models.tiny import build, inputs
from tests.unit.kit_scene import refused

GPT2, T5 = "GPT2LMHeadModel", "T5ForConditionalGeneration"


@torch.no_grad()
def logits(model: nn.Module, row: str, cls: str) -> Tensor:
    """Of the words that the model had from the start."""
    found: Tensor = model.eval()(**inputs(row, cls)).logits
    return found[..., : build(row, cls).get_input_embeddings().weight.shape[0]]


def resized(row: str, cls: str, method: str) -> tuple[ak.Kit, Any, Tensor]:
    model: Any = build(row, cls)
    kit = ak.attach(model, method, name="a")
    with torch.no_grad():
        for tensor in kit["a"].parameters():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))
    before = logits(model, row, cls)
    model.resize_token_embeddings(model.get_input_embeddings().weight.shape[0] + 3)
    return kit, model, before


@pytest.mark.parametrize("method", ["lora", "prompt_tuning", "seq_bn_inv"])
def test_old_words_get_what_they_got(method: str, tmp_path: Path) -> None:
    kit, model, before = resized("gpt2", GPT2, method)
    assert torch.equal(logits(model, "gpt2", GPT2), before)
    model.save_pretrained(tmp_path)
    fresh = type(model).from_pretrained(tmp_path)
    ak.load(fresh, tmp_path)
    assert torch.equal(logits(fresh, "gpt2", GPT2), before)
    assert list(kit) == ["a"]


@pytest.mark.parametrize(
    "method", ["seq_bn|invertible[inverse=false]", "prompt_tuning[stacks=[encoder,decoder]]"]
)
def test_stacks_that_have_one_module_for_their_embeddings(method: str, tmp_path: Path) -> None:
    """T5 after resizing: what acts before the encoder would act before the decoder too."""
    whole: Any = build("t5", T5)
    kit = ak.attach(whole, method, name="a")
    with torch.no_grad():
        for tensor in kit["a"].parameters():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))
    expected = logits(whole, "t5", T5)
    kit.save(tmp_path / "a")
    model: Any = build("t5", T5)
    model.resize_token_embeddings(model.get_input_embeddings().weight.shape[0] + 3)
    assert model.encoder.embed_tokens is model.decoder.embed_tokens
    names = list(model.state_dict())
    with pytest.raises(PlanError) as caught:
        ak.load(model, tmp_path / "a")
    assert caught.value.code == "shared-module" and "decoder.embed_tokens" in str(caught.value)
    refused(PlanError, "shared-module", ak.attach, model, method)
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    fresh = type(model).from_pretrained(tmp_path)
    ak.load(fresh, tmp_path / "a")
    assert torch.equal(logits(fresh, "t5", T5), expected)
