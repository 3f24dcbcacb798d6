"""Invertible adapters in models: where both ends are, that they undo each other, where they are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.errors import PlanError
from tests.laws.branch_cases import NOT_INVERTIBLE, BranchCase, randomise
from tests.laws.matrix import run
from tests.models import tiny
from tests.oracles import invertible

SMOOTH = {"method": "invertible", "non_linearity": "gelu"}
# family -> class, module behind which it acts, width there: read off the modeling files
PLACES = {
    "bert": ("BertForMaskedLM", "bert.embeddings.dropout", 32),
    "albert": ("AlbertForMaskedLM", "albert.embeddings.dropout", 16),
    "electra": ("ElectraForMaskedLM", "electra.embeddings.dropout", 16),
    "llama": ("LlamaForCausalLM", "model.embed_tokens", 32),
    "gpt2": ("GPT2LMHeadModel", "transformer.drop", 32),
    "t5": ("T5ForConditionalGeneration", "encoder.embed_tokens", 32),
    "bart": ("BartForConditionalGeneration", "model.encoder.layernorm_embedding", 32),
}
COUPLINGS = pytest.mark.parametrize("coupling", ["nice", "glow"])


def replace_output(module: nn.Module, new: Any) -> Any:
    return module.register_forward_hook(lambda _, args, out: new(out))


@COUPLINGS
@pytest.mark.parametrize("row", PLACES)
def test_the_model_computes_what_hand_patched_ends_compute(row: str, coupling: str) -> None:
    cls, path, width = PLACES[row]
    model, plain = tiny.build(row, cls, dtype=torch.float64), tiny.build(row, cls, dtype=torch.float64)
    given = tiny.inputs(row, cls, padded=False)
    kit = ak.attach(model, {**SMOOTH, "coupling": coupling}, seed=0)
    randomise(kit)
    (shared,) = {name.split(".")[2] for name in kit["default"].state_dict()}
    t = {name.split(".", 3)[3]: tensor.detach() for name, tensor in kit["default"].state_dict().items()}
    assert shared == "encoder" if row not in ("llama", "gpt2") else "decoder"
    assert t["F.down.weight"].shape[1] == width // 2
    oracle = invertible.nice if coupling == "nice" else invertible.glow
    replace_output(plain.get_submodule(path), lambda out: oracle(out, t, "gelu"))
    end = plain.get_output_embeddings()
    end.register_forward_pre_hook(lambda _, args: (undo(oracle, t, args[0]),))
    found, expected = run(model, given), run(plain, given)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def undo(oracle: Any, t: dict[str, Tensor], y: Tensor) -> Tensor:
    """x with oracle(x) = y, by halves: each coupling is affine in the half that it moves."""
    half = y.shape[-1] // 2
    zero, one = torch.zeros_like(y[..., :half]), torch.ones_like(y[..., :half])

    def affine(name: str, seen: Tensor, moved: Tensor) -> Tensor:
        own = {f"F{k[1:]}": v for k, v in t.items() if k.startswith(name)}
        own |= {f"G{k[1:]}": v * 0 for k, v in t.items() if k.startswith("F")}

        def first(x: Tensor) -> Tensor:
            return oracle(torch.cat([x, seen], -1), own, "gelu")[..., :half]

        shift = first(zero)
        return (moved - shift) / (first(one) - shift)

    second = affine("G", y[..., :half], y[..., half:])
    return torch.cat([affine("F", second, y[..., :half]), second], -1)


@pytest.mark.parametrize(("cls", "variant"), NOT_INVERTIBLE)
def test_where_it_has_no_place(cls: str, variant: str) -> None:
    row = "whisper" if cls.startswith("Whisper") else "encoder_decoder"
    case = BranchCase(row, cls, "glow", variant)
    with pytest.raises(PlanError) as refused:
        case.attach(case.model())
    assert refused.value.code == NOT_INVERTIBLE[cls, variant]


def test_two_widths_without_the_inverse() -> None:
    case = BranchCase("encoder_decoder", "EncoderDecoderModel", "glow", "roberta-gpt2")
    kit = ak.attach(case.model(), {**SMOOTH, "inverse": False}, seed=0)
    assert list(kit["default"].plan.counts) == ["encoder/encoder.embeddings"]
    assert kit["default"].plan.slots[0].shape == (48, 48)


def test_an_inverse_that_is_asked_for_and_has_no_place() -> None:
    with pytest.raises(PlanError) as refused:
        ak.attach(tiny.build("bert"), {**SMOOTH, "inverse": True})
    assert refused.value.code == "no-unembedding"


@pytest.mark.parametrize("name", ["seq_bn_inv", "double_seq_bn_inv"])
def test_presets_are_unions(name: str) -> None:
    kit = ak.attach(tiny.build("bert", "BertForMaskedLM"), name, seed=0)
    methods = [config.method for config in kit["default"].config.configs]
    assert methods == ["bottleneck", "invertible"]
    places = {slot.address for slot in kit["default"].plan.slots}
    assert {"1:encoder.embeddings", "1:encoder.unembed"} <= places
    assert ("0:encoder.0.attention" in places) == (name == "double_seq_bn_inv")
