"""Files made with another class, or another version of transformers, find their modules."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor

import adapterkit as ak
from adapterkit.errors import FileFormatError
from tests.files.peft_side import NOISE, codes, edit, put, run, same, tensors, theirs
from tests.models.tiny import build, inputs

pytestmark = NOISE

# row, the class with the longer paths, the class with the shorter ones, targets
RELATIVES = [
    ("bert", "BertForMaskedLM", "BertModel", ["query", "intermediate.dense"]),
    ("llama", "LlamaForCausalLM", "LlamaModel", ["q_proj", "down_proj"]),
    ("gpt2", "GPT2LMHeadModel", "GPT2Model", ["c_attn", "mlp.c_proj"]),
    ("t5", "T5ForTokenClassification", "T5EncoderModel", ["q", "wo"]),
    ("albert", "AlbertForMaskedLM", "AlbertModel", ["query", "ffn_output"]),
]


def deltas(model: torch.nn.Module) -> dict[str, Tensor]:
    """Output tensors of the adapter by the end of their address, whatever the class."""
    return ak.of(model)["default"].state_dict()


@pytest.mark.parametrize(("row", "long", "short", "targets"), RELATIVES)
def test_a_file_of_a_class_with_a_head_fits_the_base_model_and_back(
    row: str, long: str, short: str, targets: list[str], tmp_path: Path
) -> None:
    theirs(row, long, peft.LoraConfig(target_modules=targets), tmp_path / "long")
    named = tensors(tmp_path / "long")
    base = build(row, short)
    ak.load(base, tmp_path / "long", head=False)
    whole = build(row, long)
    ak.load(whole, tmp_path / "long", head=False)
    assert deltas(base).keys() == deltas(whole).keys()
    assert all(torch.equal(deltas(base)[key], deltas(whole)[key]) for key in deltas(base))
    assert len(deltas(base)) == len(named)
    theirs(row, short, peft.LoraConfig(target_modules=targets), tmp_path / "short")
    again = build(row, long)
    ak.load(again, tmp_path / "short", head=False)
    assert deltas(again).keys() == deltas(base).keys()


def test_the_base_model_computes_what_the_class_with_a_head_computed(tmp_path: Path) -> None:
    """Same base weights, same adapter: the states below the head are the same."""
    row, long = "llama", "LlamaForCausalLM"
    theirs(row, long, peft.LoraConfig(target_modules=["q_proj", "up_proj"]), tmp_path)
    whole, base = build(row, long), build(row, "LlamaModel")
    base.load_state_dict(whole.model.state_dict())
    ak.load(whole, tmp_path)
    ak.load(base, tmp_path)
    given = inputs(row, long)
    with torch.no_grad():
        want = whole(**given, output_hidden_states=True).hidden_states[-1]
        same(base(**given).last_hidden_state, want)


# names before and after transformers renamed the modules; either may be those of the installed version
RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
}
LAYERS = ("encoder.layer.", "layers.")


@pytest.mark.parametrize(
    ("row", "cls"), [("vit", "ViTForImageClassification"), ("beit", "BeitForImageClassification")]
)
def test_names_of_older_and_newer_versions_are_known(row: str, cls: str, tmp_path: Path) -> None:
    model = build(row, cls)
    # longest first: the end of one name is another name
    here = [n for n in (*RENAMED, *RENAMED.values()) if any(p.endswith(n) for p, _ in model.named_modules())]
    want = theirs(row, cls, peft.LoraConfig(target_modules=here), tmp_path)
    old = here[0] in RENAMED
    names = RENAMED if old else {new: before for before, new in RENAMED.items()}
    layers = LAYERS if any(LAYERS[0] in p for p, _ in model.named_modules()) else LAYERS[::-1]
    renamed = {}
    for key, value in tensors(tmp_path).items():
        name = next(n for n in sorted(names, key=len, reverse=True) if f".{n}.lora" in key)
        renamed[key.replace(f".{name}.lora", f".{names[name]}.lora").replace(*layers)] = value
    assert renamed.keys().isdisjoint(tensors(tmp_path))
    put(tmp_path, renamed)
    edit(tmp_path, target_modules=list(names.values()))
    ak.load(model, tmp_path, head=False)
    same(run(model, row, cls), want)


def test_a_name_of_another_structure_is_no_name(tmp_path: Path) -> None:
    """T5's gated MLP has other matrices than the plain one: `wi_1` must not pass for `wi`."""
    theirs("t5", None, peft.LoraConfig(target_modules=["wi_1"]), tmp_path, feed_forward_proj="gated-gelu")
    with pytest.raises(FileFormatError) as caught:
        ak.load(build("t5"), tmp_path)
    assert codes(caught.value) == {"no-such-slot"}
