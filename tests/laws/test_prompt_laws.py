"""Laws of prompt tuning on every family: lengths, gradients, leaving no trace, files, generation."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import adapterkit as ak
from tests.laws.matrix import CUSTOM, default_classes, generating, loss, randomise, run
from tests.laws.prompt_cases import LENGTH, attach
from tests.models import tiny
from tests.oracles import prompt as prompt_oracle

pytestmark = pytest.mark.filterwarnings("ignore:Version v4.12.0 introduces a better way:FutureWarning")

CASES = [(row, cls) for row in tiny.ROWS for cls in default_classes(row)]
every = pytest.mark.parametrize(("row", "cls"), CASES, ids=lambda value: value)
TOKENS = 4


@every
def test_outputs_keep_their_length_and_every_vector_trains(row: str, cls: str) -> None:
    given = tiny.inputs(row, cls, labels=True)
    plain = tiny.build(row, cls)
    with torch.no_grad():
        base = tiny.fields(plain(**given))
    kit = attach(row, cls)
    before = run(kit.model, given)
    randomise(kit)
    with torch.no_grad():
        found = tiny.fields(kit.model(**given))
    assert {name: t.shape for name, t in found.items()} == {name: t.shape for name, t in base.items()}
    assert not torch.allclose(run(kit.model, given), before, atol=1e-4)

    loss(kit.model, given).backward()
    own = dict(kit["default"].named_parameters())
    prompts = [name for name in own if name.endswith(".prompt.embeds")]
    assert prompts
    for name in prompts:
        assert own[name].shape[0] == LENGTH
        assert own[name].grad.abs().sum(1).all(), "a vector of the prompt got no gradient"
    with_gradient = {id(t) for t in kit.model.parameters() if t.grad is not None}
    assert with_gradient <= {id(t) for t in own.values()}


@every
def test_disabled_and_detached_the_model_is_the_plain_one(row: str, cls: str) -> None:
    given, plain = tiny.inputs(row, cls), tiny.build(row, cls)
    expected, keys = run(plain, given), list(plain.state_dict())
    kit = attach(row, cls)
    model = kit.model
    own = run(model, given)
    with kit.disabled():
        assert torch.equal(run(model, given), expected)
    assert torch.equal(run(model, given), own)
    kit.detach()
    assert torch.equal(run(model, given), expected)
    assert list(model.state_dict()) == keys
    assert not model._forward_hooks and not model._forward_pre_hooks


@every
def test_a_saved_prompt_gives_the_same_bits_in_a_fresh_model(row: str, cls: str, tmp_path: Path) -> None:
    given, kit = tiny.inputs(row, cls), attach(row, cls)
    randomise(kit)
    kit.save(tmp_path / "it")
    fresh = tiny.build(row, cls)
    ak.load(fresh, tmp_path / "it", interface=CUSTOM if row == "custom" else None)
    assert torch.equal(run(fresh, given), run(kit.model, given))


@pytest.mark.parametrize("row", [row for row in tiny.ROWS if generating(row)])
def test_generate_gives_the_same_with_and_without_a_cache(row: str) -> None:
    cls = generating(row)[0]
    kit, given = attach(row, cls), tiny.inputs(row, cls)

    def generate(**options: Any) -> Any:
        wanted = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
        told = {"return_dict_in_generate": True, "output_logits": True}
        return kit.model.generate(**given, **wanted, **told, **options)

    cached, whole = generate(use_cache=True), generate(use_cache=False)
    assert torch.equal(cached.sequences, whole.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(whole.logits), rtol=1e-4, atol=1e-5)
    with kit.disabled():
        assert not torch.allclose(generate().logits[0], cached.logits[0], atol=1e-3)
    beams = {"num_beams": 2, "use_cache": True}, {"num_beams": 2, "use_cache": False}
    assert torch.equal(*(generate(**each).sequences for each in beams))


@pytest.mark.parametrize("row", [row for row, found in tiny.ROWS.items() if found.kind == "decoder"])
@pytest.mark.parametrize("position", ["before", "after_first"])
def test_a_text_padded_on_the_left_continues_as_it_does_alone(row: str, position: str) -> None:
    cls = generating(row)[0]
    kit, given = attach(row, cls, position=position), tiny.inputs(row, cls)
    assert not given["attention_mask"].all(), "nothing is padded"

    def logits(**inputs: Tensor) -> Tensor:
        wanted = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
        told = {"return_dict_in_generate": True, "output_logits": True}
        return torch.stack(kit.model.generate(**inputs, **wanted, **told).logits, dim=1)

    together = logits(**given)
    for index, mask in enumerate(given["attention_mask"].bool()):
        ids = given["input_ids"][index, mask][None]
        alone = logits(input_ids=ids, attention_mask=torch.ones_like(ids))
        torch.testing.assert_close(together[index], alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("row", ["gpt2", "llama", "gemma2"])
def test_a_cache_of_fixed_size_is_refused_where_the_prompt_would_lie_in_it(row: str) -> None:
    cls = generating(row)[0]
    kit, given = attach(row, cls), tiny.inputs(row, cls)
    wanted: dict[str, Any] = {"max_new_tokens": 2, "cache_implementation": "static", "disable_compile": True}
    with pytest.raises(ak.errors.PlanError) as refused:
        kit.model.generate(**given, **wanted)
    assert refused.value.code == "unfit-input"
    assert "fixed size" in str(refused.value)


def test_a_cache_of_fixed_size_has_room_for_a_decoder_whose_encoder_has_the_prompt() -> None:
    kit, given = attach("t5", "T5ForConditionalGeneration"), tiny.inputs("t5", "T5ForConditionalGeneration")
    wanted: dict[str, Any] = {"max_new_tokens": 3, "return_dict_in_generate": True, "output_logits": True}
    found = kit.model.generate(**given, **wanted, cache_implementation="static", disable_compile=True)
    expected = kit.model.generate(**given, **wanted)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("row", "init"),
    [("bert", "vocabulary"), ("gemma2", "vocabulary"), ("t5", "from_text"), ("llama", "from_text")],
)
def test_a_prompt_may_start_from_embeddings_of_the_model(row: str, init: str) -> None:
    options: dict[str, Any] = {"init": init} | ({"init_text_ids": (7, 9, 11)} if init == "from_text" else {})
    kit = attach(row, tiny.classes(row)[0], **options)
    (own,) = kit["default"].parameters()
    plain = tiny.build(row)
    encoder = plain.get_encoder() if plain.config.is_encoder_decoder else plain
    rows = encoder.get_input_embeddings()(torch.arange(tiny.build(row).config.vocab_size))
    if init == "from_text":
        assert torch.equal(own, rows[[7, 9, 11, 7]])
    else:
        assert all((rows == vector).all(1).any() for vector in own)


def test_adapterhub_places_the_prompt_behind_the_embeddings_and_keeps_its_positions() -> None:
    """Its prompt has no position embedding, and the pooler reads the first position, one of the prompt."""
    kit = attach("bert", "BertModel", insert="out", keep_positions=True)
    plain, given = tiny.build("bert", "BertModel"), tiny.inputs("bert", "BertModel")
    (prompt,) = kit["default"].parameters()
    mask = torch.cat([torch.ones(2, LENGTH), given["attention_mask"]], dim=1)
    with torch.no_grad():
        states = torch.cat([prompt.expand(2, -1, -1), plain.embeddings(given["input_ids"])], dim=1)
        hidden = (1 - mask[:, None, None]) * torch.finfo(torch.float32).min
        for layer in plain.encoder.layer:
            out = layer(states, hidden)
            states = out[0] if isinstance(out, tuple) else out
        found = kit.model(**given)
    real = mask.bool()
    torch.testing.assert_close(found.last_hidden_state[real], states[real], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(found.pooler_output, plain.pooler(states), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("given_mask", [True, False])
@pytest.mark.parametrize("row", ["deberta", "deberta_v2"])
def test_behind_embeddings_that_are_masked_themselves(row: str, given_mask: bool) -> None:
    """They see the mask of the tokens, the layers one with the prompt; without a mask all is seen."""
    kit, plain, given = attach(row, None, insert="out"), tiny.build(row), dict(tiny.inputs(row))
    mask = given["attention_mask"] if given_mask else torch.ones_like(given.pop("attention_mask"))
    (prompt,) = kit["default"].parameters()
    with torch.no_grad():
        inner = plain.embeddings(
            input_ids=given["input_ids"], token_type_ids=given.get("token_type_ids"), mask=mask
        )
        begins = prompt_oracle.places(mask, 0)
        states = prompt_oracle.put_vectors(inner, prompt, begins)
        wide = prompt_oracle.put(mask, torch.ones(len(prompt)), begins)
        expected = prompt_oracle.cut(
            plain.encoder(states, wide, return_dict=True).last_hidden_state, len(prompt), begins
        )
        found = kit.model(**given).last_hidden_state
    real = mask.bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("row", ["bert", "albert", "distilbert", "electra", "roberta", "xmod"])
def test_without_a_mask_the_prompt_behind_the_embeddings_is_seen_as_all_is(row: str) -> None:
    kit, given = attach(row, None, insert="out"), dict(tiny.inputs(row))
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    with torch.no_grad():
        expected = tiny.output(kit.model(**given))
        del given["attention_mask"]
        found = tiny.output(kit.model(**given))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


def test_behind_embeddings_whose_positions_are_in_the_layers_there_is_no_place() -> None:
    with pytest.raises(ak.errors.AdapterkitError) as refused:
        ak.attach(tiny.build("modernbert"), "prompt_tuning[insert=out]")
    assert refused.value.code == "no-place-behind"


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"insert": "out"}, "no-place-behind"),
        ({"stacks": "encoder"}, "unknown-stack"),
        ({"init": "from_text"}, "bad-option"),
        ({"init_text_ids": [1]}, "bad-option"),
        ({"init": "from_text", "init_text_ids": [64]}, "bad-option"),
        ({"prompt_length": 0}, "bad-option"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], code: str) -> None:
    with pytest.raises(ak.errors.AdapterkitError) as refused:
        ak.attach(tiny.build("gpt2"), {"method": "prompt_tuning", **options})
    assert refused.value.code == code


def test_a_place_without_a_vocabulary_and_a_mask_of_another_form_are_refused() -> None:
    with pytest.raises(ak.errors.ConfigError) as refused:
        ak.attach(tiny.build("vit"), "prompt_tuning[init=vocabulary]")
    assert refused.value.code == "no-vocabulary"
    kit, given = attach("llama", "LlamaModel"), tiny.inputs("llama", "LlamaModel")
    given["attention_mask"] = torch.zeros(2, 1, 7, 7)
    with pytest.raises(ak.errors.PlanError) as unfit:
        kit.model(**given)
    assert unfit.value.code == "unfit-input"


@pytest.mark.parametrize("row", ["beit", "vit"])
def test_a_mask_of_patches_is_widened(row: str) -> None:
    model, inputs = tiny.build(row), tiny.inputs(row)
    if "attention_mask" not in inspect.signature(type(model).forward).parameters:
        return  # newer versions of transformers take one
    plain = run(model, inputs)
    kit = ak.attach(model, "prompt_tuning[prompt_length=4]", seed=0)
    full = torch.ones(2, tiny.build(row)(**inputs).last_hidden_state.shape[1], dtype=torch.long)
    assert torch.equal(run(model, {**inputs, "attention_mask": full}), run(model, inputs))
    some = full.clone()
    some[:, 2] = 0
    hidden = run(model, {**inputs, "attention_mask": some})
    assert hidden.shape == plain.shape
    assert not torch.equal(hidden, run(model, inputs))
    kit.detach()
