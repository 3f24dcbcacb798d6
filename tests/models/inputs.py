"""Inputs and labels of the tiny models: random, seeded, shaped for the class that takes them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

SEQ, DECODER_SEQ, CHOICES, LABELS = 7, 5, 2, 3
IMAGE, PATCH, FRAMES, MELS = 8, 4, 14, 8
FIRST_TOKEN, LAST_TOKEN = 5, 60  # ids between them are never special in any family
IGNORED = -100


@dataclass(frozen=True)
class Shape:
    """What a class wants to be fed with, independent of how its model is built."""

    text: bool = False  # input_ids + attention_mask
    choices: bool = False  # ... with a dimension for the choices
    decoder: bool = False  # decoder_input_ids + decoder_attention_mask
    image: bool = False  # pixel_values
    patches: bool = False  # ... with bool_masked_pos
    audio: bool = False  # input_features
    states: int = 0  # encoder_outputs of that width
    left: bool = False  # where the padding goes
    pad: int = 0
    eos: int | None = None  # token that ends every text, where the family needs one


def mask(batch: int, length: int, *, padded: bool, left: bool) -> Tensor:
    """Attention mask; the first example of a batch is whole, the others are 2, 1, 3, 2, 1, 3, ... shorter."""
    short = [0] + [(2, 1, 3)[i % 3] for i in range(batch - 1)]
    keep = torch.arange(length) >= torch.tensor(short if padded else [0] * batch)[:, None]
    return (keep if left else keep.flip(1)).long()


def tokens(shape: Shape, attended: Tensor, generator: Generator, *, eos: bool) -> Tensor:
    ids = torch.randint(FIRST_TOKEN, LAST_TOKEN, attended.shape, generator=generator)
    if eos and shape.eos is not None:
        last = (attended * torch.arange(attended.shape[1])).argmax(1, keepdim=True)
        ids = ids.scatter(1, last, shape.eos)
    return ids.masked_fill(attended == 0, shape.pad)


def draw(shape: Shape, batch: int, *, padded: bool, generator: Generator) -> dict[str, Tensor]:
    """The inputs of a class with that shape, without labels."""
    found: dict[str, Tensor] = {}
    if shape.text:
        found["attention_mask"] = attended = mask(batch, SEQ, padded=padded, left=shape.left)
        if shape.choices:
            found["attention_mask"] = attended[:, None].repeat(1, CHOICES, 1)
            attended = attended.repeat_interleave(CHOICES, 0)
        ids = tokens(shape, attended, generator, eos=True)
        found["input_ids"] = ids.view(found["attention_mask"].shape)
    if shape.decoder:
        found["decoder_attention_mask"] = attended = mask(batch, DECODER_SEQ, padded=padded, left=False)
        found["decoder_input_ids"] = tokens(shape, attended, generator, eos=False)
    if shape.image:
        found["pixel_values"] = torch.randn(batch, 3, IMAGE, IMAGE, generator=generator)
    if shape.patches:
        picked = torch.arange((IMAGE // PATCH) ** 2) % 2 == 0
        found["bool_masked_pos"] = picked.repeat(batch, 1)
    if shape.audio:
        found["input_features"] = torch.randn(batch, MELS, FRAMES, generator=generator)
    if shape.states:
        found["encoder_outputs"] = torch.randn(batch, SEQ, shape.states, generator=generator)
    return found


def labels(
    cls: str, given: dict[str, Tensor], names: Collection[str], generator: Generator
) -> dict[str, Tensor]:
    """The labels that a class takes besides the given inputs; names are the parameters of its forward."""

    def pick(*size: int, classes: int = 2) -> Tensor:
        return torch.randint(0, classes, size, generator=generator)

    batch = next(iter(given.values())).shape[0]
    found = {
        name: pick(batch)
        for name in ("next_sentence_label", "sentence_order_label", "mc_labels")
        if name in names
    }
    if "start_positions" in names:
        first = given["attention_mask"].argmax(1)
        found |= {"start_positions": first + pick(batch), "end_positions": first + 2 + pick(batch)}
    if "return_loss" in names:
        found["return_loss"] = torch.tensor(True)
    if "labels" in names:
        found["labels"] = _labels(cls, given, pick)
    return found


def _labels(cls: str, given: dict[str, Tensor], pick: Callable[..., Tensor]) -> Tensor:
    batch = next(iter(given.values())).shape[0]
    if "SemanticSegmentation" in cls:
        return pick(batch, IMAGE, IMAGE, classes=LABELS)
    if "MaskedImageModeling" in cls:
        return pick(int(given["bool_masked_pos"].sum()), classes=LAST_TOKEN)
    if cls.endswith(("MultipleChoice", "NextSentencePrediction")):
        return pick(batch)
    if cls.endswith(("SequenceClassification", "ImageClassification", "AudioClassification", "Classifier")):
        return pick(batch, classes=LABELS)
    side = "decoder_" if "decoder_input_ids" in given else ""
    ids, attended = given[side + "input_ids"], given[side + "attention_mask"]
    if "TokenClassification" in cls:
        ids = pick(*ids.shape, classes=LABELS)
    elif cls == "ElectraForPreTraining":
        ids = pick(*ids.shape)
    return ids.masked_fill(attended == 0, IGNORED)
