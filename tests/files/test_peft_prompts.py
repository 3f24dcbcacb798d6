"""Prompts of PEFT on causal language models: the same logits both ways, padded on either side, and texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.errors import FileFormatError
from tests.files.peft_side import NOISE, codes, edit, put, shake, tensors
from tests.models import tiny
from tests.models.tiny import build, inputs

pytestmark = [
    *NOISE,
    pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning"),
]
LENGTH = 4
DEFAULT = ("bert", "gemma2", "gpt2", "llama", "roberta", "whisper")
CAUSAL = [
    pytest.param(row, cls, marks=() if row in DEFAULT else pytest.mark.full)
    for row in tiny.ROWS
    for cls in tiny.classes(row)
    # PEFT makes its prompt as wide as the states, not as the table of embeddings
    if ("CausalLM" in cls or "LMHead" in cls) and row != "electra"
]


def given(row: str, cls: str, padding: str) -> dict[str, Tensor]:
    found = inputs(row, cls)
    mask = torch.ones_like(found["input_ids"])
    if padding == "left":
        mask[1, :2] = 0
    elif padding == "right":
        mask[1, -2:] = 0
    return {**found, "attention_mask": mask}


def config(**options: Any) -> peft.PromptTuningConfig:
    return peft.PromptTuningConfig(**{"task_type": "CAUSAL_LM", "num_virtual_tokens": LENGTH, **options})


def wrapped(row: str, cls: str, directory: Path) -> nn.Module:
    """A random prompt of PEFT, saved."""
    model = peft.get_peft_model(build(row, cls), config()).eval()
    shake(model.prompt_encoder.parameters())
    model.save_pretrained(directory)
    return model


def same(theirs: nn.Module, ours: nn.Module, row: str, cls: str) -> None:
    bare = build(row, cls).eval()
    for padding in ("left", "right", "none"):
        inputs = given(row, cls, padding)
        seen = inputs["attention_mask"].bool()
        with torch.no_grad():
            expected, found = theirs(**inputs).logits[:, LENGTH:], ours.eval()(**inputs).logits
            plain = bare(**inputs).logits
        torch.testing.assert_close(found[seen], expected[seen], rtol=0, atol=1e-5)
        assert (found[seen] - plain[seen]).abs().max() > 1e-2


@pytest.mark.parametrize(("row", "cls"), CAUSAL)
def test_a_prompt_of_peft_gives_the_same_logits(row: str, cls: str, tmp_path: Path) -> None:
    theirs = wrapped(row, cls, tmp_path / "theirs")
    kit = ak.load(build(row, cls), tmp_path / "theirs")
    same(theirs, kit.model, row, cls)
    kit.save(tmp_path / "again", format="peft")
    assert torch.equal(*(tensors(tmp_path / name)["prompt_embeddings"] for name in ("theirs", "again")))


@pytest.mark.parametrize(("row", "cls"), CAUSAL)
def test_peft_reads_a_prompt_with_the_same_logits(row: str, cls: str, tmp_path: Path) -> None:
    model = build(row, cls)
    kit = ak.attach(model, f"prompt_tuning[prompt_length={LENGTH}, before_padding=true]", seed=1)
    kit.save(tmp_path / "ours", format="peft")
    same(peft.PeftModel.from_pretrained(build(row, cls), tmp_path / "ours").eval(), model, row, cls)


@pytest.mark.parametrize("row", ["gpt2", "llama", "gemma2", "phi"])
def test_the_same_text_is_generated(row: str, tmp_path: Path) -> None:
    """PEFT without a cache: with one, under newer transformers, it puts the prompt in at every step."""
    cls = next(param.values[1] for param in CAUSAL if param.values[0] == row)
    theirs = wrapped(row, cls, tmp_path / "theirs")
    ours = ak.load(build(row, cls).eval(), tmp_path / "theirs").model
    wanted: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    wanted |= {"return_dict_in_generate": True, "output_logits": True}
    for padding in ("left", "none"):
        inputs = given(row, cls, padding)
        expected = torch.stack(theirs.generate(**inputs, use_cache=False, **wanted).logits)
        for cached in (True, False):
            found = torch.stack(ours.generate(**inputs, use_cache=cached, **wanted).logits)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def refused(directory: Path, row: str = "llama", cls: str = "LlamaForCausalLM") -> FileFormatError:
    model = build(row, cls)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(FileFormatError) as error:
        ak.load(model, directory)
    assert before.keys() == model.state_dict().keys()
    return error.value


FIELDS = {
    "another task": {"task_type": "SEQ_CLS"},
    "no task": {"task_type": None},
    "two stacks": {"num_transformer_submodules": 2},
}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS.keys())
def test_prompts_of_other_models_are_refused(fields: dict[str, Any], tmp_path: Path) -> None:
    wrapped("llama", "LlamaForCausalLM", tmp_path)
    edit(tmp_path, **fields)
    assert refused(tmp_path).code == "peft-prompt"


def test_a_model_of_two_stacks_is_refused(tmp_path: Path) -> None:
    wrapped("llama", "LlamaForCausalLM", tmp_path)
    assert refused(tmp_path, "t5", "T5ForConditionalGeneration").code == "peft-prompt"


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    wrapped("llama", "LlamaForCausalLM", tmp_path)
    vectors = tensors(tmp_path)["prompt_embeddings"]
    for named, code in (
        ({"prompt_embeddings": vectors[:, :-1].contiguous()}, {"other-shape"}),
        ({"prompt_embeddings": vectors[:-1].contiguous()}, {"other-shape"}),
        ({"prompt_embeddings": vectors, "more": vectors.clone()}, {"unknown-tensors"}),
        ({"more": vectors}, {"unknown-tensors", "missing-tensors"}),
    ):
        put(tmp_path, named)
        assert codes(refused(tmp_path)) == code


@pytest.mark.parametrize(
    ("row", "cls", "options"),
    [
        ("llama", "LlamaForCausalLM", ""),
        ("llama", "LlamaForCausalLM", ", keep_positions=true, before_padding=true"),
        ("llama", "LlamaModel", ", before_padding=true"),
        ("bert", "BertForSequenceClassification", ", before_padding=true"),
        ("t5", "T5ForConditionalGeneration", ", before_padding=true"),
        ("vit", "ViTModel", ""),
    ],
)
def test_what_peft_would_compute_otherwise(row: str, cls: str, options: str, tmp_path: Path) -> None:
    kit = ak.attach(build(row, cls), f"prompt_tuning[prompt_length=3{options}]")
    with pytest.raises(FileFormatError) as error:
        kit.save(tmp_path / "ours", format="peft")
    assert error.value.code == "peft-prompt"
    assert not (tmp_path / "ours").exists()
