"""Rows and caches as users have them: packed texts, prefill in chunks, caches of earlier calls.

Expected is what the model gives for each text alone, or for the whole text without a cache; else a refusal.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

import adapterkit as ak
from adapterkit.errors import PlanError
from tests.laws.matrix import randomise
from tests.models import tiny

ALIKE = ("lora", "seq_bn[reduction_factor=4]", "prefix_tuning_flat[prefix_length=3]")
PROMPT = "prompt_tuning[prompt_length=4]"
LOREFT = "loreft[r=4]"
CLASSES = {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel"}
family = pytest.mark.parametrize("row", CLASSES)


def adapted(row: str, method: str) -> nn.Module:
    model = tiny.build(row, CLASSES[row])
    randomise(ak.attach(model, method, seed=0))
    model.generation_config.eos_token_id = None
    return model


def held(model: nn.Module, cache: DynamicCache) -> dict[str, Any]:
    """A cache by the name that this version has for it."""
    names = inspect.signature(type(model).forward).parameters
    return {"cache" if "cache" in names else "past_key_values": cache}


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(5, 60, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: nn.Module, tokens: Tensor, **given: Any) -> Tensor:
    return model(input_ids=tokens, use_cache=False, **given).logits


def packed(form: str, *lengths: int) -> dict[str, Tensor]:
    """Texts of these lengths in one row, told by their positions or by a mask."""
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    if form == "positions":
        return {"position_ids": positions}
    seen = torch.block_diag(*(torch.ones(length, length) for length in lengths)).bool().tril()[None, None]
    lowest = torch.finfo(torch.float32).min
    mask = seen if form == "bools" else torch.zeros(seen.shape).masked_fill(~seen, lowest)
    return {"position_ids": positions, "attention_mask": mask}


@family
@pytest.mark.parametrize("form", ["positions", "bools", "numbers"])
@pytest.mark.parametrize("method", [*ALIKE, LOREFT, PROMPT])
def test_texts_in_one_row(row: str, method: str, form: str) -> None:
    model, texts = adapted(row, method), (ids(1, 5), ids(1, 4, seed=1))
    whole, given = torch.cat(texts, dim=1), packed(form, 5, 4)
    if method in ALIKE:
        alone = torch.cat([logits(model, text) for text in texts], dim=1)
        assert torch.allclose(logits(model, whole, **given), alone, atol=1e-5)
        return
    with pytest.raises(PlanError) as refused:
        logits(model, whole, **given)
    masked = method == PROMPT and form != "positions"
    assert refused.value.code == ("unfit-input" if masked else "packed")


@pytest.mark.parametrize("method", [LOREFT, PROMPT])
def test_lengths_of_packed_texts(method: str) -> None:
    with pytest.raises(PlanError) as refused:
        logits(adapted("llama", method), ids(1, 9), cu_seq_lens_q=torch.tensor([0, 5, 9], dtype=torch.int32))
    assert refused.value.code == "packed"


@pytest.mark.parametrize("method", [LOREFT, PROMPT])
def test_positions_of_one_text_are_no_packing(method: str) -> None:
    """Nor are those of a model without an order of time, whose tokens see each other all the same."""
    model = adapted("llama", method)
    text = ids(2, 6)
    assert torch.allclose(
        logits(model, text, position_ids=torch.arange(6)[None]), logits(model, text), atol=1e-5
    )
    encoder = tiny.build("bert").eval()
    ak.attach(encoder, method)
    encoder(text, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))


# ------------------------------------------------------------------------------------------------- caches


def padded(short: int) -> tuple[Tensor, Tensor]:
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :short] = 0
    return ids(2, 9), mask


def greedy(model: nn.Module, tokens: Tensor, mask: Tensor, count: int) -> Tensor:
    """Text by the whole forward, without any cache."""
    for _ in range(count):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        new = logits(model, tokens, attention_mask=mask, position_ids=positions)[:, -1].argmax(-1)
        tokens = torch.cat([tokens, new[:, None]], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return tokens


@family
@pytest.mark.parametrize("method", [*ALIKE, LOREFT, PROMPT])
def test_a_prefill_in_chunks(row: str, method: str) -> None:
    model = adapted(row, method)
    tokens, mask = padded(2)
    given = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    whole = greedy(model, tokens, mask, 5)
    assert torch.equal(model.generate(tokens, **given, prefill_chunk_size=6), whole)
    if method in ALIKE:
        assert torch.equal(model.generate(tokens, **given, prefill_chunk_size=2), whole)
        return
    with pytest.raises(PlanError) as refused:
        model.generate(tokens, **given, prefill_chunk_size=2)
    assert refused.value.code == ("late-positions" if method == LOREFT else "unfit-cache")


@family
def test_a_cache_of_an_earlier_call_and_a_prompt(row: str) -> None:
    """generate() takes the length of a cache for a number of tokens; the model is told which follow."""
    model = adapted(row, PROMPT)
    tokens, mask = padded(2)
    cache = DynamicCache(config=model.config)
    given = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    first = model.generate(tokens, attention_mask=mask, **held(model, cache), **given)
    mask = torch.cat([mask, mask.new_ones(2, 3)], dim=1)
    with pytest.raises(PlanError) as refused:
        model.generate(first, attention_mask=mask, **held(model, cache), **given)
    assert refused.value.code == "unfit-cache"
    positions = mask.cumsum(1) - 1
    with torch.no_grad():
        last = model(
            input_ids=first[:, -1:],
            attention_mask=mask,
            position_ids=positions[:, -1:],
            **held(model, cache),
        ).logits
    expected = logits(model, first, attention_mask=mask, position_ids=positions.clamp(min=0))
    assert torch.allclose(last[:, -1], expected[:, -1], atol=1e-4)


@family
def test_a_cache_of_a_fixed_size_has_no_room_for_a_prompt(row: str) -> None:
    model, (tokens, _) = adapted(row, PROMPT), padded(0)
    cache = StaticCache(config=model.config, max_cache_len=tokens.shape[1] + 5)
    given = {**held(model, cache), "use_cache": True}
    with pytest.raises(PlanError) as refused, torch.no_grad():
        for step in (tokens, tokens[:, :1], tokens[:, 1:2]):
            model(input_ids=step, **given)
    assert refused.value.code == "unfit-cache"
    assert cache.get_seq_length() == tokens.shape[1] + 5


def test_a_prompt_that_comes_to_a_cache_that_others_have_begun() -> None:
    model = adapted("llama", PROMPT)
    kit, tokens, mask = ak.of(model), ids(2, 6), torch.ones(2, 6, dtype=torch.long)
    cache = DynamicCache(config=model.config)
    with kit.disabled(), torch.no_grad():
        model(input_ids=tokens[:, :5], attention_mask=mask[:, :5], **held(model, cache))
    with pytest.raises(PlanError) as refused:
        model(input_ids=tokens[:, 5:], attention_mask=mask, **held(model, cache))
    assert refused.value.code == "unfit-cache"


# ------------------------------------------------------------------------------------------ a shared module


def test_two_models_around_one_backbone() -> None:
    """A module runs the adapters of one kit: the second is refused, and the first gives what it gave."""
    first, second = (tiny.build("bert", "BertForSequenceClassification", seed=seed) for seed in (0, 1))
    second.bert = first.bert
    inputs = tiny.inputs("bert", "BertForSequenceClassification")
    kit = ak.attach(first, "lora", seed=0)
    randomise(kit)
    before, keys = tiny.output(first(**inputs)), list(second.state_dict())
    for method in ("lora", "seq_bn", PROMPT, LOREFT, "prefix_tuning"):
        with pytest.raises(PlanError) as refused:
            ak.attach(second, method)
        assert refused.value.code == "shared-module"
    assert torch.equal(tiny.output(first(**inputs)), before)
    assert list(second.state_dict()) == keys
    kit.detach()
    ak.attach(second, "lora")


# --------------------------------------------------------------------------------------- replaced modules


def test_modules_with_adapters_are_not_replaced_without_a_word() -> None:
    """The new module has no adapters, while the kit would save and train those of the old."""
    model, tokens = adapted("llama", PROMPT), ids(2, 6)
    kit, before = ak.of(model), logits(model, tokens)
    table = nn.Embedding.from_pretrained(model.get_input_embeddings().weight * 2)
    inverse = adapted("llama", "seq_bn_inv")
    classifier = tiny.build("bert", "BertForSequenceClassification")
    ak.attach(classifier, "lora")
    for change in (
        lambda: model.set_input_embeddings(table),
        lambda: inverse.resize_token_embeddings(70),
        lambda: setattr(classifier, "classifier", nn.Linear(32, 5)),
        lambda: setattr(classifier.bert.encoder, "layer", classifier.bert.encoder.layer[:1]),
    ):
        with pytest.raises(PlanError) as refused:
            change()
        assert refused.value.code == "replaced-module"
    assert torch.equal(logits(model, tokens), before)
    kit.detach()
    model.set_input_embeddings(table)
    assert model.get_input_embeddings() is table


def test_modules_without_adapters_may_be_replaced_and_those_with_may_be_wrapped() -> None:
    model, tokens = adapted("llama", PROMPT), ids(2, 6)
    before = logits(model, tokens)
    model.lm_head = nn.Linear(32, 64, bias=False).requires_grad_(False)
    assert not torch.allclose(logits(model, tokens), before)
    model.model.embed_tokens = Wrapper(model.model.embed_tokens)
    logits(model, tokens)
    around = Wrapper(model)
    around.inner = adapted("llama", "lora")  # a whole model with its kit


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)
