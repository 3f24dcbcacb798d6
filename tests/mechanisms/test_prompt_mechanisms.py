"""Prompt tuning under torch.compile and gradient checkpointing, in copies, threads and unions."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
import transformers
from torch import nn

import adapterkit as ak
from adapterkit.errors import PlanError
from tests.mechanisms.scene import attach, gradients, run
from tests.mechanisms.test_checkpointing import checkpoint
from tests.models import tiny

METHOD = "prompt_tuning[prompt_length=3]"
CHECKPOINTED = {
    "bert": "BertForSequenceClassification",
    "llama": "LlamaForCausalLM",
    "t5": "T5ForConditionalGeneration",
    "vit": "ViTForImageClassification",
    "whisper": "WhisperForConditionalGeneration",
}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("row", ["bert", "llama", "t5", "vit"])
def test_attach_before_and_after_the_first_compiled_call(row: str) -> None:
    given, twin = tiny.inputs(row), tiny.build(row)
    bare = run(twin, given)
    attach(twin, METHOD)
    expected = run(twin, given)
    assert not torch.allclose(expected, bare, atol=1e-2)

    model = tiny.build(row)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(run(compiled, given), bare, rtol=1e-4, atol=1e-5)
    kit = attach(model, METHOD)
    torch.testing.assert_close(run(compiled, given), expected, rtol=1e-4, atol=1e-5)
    kit.activate(None)
    torch.testing.assert_close(run(compiled, given), bare, rtol=1e-4, atol=1e-5)
    kit.activate("a")
    torch.testing.assert_close(run(compiled, given), expected, rtol=1e-4, atol=1e-5)
    kit.detach()
    torch.testing.assert_close(run(compiled, given), bare, rtol=1e-4, atol=1e-5)

    torch._dynamo.reset()
    model = tiny.build(row)
    attach(model, METHOD)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(compiled, given), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not"])
@pytest.mark.parametrize("row", CHECKPOINTED)
def test_gradients_are_those_without_checkpointing(row: str, reentrant: bool) -> None:
    cls = CHECKPOINTED[row]
    given = tiny.inputs(row, cls, labels=True)

    def model(checkpointed: bool) -> nn.Module:
        built = tiny.build(row, cls).train()
        attach(built, METHOD)
        if checkpointed:
            checkpoint(built, reentrant)
        return built

    expected, found = gradients(model(False), given), gradients(model(True), given)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert gradient is not None and gradient.any()
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("row", ["bert", "t5", "vit"])
def test_copies_and_pickles_give_the_same_bits(row: str) -> None:
    model, given = tiny.build(row), tiny.inputs(row)
    attach(model, METHOD)
    expected = run(model, given)
    assert torch.equal(run(copy.deepcopy(model), given), expected)
    assert torch.equal(run(pickle.loads(pickle.dumps(model)), given), expected)


@pytest.mark.parametrize("row", ["bert", "llama", "t5", "vit", "whisper"])
def test_two_prompts_of_other_lengths_do_not_disturb_each_other(row: str) -> None:
    model, given = tiny.build(row), tiny.inputs(row)
    kit = attach(model, METHOD, "a")
    alone = run(model, given)
    attach(model, "prompt_tuning[prompt_length=5,position=after_first]", "b", seed=1)
    other = run(model, given)
    assert not torch.allclose(other, alone, atol=1e-3)
    kit.activate("a")
    assert torch.equal(run(model, given), alone)
    kit.detach("a")
    kit.activate("b")
    assert torch.equal(run(model, given), other)


@pytest.mark.parametrize("row", ["bert", "llama", "t5", "vit"])
def test_a_union_with_lora_is_both(row: str) -> None:
    given, model = tiny.inputs(row), tiny.build(row)
    kit = attach(model, f"{METHOD}|lora")
    gradient = gradients(model, given)
    assert any(name.endswith(".embeds") for name in gradient)
    assert all(found is not None and found.any() for found in gradient.values())
    assert run(model, given).shape == run(tiny.build(row), given).shape
    assert kit.active == "a"


def test_masks_that_a_stack_makes_of_other_masks() -> None:
    """Of a mask of samples the model makes one of frames behind its entry, which lacks the prompt."""
    widths = {"conv_dim": (16,), "conv_stride": (2,), "conv_kernel": (3,), "num_feat_extract_layers": 1}
    convolved = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
    model = transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**sizes, **widths, **convolved)).eval()
    ak.attach(model, "prompt_tuning[prompt_length=4]")
    samples, mask = torch.randn(2, 64), torch.ones(2, 64, dtype=torch.long)
    assert model(samples).last_hidden_state.shape[1] == 31
    mask[1, 40:] = 0
    with pytest.raises(PlanError) as refused:
        model(samples, attention_mask=mask)
    assert refused.value.code == "unfit-input"
