"""ReFT in models: against layers patched by hand, with padding, and in generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.author.tiny import build
from tests.laws.branch_cases import randomise
from tests.laws.matrix import run
from tests.models import tiny
from tests.oracles import reft

# family -> {stack: path of its layers}, and the mask that the stack is given
FAMILIES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "bert": ({"encoder": "encoder.layer"}, {"encoder": "attention_mask"}),
    "llama": ({"decoder": "layers"}, {"decoder": "attention_mask"}),
    "gptj": ({"decoder": "h"}, {"decoder": "attention_mask"}),
    "t5": (
        {"encoder": "encoder.block", "decoder": "decoder.block"},
        {"encoder": "attention_mask", "decoder": "decoder_attention_mask"},
    ),
    "bart": (
        {"encoder": "encoder.layers", "decoder": "decoder.layers"},
        {"encoder": "attention_mask", "decoder": "decoder_attention_mask"},
    ),
}
OPTIONS = [
    {"prefix_positions": 3},
    {"prefix_positions": 2, "suffix_positions": 2},
    {"prefix_positions": 4, "suffix_positions": 3, "tied_weights": True},
    {"prefix_positions": 0, "suffix_positions": 2},
    {"prefix_positions": 20, "into_padding": True},
]
KINDS = {"loreft": (True, True), "noreft": (False, True), "direft": (False, False)}


def edit(kit: ak.Kit, address: str, options: dict[str, Any], kind: str, mask: Tensor) -> Any:
    """Forward hook of a layer that edits what it gives, by the oracle."""
    orthogonal, subtract = KINDS[kind]
    state, units = kit["default"].state_dict(), {}
    for name in ("prefix", "suffix"):
        start = f"{address}.{name}."
        if f"{start}projection" in state:
            R = state[f"{start}projection"]
            units[name] = {
                "R": reft.orthonormal(R) if orthogonal else R,
                "W": state[f"{start}source.weight"],
                "b": state[f"{start}source.bias"],
            }
    units = {name: units.get(name, next(iter(units.values()))) for name in ("prefix", "suffix")}
    counts = options["prefix_positions"], options.get("suffix_positions", 0)

    def hook(module: nn.Module, args: Any, out: Any) -> Any:
        h = out[0] if isinstance(out, tuple) else out
        new = reft.reft(h, mask, units, *counts, subtract=subtract)
        return (new, *out[1:]) if isinstance(out, tuple) else new

    return hook


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("row", FAMILIES)
def test_layers_give_what_layers_edited_by_hand_give(row: str, options: dict[str, Any], kind: str) -> None:
    # a padded query that may look at nothing is NaN in llama's float64
    dtype = torch.float32 if row == "llama" else torch.float64
    model, plain = (tiny.build(row, dtype=dtype) for _ in range(2))
    given = tiny.inputs(row)
    bare = run(model, given)
    kit = ak.attach(model, {"method": kind, "r": 2, **options}, seed=0)
    randomise(kit)
    stacks, masks = FAMILIES[row]
    for stack, path in stacks.items():
        for index, layer in enumerate(plain.get_submodule(path)):
            mask = given[masks[stack]]
            mask = mask.cummax(dim=1).values if options.get("into_padding") else mask
            layer.register_forward_hook(edit(kit, f"{stack}.{index}.layer", options, kind, mask))
    found, expected = run(model, given), run(plain, given)
    near = 1e-5 if row == "llama" else 1e-9
    torch.testing.assert_close(found, expected, rtol=near, atol=near)
    assert (found - bare).abs().max() > 1e-2


GENERATE = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}


def logits(model: nn.Module, given: dict[str, Tensor], **options: Any) -> Tensor:
    out = model.generate(**given, **GENERATE, return_dict_in_generate=True, output_logits=True, **options)
    return torch.stack(out.logits)


@pytest.mark.parametrize("row", ["llama", "gptj", "qwen2", "gemma2"])
@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
def test_the_prompt_alone_is_edited_while_it_goes_on(row: str, options: dict[str, Any]) -> None:
    """Each example of a padded batch gives what it gives alone; a cache of fixed size changes nothing."""
    cls = next(cls for cls in tiny.classes(row) if tiny.can_generate(row, cls))
    model, given = tiny.build(row, cls), tiny.inputs(row, cls)
    randomise(ak.attach(model, {"method": "loreft", "r": 2, **options}, seed=0))
    whole = logits(model, given)
    for index in range(2):
        kept = given["attention_mask"][index].bool()
        alone = {key: value[index : index + 1, kept] for key, value in given.items()}
        torch.testing.assert_close(logits(model, alone)[:, 0], whole[:, index], rtol=1e-3, atol=1e-3)
    static = logits(model, given, cache_implementation="static", disable_compile=True)
    torch.testing.assert_close(static, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")  # older ones know no other name
def test_a_second_turn_under_a_cache_is_not_edited() -> None:
    model = tiny.build("llama", "LlamaForCausalLM")
    given = tiny.inputs("llama", padded=False)["input_ids"]
    kit = ak.attach(model, {"method": "loreft", "r": 2}, seed=0)
    randomise(kit)
    with torch.no_grad():
        first = model(given[:, :4], use_cache=True)
        second = model(given[:, 4:], past_key_values=first.past_key_values).logits
        whole = model(given).logits
    # the prefix lies in the first turn: both ways edit the same positions
    torch.testing.assert_close(second, whole[:, 4:], rtol=1e-4, atol=1e-5)


FRAMES = {
    "wav2vec2": "_get_feat_extract_output_lengths",
    "hubert": "_get_feat_extract_output_lengths",
    "wavlm": "_get_feat_extract_output_lengths",
    "wav2vec2-conformer": "_get_feat_extract_output_lengths",
    "data2vec-audio": "_get_feat_extract_output_lengths",
    "speech_to_text": "_get_feat_extract_output_lengths",
    "parakeet_encoder": "_get_subsampling_output_length",
}
"""Model types, and what transformers counts frames with."""


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # wavlm's own
@pytest.mark.parametrize("model_type", FRAMES)
def test_the_last_frames_are_those_of_each_sound(model_type: str) -> None:
    """The entry's mask is of samples; of a shorter sound the last frames lie before its padding."""
    model, inputs = build(model_type)
    kit = ak.attach(model, "loreft[r=2, prefix_positions=0, suffix_positions=2]", seed=0)
    randomise(kit)
    sound = next(iter(inputs.values()))
    lengths = torch.tensor([sound.shape[1], sound.shape[1] // 2])
    inputs["attention_mask"] = (torch.arange(sound.shape[1]) < lengths[:, None]).long()
    layer, seen = next(iter(kit.blueprint.stacks.values())).layers[0], []
    layer.register_forward_hook(lambda m, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(**inputs)
        with kit.disabled():
            model(**inputs)
    edited = (seen[0] - seen[1]).abs().amax(-1) > 1e-6
    count = getattr(model, FRAMES[model_type])
    wanted = torch.zeros_like(edited)
    for row, frames in enumerate(count(lengths).tolist()):
        wanted[row, frames - 2 : frames] = True
    assert edited.tolist() == wanted.tolist()


@pytest.mark.parametrize("model_type", ["idefics3_vision", "smolvlm_vision"])
def test_the_last_patches_are_those_of_each_image(model_type: str) -> None:
    model, inputs = build(model_type)
    kit = ak.attach(model, "loreft[r=2, prefix_positions=0, suffix_positions=2]", seed=0)
    randomise(kit)
    side = inputs["pixel_values"].shape[-1] // model.config.patch_size
    shown = torch.ones(2, side, side, dtype=torch.bool)
    shown[1, side // 2 :] = False
    layer, seen = kit.blueprint.stacks["vision"].layers[0], []
    layer.register_forward_hook(lambda m, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(inputs["pixel_values"], patch_attention_mask=shown)
        with kit.disabled():
            model(inputs["pixel_values"], patch_attention_mask=shown)
    edited = (seen[0] - seen[1]).abs().amax(-1) > 1e-6
    ends = (side * side, side * (side // 2))
    assert [row.nonzero().flatten().tolist() for row in edited] == [[end - 2, end - 1] for end in ends]


def test_dropout_acts_in_training_alone() -> None:
    given = tiny.inputs("bert", padded=False)
    kit = ak.attach(tiny.build("bert"), {"method": "noreft", "r": 2, "dropout": 0.5}, seed=0)
    assert torch.equal(run(kit.model, given), run(kit.model, given))
    kit.model.train()
    assert not torch.equal(run(kit.model, given), run(kit.model, given))
