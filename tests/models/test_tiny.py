"""The table itself: every class builds, runs, is deterministic, and does not see padding."""

from __future__ import annotations

import importlib

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from tests.models import tiny

CASES = [
    pytest.param(name, cls, id=f"{name}-{cls}") for name, row in tiny.ROWS.items() for cls in row.classes
]
VARIANTS = [
    pytest.param(name, variant, id=f"{name}-{variant}")
    for name, row in tiny.ROWS.items()
    for variant in row.variants
]

# Public names that are no heads of the family: old aliases, a feature extractor, the image-and-text models.
NOT_IN_TABLE = {
    "bart": {"BartPretrainedModel", "PretrainedBartModel"},
    "beit": {"BeitBackbone"},
    "gemma3_text": {
        "Gemma3Model",
        "Gemma3ForConditionalGeneration",
        "Gemma3ForSequenceClassification",
    },
}
# Learned positions count from the start of the row, padding included, unless position_ids say otherwise.
ABSOLUTE_POSITIONS = {"gpt2"}


# an old note of transformers about the loss of models made of two
pytestmark = pytest.mark.filterwarnings("ignore:Version v4.12.0 introduces a better way:FutureWarning")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def need(row: str, cls: str) -> None:
    if cls not in tiny.classes(row):
        pytest.skip(f"transformers {transformers.__version__} has no {cls}")


@pytest.mark.parametrize("row", [name for name in tiny.ROWS if name != "custom"])
def test_no_public_class_is_forgotten(row: str) -> None:
    module = importlib.import_module(tiny.model_class(row).__module__)
    public = {name for name in module.__all__ if not name.endswith("PreTrainedModel")}
    models = {name for name in public if issubclass(getattr(module, name), PreTrainedModel)}
    assert models - NOT_IN_TABLE.get(row, set()) <= set(tiny.ROWS[row].classes)


@pytest.mark.parametrize(("row", "cls"), CASES)
def test_runs(row: str, cls: str) -> None:
    need(row, cls)
    model = tiny.build(row, cls)
    given = tiny.inputs(row, cls)
    first = tiny.output(model(**given))
    assert first.isfinite().all()
    assert first.std() > 1e-3
    assert not model.training
    again = tiny.output(tiny.build(row, cls)(**tiny.inputs(row, cls)))
    assert torch.equal(first, again)
    other = tiny.output(tiny.build(row, cls, seed=1)(**given))
    assert not torch.allclose(first, other, atol=1e-3)


@pytest.mark.parametrize(("row", "cls"), CASES)
def test_loss(row: str, cls: str) -> None:
    need(row, cls)
    given = tiny.inputs(row, cls, labels=True)
    if set(given) == set(tiny.inputs(row, cls)):
        pytest.skip("takes no labels")
    result = tiny.build(row, cls)(**given)
    assert result["loss"].dim() == 0
    assert result["loss"].isfinite()
    result["loss"].backward()


@pytest.mark.parametrize(("row", "cls"), CASES)
def test_padding_changes_nothing(row: str, cls: str) -> None:
    """The second example of a batch, which has padding, gives the same alone and without it."""
    need(row, cls)
    given = tiny.inputs(row, cls)
    masks = {
        name.removesuffix("attention_mask"): value for name, value in given.items() if name.endswith("mask")
    }
    if row in ABSOLUTE_POSITIONS or not masks:
        pytest.skip("padding is seen" if masks else "takes no mask")
    alone = {}
    for name, value in given.items():
        side = name.removesuffix("attention_mask").removesuffix("input_ids")
        keep = masks[side][1].reshape(-1, value.shape[-1])[0].bool() if side in masks else slice(None)
        alone[name] = value[1:2][..., keep]
    model = tiny.build(row, cls)
    whole, short = tiny.fields(model(**given)), tiny.fields(model(**alone))
    for name in set(whole) - {"logits_per_image", "logits_per_text"}:
        expected, got = short[name], whole[name][1:2]
        if got.shape != expected.shape:
            length = expected.shape[1]
            got = got[:, -length:] if tiny.ROWS[row].kind == "decoder" else got[:, :length]
        assert torch.allclose(got, expected, atol=1e-5), name


@pytest.mark.parametrize(("row", "cls"), [case for case in CASES if tiny.can_generate(*case.values)])
def test_generates(row: str, cls: str) -> None:
    need(row, cls)
    model = tiny.build(row, cls)
    tokens = model.generate(**tiny.inputs(row, cls), max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert tokens.shape[0] == 2


@pytest.mark.parametrize(("row", "variant"), VARIANTS)
def test_variants(row: str, variant: str) -> None:
    changed = tiny.build(row, **tiny.ROWS[row].variants[variant])
    given = tiny.inputs(row)
    result = tiny.output(changed(**given))
    assert result.isfinite().all()
    assert not torch.allclose(result, tiny.output(tiny.build(row)(**given)), atol=1e-3)


def test_attention_and_dtype_are_chosen() -> None:
    for row in ("bart", "bert", "clip", "encoder_decoder", "llama"):
        given = tiny.inputs(row, padded=False)
        eager, fused = (tiny.build(row, attn=attn) for attn in ("eager", "sdpa"))
        for model, attn in ((eager, "eager"), (fused, "sdpa")):
            parts = [part for part in model.modules() if hasattr(part, "config")]
            assert {part.config._attn_implementation for part in parts} == {attn}
        assert torch.allclose(tiny.output(eager(**given)), tiny.output(fused(**given)), atol=1e-4)
    assert {p.dtype for p in tiny.build("custom", dtype=torch.float64).parameters()} == {torch.float64}


def test_ties_stay_tied() -> None:
    model = tiny.build("bert", "BertForMaskedLM")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_batches_are_padded_on_the_right_side() -> None:
    assert tiny.inputs("bert")["attention_mask"].tolist() == [[1] * 7, [1] * 5 + [0] * 2]
    assert tiny.inputs("llama")["attention_mask"].tolist() == [[1] * 7, [0] * 2 + [1] * 5]
    assert tiny.inputs("t5")["decoder_attention_mask"].tolist() == [[1] * 5, [1] * 3 + [0] * 2]
    for row in ("bart", "gpt2"):
        given = tiny.inputs(row, batch=4)
        assert torch.equal(given["input_ids"] == tiny.ROWS[row].pad, given["attention_mask"] == 0)
    assert tiny.inputs("bert", padded=False)["attention_mask"].all()
