"""Scenes for every shipped interface: all classes of its row, and configs under which its blocks exist."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

import adapterkit as ak
from adapterkit.author.scene import Scene
from tests.laws.matrix import CUSTOM
from tests.models import tiny
from tests.models.inputs import SEQ
from tests.models.rows import HIDDEN

CROSSED = {"is_decoder": True, "add_cross_attention": True}
ALIGNED = {"type_vocab_size": 2}
# row -> settings under which further claims of its interface can be seen; the name may be a class
FURTHER: dict[str, dict[str, dict[str, Any]]] = {
    "bart": {"uneven": {"decoder_attention_heads": 2}},
    "beit": {
        "shared": {"use_relative_position_bias": False, "use_shared_relative_position_bias": True},
        "plain": {"use_relative_position_bias": False},
        "normed": {"use_mean_pooling": False},
    },
    "bert": {"crossed": CROSSED},
    "bert_generation": {"crossed": CROSSED},
    "deberta": {
        "aligned": ALIGNED,
        "c2p": {"pos_att_type": ["c2p"]},
        "p2c": {"pos_att_type": ["p2c"]},
        "DebertaForMaskedLM": {"legacy": False},
    },
    "deberta_v2": {"aligned": ALIGNED, "DebertaV2ForMaskedLM": {"legacy": False}},
    "electra": {"crossed": CROSSED},
    "gpt2": {"crossed": {"add_cross_attention": True}},
    "modernbert": {"dropping": {"attention_dropout": 0.1}},
    "mbart": {"uneven": {"decoder_attention_heads": 2}},
    "plbart": {"uneven": {"decoder_attention_heads": 2}},
    "roberta": {"crossed": CROSSED, "aligned": ALIGNED},
    "whisper": {"uneven": {"decoder_attention_heads": 2}},
    "xlm_roberta": {"crossed": CROSSED, "aligned": ALIGNED},
    "xmod": {
        "crossed": CROSSED,
        "aligned": ALIGNED,
        "pre_norm": {"pre_norm": True},
        "crossed-pre_norm": {**CROSSED, "pre_norm": True},
    },
}


def scenes(row: str, *, whole: bool = True) -> Iterator[Scene]:
    """The base class first; then, if `whole`, all classes, variants and further configs."""
    base, *others = tiny.classes(row)
    yield _scene(row, base)
    if not whole:
        return
    for cls in others:
        yield _scene(row, cls)
    for name, settings in {**tiny.ROWS[row].variants, **FURTHER.get(row, {})}.items():
        yield _scene(row, name if name in others else base, name, settings)


def _scene(row: str, cls: str, name: str = "", settings: Any = None) -> Scene:
    model = tiny.build(row, cls, **(settings or {}))
    inputs: dict[str, Any] = tiny.inputs(row, cls)
    if settings and settings.get("add_cross_attention"):
        inputs |= _states()
    return Scene(f"{cls} {name}".strip(), model, inputs)


def _states() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    mask = torch.ones(2, SEQ, dtype=torch.long)
    mask[1, -2:] = 0
    return {
        "encoder_hidden_states": torch.randn(2, SEQ, HIDDEN, generator=generator),
        "encoder_attention_mask": mask,
    }


def interface(row: str) -> ak.Interface:
    return ak.Interface.load(CUSTOM if row == "custom" else row)


def unseen_elsewhere(row: str) -> set[str]:
    """Claims of the interfaces of parts, which are seen where these are checked on their own.

    The mask is one that GPT-2 does not heed in the oldest supported version.
    """
    of_parts = {"stacks.encoder.inputs.aligned", "stacks.decoder.reads.mask"}
    return of_parts if row == "encoder_decoder" else set()
