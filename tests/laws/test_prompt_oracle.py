"""Prompt tuning against a plain model with more words, and against layers called by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.author import tiny as author_tiny
from tests.laws.prompt_cases import LENGTH, attach, vectors
from tests.models import tiny
from tests.oracles import prompt

TEXT = [name for name, row in tiny.ROWS.items() if row.kind in ("encoder", "decoder")]
SEQ2SEQ = [name for name, row in tiny.ROWS.items() if row.kind == "seq2seq"]
CLOSE = {"rtol": 1e-5, "atol": 2e-6}
positions = pytest.mark.parametrize("position", ["before", "after_first"])


def table_of(model: nn.Module) -> nn.Embedding:
    encoder = model.get_encoder() if model.config.is_encoder_decoder else model
    found = encoder.get_input_embeddings()
    assert isinstance(found, nn.Embedding)
    return found


def both(row: str, cls: str, position: str) -> tuple[Any, Any, dict[str, Tensor], list[int]]:
    """Outputs with a prompt, those of the plain model with more words, the inputs, where it begins."""
    given = tiny.inputs(row, cls)
    kit = attach(row, cls, position=position)
    plain = tiny.build(row, cls)
    words = prompt.add_words(table_of(plain), vectors(kit))
    longer, begins = prompt.prompted(given, words, int(position == "after_first"))
    with torch.no_grad():
        return kit.model(**given), plain(**longer), given, begins


@positions
@pytest.mark.parametrize("row", TEXT)
def test_states_are_those_of_a_model_that_reads_the_prompt_as_words(row: str, position: str) -> None:
    own, plain, given, begins = both(row, tiny.classes(row)[0], position)
    expected = prompt.cut(plain.last_hidden_state, LENGTH, begins)
    real = given["attention_mask"].bool()
    assert own.last_hidden_state.shape == expected.shape
    torch.testing.assert_close(own.last_hidden_state[real], expected[real], **CLOSE)


@positions
@pytest.mark.parametrize("row", SEQ2SEQ)
def test_a_decoder_reads_the_prompt_of_its_encoder(row: str, position: str) -> None:
    own, plain, given, _ = both(row, tiny.classes(row)[0], position)
    field = "logits" if "logits" in plain else "last_hidden_state"
    real = given["decoder_attention_mask"].bool()
    torch.testing.assert_close(own[field][real], plain[field][real], **CLOSE)


def test_the_pooled_text_of_clip_is_that_of_its_own_last_token() -> None:
    own, plain, given, begins = both("clip", "CLIPTextModel", "before")
    torch.testing.assert_close(own.pooler_output, plain.pooler_output, **CLOSE)
    expected = prompt.cut(plain.last_hidden_state, LENGTH, begins)
    real = given["attention_mask"].bool()
    torch.testing.assert_close(own.last_hidden_state[real], expected[real], **CLOSE)


def test_vision_and_sound_equal_layers_called_by_hand() -> None:
    with torch.no_grad():
        kit, plain = attach("vit", "ViTModel"), tiny.build("vit", "ViTModel")
        pixels = tiny.inputs("vit", "ViTModel")["pixel_values"]
        found, expected = kit.model(pixels), prompt.vit(plain, pixels, vectors(kit))
        torch.testing.assert_close(found.last_hidden_state, expected, **CLOSE)
        torch.testing.assert_close(found.pooler_output, plain.pooler(expected), **CLOSE)

        kit, plain = attach("beit", "BeitModel"), tiny.build("beit", "BeitModel")
        pixels = tiny.inputs("beit", "BeitModel")["pixel_values"]
        found, expected = kit.model(pixels), prompt.beit(plain, pixels, vectors(kit))
        torch.testing.assert_close(found.last_hidden_state, expected, **CLOSE)

        kit, plain = attach("clip", "CLIPVisionModel"), tiny.build("clip", "CLIPVisionModel")
        pixels = tiny.inputs("clip", "CLIPVisionModel")["pixel_values"]
        states, pooled = prompt.clip_vision(plain, pixels, vectors(kit))
        found = kit.model(pixels)
        torch.testing.assert_close(found.last_hidden_state, states, **CLOSE)
        torch.testing.assert_close(found.pooler_output, pooled, **CLOSE)

        kit, plain = attach("whisper", "WhisperModel"), tiny.build("whisper", "WhisperModel")
        given = tiny.inputs("whisper", "WhisperModel", padded=False)
        ids = given["decoder_input_ids"]
        expected = prompt.whisper(plain, given["input_features"], ids, vectors(kit))
        torch.testing.assert_close(kit.model(**given).last_hidden_state, expected, **CLOSE)


@pytest.mark.parametrize(
    ("row", "cls"), [("bert", "BertModel"), ("roberta", "RobertaModel"), ("albert", "AlbertModel")]
)
def test_a_pooler_reads_the_first_real_position(row: str, cls: str) -> None:
    kit, plain = attach(row, cls), tiny.build(row, cls)
    with torch.no_grad():
        found = kit.model(**tiny.inputs(row, cls))
        states = found.last_hidden_state
        pooled = torch.tanh(plain.pooler(states[:, 0])) if row == "albert" else plain.pooler(states)
    assert torch.equal(found.pooler_output, pooled)


def test_a_given_position_moves_on_by_the_length_of_the_prompt() -> None:
    given = tiny.inputs("gpt2", "GPT2Model", padded=False)
    kit = attach("gpt2", "GPT2Model")
    places = torch.arange(given["input_ids"].shape[1])[None]
    with torch.no_grad():
        assert torch.equal(kit.model(**given, position_ids=places)[0], kit.model(**given)[0])


@pytest.mark.parametrize("row", ["bert", "gpt2"])
def test_embedded_tokens_and_ids_give_the_same(row: str) -> None:
    cls = tiny.classes(row)[0]
    kit, given = attach(row, cls), tiny.inputs(row, cls)
    with torch.no_grad():
        expected = kit.model(**given)[0]
        with kit.disabled():
            embeds = kit.model.get_input_embeddings()(given.pop("input_ids"))
        assert torch.equal(kit.model(inputs_embeds=embeds, **given)[0], expected)


def test_hidden_states_and_attentions_have_the_length_of_the_input() -> None:
    for row, cls in (
        ("bert", "BertModel"),
        ("llama", "LlamaForCausalLM"),
        ("t5", "T5Model"),
        ("vit", "ViTModel"),
    ):
        given = tiny.inputs(row, cls)
        wanted = {"output_hidden_states": True, "output_attentions": True}
        kit = attach(row, cls, attn="eager")
        with torch.no_grad():
            found = kit.model(**given, **wanted)
            with kit.disabled():
                bare = kit.model(**given, **wanted)
        for field in ("hidden_states", "attentions", "decoder_hidden_states", "cross_attentions"):
            if field in bare:
                assert [t.shape for t in found[field]] == [t.shape for t in bare[field]], (row, field)


def test_more_positions_than_the_model_has_learned_are_refused() -> None:
    kit = ak.attach(tiny.build("bert"), "prompt_tuning[prompt_length=60]")
    with pytest.raises(ak.errors.PlanError) as refused:
        kit.model(**tiny.inputs("bert"))
    assert refused.value.code == "too-long"


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen3_vl", "glm4v"])
def test_a_prompt_before_an_image_moves_the_grid_of_its_positions_as_a_text_does(model_type: str) -> None:
    """The model counts positions of time, height and width itself: words in front stand for the prompt."""
    words = (7, 9, 11)
    model, inputs = author_tiny.build(model_type)
    assert "pixel_values" in inputs
    text = {name: inputs[name] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    front = {"input_ids": torch.tensor(words), "attention_mask": torch.ones(3, dtype=torch.long)}
    front["mm_token_type_ids"] = torch.zeros(3, dtype=torch.long)
    longer = {name: torch.cat([front[name].expand(2, -1), value], 1) for name, value in text.items()}
    with torch.no_grad():
        expected = model(**{**inputs, **longer}).last_hidden_state[:, len(words) :]
        options = {"prompt_length": len(words), "init": "from_text", "init_text_ids": words}
        kit = ak.attach(model, {"method": "prompt_tuning", **options})
        found = kit.model(**inputs).last_hidden_state
        with kit.disabled():
            plain = kit.model(**inputs).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-3)
