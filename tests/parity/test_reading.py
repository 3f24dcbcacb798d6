"""What a file of AdapterHub becomes: at which slots, with which tensors and options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import adapterkit as ak
from tests.models import tiny
from tests.parity.compare import base, outputs, stored
from tests.parity.editing import Tensors, edited, without
from tests.parity.recordings import ALONE, COMPACT, Case, cases, refusal

BERT = Case(COMPACT, "bert", "BertModel", "lora_all")


# -------------------------------------------------------------------------------------------- where it goes


def adapted(kit: ak.Kit) -> Tensors:
    return kit["a"].state_dict()


@pytest.mark.parametrize(
    ("there", "here"),
    [
        (BERT, "BertForMaskedLM"),
        (Case(COMPACT, "bert", "BertForSequenceClassification", "lora"), "BertModel"),
        (Case(COMPACT, "bert", "BertForMaskedLM", "vera"), "BertModel"),
        (Case(COMPACT, "bart", "BartModel", "lora_all"), "BartForConditionalGeneration"),
        (Case(COMPACT, "bart", "BartForConditionalGeneration", "lora"), "BartModel"),
        (Case(COMPACT, "llama", "LlamaForCausalLM", "lora"), "LlamaForSequenceClassification"),
        (Case(COMPACT, "vit", "ViTForImageClassification", "lora"), "ViTModel"),
        (Case(COMPACT, "clip", "CLIPVisionModel", "lora"), "CLIPVisionModelWithProjection"),
    ],
    ids=str,
)
def test_the_class_may_be_another(there: Case, here: str, tmp_path: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(there.base)
    model = getattr(transformers, here)(config)
    directory = edited(there, tmp_path)
    same = adapted(ak.load(base(there, "eager"), directory, head=False))
    other = adapted(ak.load(model, directory, head=False))
    assert same.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in same.items())


@pytest.mark.parametrize(
    ("case", "left_out", "gone", "layers"),
    [
        # encoder 0 and 1, then decoder 2 and 3
        (Case(COMPACT, "t5", "T5Model", "lora_all"), [0, 2], r"block\.0\.", ("encoder.0", "decoder.0")),
        (Case(COMPACT, "t5", "T5Model", "lora_all"), [3], r"^decoder.block\.1\.", ("decoder.1",)),
        # text 0 and 1, then vision 2, 3 and 4
        (Case(COMPACT, "clip", "CLIPModel", "lora_all"), [4], r"^vision_model.*layers\.2\.", ("vision.2",)),
        # each model counts from 0
        (
            Case(COMPACT, "encoder-decoder", "EncoderDecoderModel", "lora_all"),
            [1],
            r"layer\.1\.",
            ("encoder/encoder.1", "decoder/encoder.1"),
        ),
    ],
    ids=str,
)
def test_numbers_of_layers(
    case: Case, left_out: list[int], gone: str, layers: tuple[str, ...], tmp_path: Path
) -> None:
    directory = edited(case, tmp_path, config={"leave_out": left_out}, tensors=without(gone))
    kit = ak.load(base(case, "eager"), directory, head=False)
    assert kit["a"].config.leave_out == layers
    whole = ak.load(base(case, "eager"), edited(case, tmp_path), head=False)
    before = {slot.address for slot in whole["a"].plan.slots}
    kept = {address for address in before if not address.startswith(tuple(f"{layer}." for layer in layers))}
    assert {slot.address for slot in kit["a"].plan.slots} == kept < before


def test_up_and_down_are_swapped_where_theirs_are(tmp_path: Path) -> None:
    case = Case(COMPACT, "llama", "LlamaModel", "ia3_all")
    directory = edited(case, tmp_path, config={"output_lora": False}, tensors=without("up_proj"))
    kit = ak.load(base(case, "eager"), directory, head=False)
    theirs = stored(directory)["layers.0.mlp.down_proj.loras.a.lora_B"]
    assert torch.equal(adapted(kit)["decoder.0.mlp.down.scale"], theirs[:, 0])
    assert {slot.role for slot in kit["a"].plan.slots if slot.sublayer == "mlp"} == {"down"}


def test_thirds_of_a_matrix_fused_per_head_become_one_update(tmp_path: Path) -> None:
    case = Case(COMPACT, "deberta", "DebertaModel", "lora")
    directory = edited(case, tmp_path)
    kit = ak.load(base(case, "eager"), directory, head=False)
    theirs, found = stored(directory), adapted(kit)
    host = "encoder.layer.0.attention.self.in_proj.loras.a"
    a, b = theirs[f"{host}.lora_A"], theirs[f"{host}.lora_B"]
    delta = torch.zeros(96, 32)
    delta[:32] = b[:32] @ a[:8]  # what they call q
    delta[64:] = b[32:] @ a[8:]  # what they call v
    ours = found["encoder.0.attention.fused.B"] @ found["encoder.0.attention.fused.A"]
    assert torch.allclose(ours, delta, atol=1e-6)
    assert kit["a"].units["encoder.0.attention.fused"].scaling == 1  # alpha / r of the file


def test_alpha_scales_all_rows_of_a_fused_matrix(tmp_path: Path) -> None:
    case = Case(COMPACT, "gpt2", "GPT2Model", "ia3_alpha2")
    found = adapted(ak.load(base(case, "eager"), edited(case, tmp_path), head=False))
    assert torch.equal(found["decoder.0.attention.q.scale"], torch.ones(32))


# -------------------------------------------------------------------------------------------- and back again


def selecting() -> list[Any]:
    """Recorded adapters; of the family that has all methods, in the full run alone."""
    found = [case for case in cases(COMPACT, ALONE) if not refusal(case)]
    return [
        pytest.param(case, id=str(case), marks=pytest.mark.full if case.family == "bert" else ())
        for case in found
    ]


@pytest.mark.parametrize("case", selecting())
def test_the_config_selects_what_the_file_adapts(case: Case, tmp_path: Path) -> None:
    kit = ak.load(base(case, "eager"), edited(case, tmp_path), head=False)
    assert kit.plan(kit["a"].config, head=False).slots == kit["a"].plan.slots


@pytest.mark.parametrize(
    "case",
    [
        Case(COMPACT, "deberta", "DebertaModel", "lora_all"),
        Case(COMPACT, "encoder-decoder", "EncoderDecoderModel", "vera"),
        Case(COMPACT, "gpt2", "GPT2Model", "ia3_alpha2"),
        Case(COMPACT, "bert", "BertModel", "dvora"),
        Case(COMPACT, "bert", "BertModel", "dora_all"),
        Case(COMPACT, "bert", "BertModel", "lora_gating"),
        Case(COMPACT, "bert", "BertModel", "unipelt"),
        Case(COMPACT, "encoder-decoder", "EncoderDecoderModel", "prefix_no_cross"),
        Case(COMPACT, "xmod", "XmodModel", "prefix_tuning"),
    ],
    ids=str,
)
def test_in_our_own_format_it_stays_the_same(case: Case, tmp_path: Path) -> None:
    model, again = base(case, "eager"), base(case, "eager")
    ak.load(model, edited(case, tmp_path), head=False).save(tmp_path / "own")
    ak.load(again, tmp_path / "own", head=False)
    inputs = load_file(case.base / "inputs.safetensors")
    with torch.no_grad():
        first, second = outputs(model(**inputs)), outputs(again(**inputs))
    assert all(torch.equal(value, second[key]) for key, value in first.items())


# -------------------------------------------------------------------------------- files of older versions


@pytest.mark.parametrize(
    ("version", "alpha"),
    [
        ("adapters.0.2.2", 3),
        ("adapters.1.0.1", 3),
        ("adapters.1.1.0.dev0", 3),
        ("adapters.1.1.0", 9),
        ("adapters.1.3.0", 9),
        ("3.2.1", 9),
    ],
)
def test_a_lora_from_before_its_scale_was_used(version: str, alpha: float, tmp_path: Path) -> None:
    """r is 3 and alpha 9; what theirs makes of it is in adapters 1.3.0, loading.py, _fix_backward_compat."""
    kit = ak.load(tiny.build("bert", "BertModel"), edited(BERT, tmp_path, version=version), head=False)
    assert kit["a"].config.alpha == alpha


def test_an_activation_from_before_versions(tmp_path: Path) -> None:
    case = Case(COMPACT, "bert", "BertModel", "bn_gating")
    directory = edited(case, tmp_path)
    file = directory / "adapter_config.json"
    said = json.loads(file.read_text())
    assert said["config"]["non_linearity"] == "gelu"
    assert ak.load(base(case, "eager"), directory, head=False)["a"].config.non_linearity == "gelu"
    del said["version"]
    file.write_text(json.dumps(said))
    assert ak.load(base(case, "eager"), directory, head=False)["a"].config.non_linearity == "gelu_new"


def test_modules_under_their_old_names(tmp_path: Path) -> None:
    case = Case(COMPACT, "bert", "BertModel", "double_seq_bn")

    def old(tensors: Tensors) -> Tensors:
        new = {}
        for key, value in tensors.items():
            kind = "attention" if ".attention." in key else "layer"
            new[key.replace(".adapters.", f".{kind}_text_task_adapters.")] = value
        return new

    same = adapted(ak.load(base(case, "eager"), edited(case, tmp_path), head=False))
    other = adapted(ak.load(base(case, "eager"), edited(case, tmp_path, tensors=old), head=False))
    assert all(torch.equal(value, other[key]) for key, value in same.items())
