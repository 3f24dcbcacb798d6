"""Tiny instances: small, alike in structure to the real one, always the same, and they run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import adapterkit as ak
from adapterkit.author import inputs, tiny
from adapterkit.author.shrink import HEADS, KV_HEADS, VOCAB, WAYS, Shrinker
from adapterkit.errors import ConfigError
from adapterkit.spec.making import Tiny
from tests.models.custom import TinyClassifier

FACTORIES = "tests.author.factories"
# one of each structure: post-norm, fused, grouped, two stacks, towers, sound, image, kinds of layers
TYPES = "gpt2 qwen3 t5 clip whisper mixtral llava wav2vec2".split()


@pytest.mark.parametrize("model_type", TYPES)
def test_a_model_type_is_built_small_and_runs(model_type: str) -> None:
    model, given = tiny.build(model_type)
    assert model.config.model_type == model_type
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    assert inputs.run(model, given)


def small(config: Any) -> Any:
    return Shrinker(config, WAYS[0]).shrink(config)


def test_every_kind_of_layer_is_kept() -> None:
    for model_type in ("gemma3_text", "qwen3_next", "llama4_text"):
        whole = transformers.CONFIG_MAPPING[model_type]()
        assert set(small(whole).layer_types) == set(whole.layer_types)
        assert len(small(whole).layer_types) == small(whole).num_hidden_layers < whole.num_hidden_layers


def test_grouped_heads_stay_grouped() -> None:
    grouped = small(transformers.LlamaConfig(num_attention_heads=32, num_key_value_heads=8))
    assert (grouped.num_attention_heads, grouped.num_key_value_heads) == (HEADS, KV_HEADS)
    plain = small(transformers.LlamaConfig(num_attention_heads=32, num_key_value_heads=32))
    assert plain.num_attention_heads == plain.num_key_value_heads == HEADS
    one = small(transformers.LlamaConfig(num_attention_heads=32, num_key_value_heads=1))
    assert one.num_key_value_heads == 1


def test_equal_sizes_stay_equal_and_others_differ() -> None:
    config = transformers.LlamaConfig(hidden_size=512, intermediate_size=1536, vocab_size=9000)
    tiny_config = small(config)
    assert len({tiny_config.hidden_size, tiny_config.intermediate_size, tiny_config.vocab_size}) == 3
    assert tiny_config.vocab_size == VOCAB
    pair = small(transformers.LlavaConfig())
    assert pair.vision_config.hidden_size != pair.text_config.hidden_size
    assert max(pair.image_token_id, pair.text_config.eos_token_id) < pair.text_config.vocab_size


def test_the_seed_decides_every_number() -> None:
    first, again, other = (tiny.build("bert", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.inputs["input_ids"], again.inputs["input_ids"])
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])
    assert not torch.equal(
        first.model.get_input_embeddings().weight, other.model.get_input_embeddings().weight
    )


def test_the_random_numbers_of_the_caller_stay() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    tiny.build("bert")
    assert torch.equal(torch.rand(1), expected)


def test_what_a_source_may_be(tmp_path: Path) -> None:
    config = transformers.BertConfig(hidden_size=96, num_attention_heads=3)
    config.save_pretrained(tmp_path)
    for source in (config, tmp_path, str(tmp_path / "config.json")):
        model, _ = tiny.build(source)
        assert type(model) is transformers.BertModel
    large = transformers.BertForSequenceClassification(transformers.BertConfig(num_hidden_layers=3))
    model, _ = tiny.build(large)
    assert type(model) is transformers.BertForSequenceClassification and model is not large
    named, _ = tiny.build("bert", "BertForMaskedLM")
    assert type(named) is transformers.BertForMaskedLM


def test_factories_of_any_module() -> None:
    model, given = tiny.build(f"{FACTORIES}:classifier")
    assert type(model) is TinyClassifier and inputs.run(model, given)["logits"].shape[0] == inputs.BATCH
    _, given = tiny.build(f"{FACTORIES}:odd_with_inputs")
    assert set(given) == {"wires"}
    own = TinyClassifier()
    assert tiny.build(own).model is own


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("bertt", "did you mean 'bert'"),
        (f"{FACTORIES}:odd", "no inputs were found that it runs on"),
        (f"{FACTORIES}:absent", "it cannot be imported"),
        (f"{FACTORIES}:no_module", "it gives int, not a module"),
        ("no.such.module:make", "it cannot be imported"),
    ],
)
def test_what_cannot_be_built_says_why(source: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        tiny.build(source)
    assert caught.value.code == "no-such-model"


def test_an_interface_says_what_a_tiny_model_needs(tmp_path: Path) -> None:
    model, given = tiny.build("xmod")  # no default config runs: it names no language
    assert model.config.default_language == "en_XX" and inputs.run(model, given)
    spec = Path(__file__).parent.parent / "specs" / "good" / "model-bert-tiny.yaml"
    said = ak.Interface.load(spec).tiny["bert"]
    small_config = Shrinker(transformers.BertConfig(), WAYS[0]).shrink(transformers.BertConfig(), said.config)
    assert (small_config.hidden_size, small_config.num_attention_heads) == (24, 3)
    drawn = tiny.drawn(said.inputs)
    assert drawn["input_ids"].shape == (3, 5) and int(drawn["input_ids"].max()) < 40
    assert drawn["attention_mask"].sum() == 12
    fed = tiny.build("bert", given=drawn)
    assert torch.equal(fed.inputs["attention_mask"], drawn["attention_mask"])


def test_a_field_that_the_config_has_not_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = ak.Interface.load(
        {"adapterkit": 1, "like": "bert", "tiny": {"bert": {"config": {"hiden_size": 8}}}}
    )
    monkeypatch.setattr(tiny.registry, "by_name", lambda name: said)
    with pytest.raises(ConfigError, match="did you mean 'hidden_size'") as caught:
        tiny.build("bert")
    assert caught.value.code == "unknown-config-field"


def test_a_type_that_automodel_does_not_know() -> None:
    assert type(tiny.build("siglip_text_model").model) is transformers.SiglipTextModel


def test_an_interface_says_what_sizes_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fields of a sub-config, and arguments that are not given."""
    said = Tiny(config={"vision_config": {"patch_size": 8}}, inputs={"attention_mask": None})
    monkeypatch.setattr(tiny, "_said", lambda config: said)
    model, given = tiny.build("clip")
    assert (model.config.vision_config.patch_size, given["attention_mask"]) == (8, None)
    assert given["pixel_values"] is not None


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("fails", "RuntimeError: the weights are elsewhere (factories.py:"),
        ("asks", "is called without arguments, and raises TypeError"),
        ("not_callable", "'int' object is not callable"),
        ("with_a_list", "beside the module it gives list"),
        ("with_wrong_inputs", "does not run on its inputs: TypeError"),
    ],
)
def test_a_function_that_gives_no_model_that_runs_is_told(name: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny.build(f"tests.author.factories:{name}")
    assert caught.value.code == "no-such-model"
    assert told in str(caught.value)
    assert "a dict of its inputs" in str(caught.value)


def test_words_are_drawn_that_a_small_vocabulary_has() -> None:
    class Tagger(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kinds, self.table = torch.nn.Embedding(2, 8), torch.nn.Embedding(20, 8)

        def forward(self, words: torch.Tensor) -> torch.Tensor:
            return self.table(words) + self.kinds(torch.zeros_like(words))

    assert int(inputs.draw(Tagger())["words"].max()) < 20
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.BertConfig(vocab_size=12, **size)
    assert int(inputs.draw(transformers.BertModel(config))["input_ids"].max()) < 12
