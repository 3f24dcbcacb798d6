"""Prompt tuning without prompt tuning: a plain model with P more words in its vocabulary, fed with them.

Source: Lester et al. 2021, arXiv:2104.08691, section 2: the model sees [P; X], the embeddings of P special
tokens in front of those of the input. For images and sound, which have no vocabulary, the layers are called
by hand. Nothing here knows adapterkit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def add_words(table: nn.Embedding, vectors: Tensor) -> Tensor:
    """Give an embedding table rows whose embeddings are `vectors` (P, D); their ids."""
    scale = getattr(table, "embed_scale", 1.0)
    first = table.num_embeddings
    table.weight = nn.Parameter(torch.cat([table.weight, vectors / scale]))
    table.num_embeddings += len(vectors)
    return torch.arange(first, first + len(vectors))


def places(mask: Tensor, offset: int) -> list[int]:
    """Where the prompt of each row begins: before its first token, or that many behind."""
    return [row.tolist().index(1) + offset for row in mask]


def put(rows: Tensor, new: Tensor, begins: list[int]) -> Tensor:
    """Rows (B, T) with `new` (P,) at a place of their own."""
    each = zip(rows, begins, strict=True)
    return torch.stack([torch.cat([row[:i], new.to(row), row[i:]]) for row, i in each])


def put_vectors(rows: Tensor, vectors: Tensor, begins: list[int]) -> Tensor:
    """States (B, T, D) with vectors (P, D) at a place of their own."""
    return torch.stack([torch.cat([r[:i], vectors, r[i:]]) for r, i in zip(rows, begins, strict=True)])


def cut(rows: Tensor, count: int, begins: list[int]) -> Tensor:
    """Rows (B, P + T, ...) without what `put` has put in."""
    each = zip(rows, begins, strict=True)
    return torch.stack([torch.cat([row[:i], row[i + count :]]) for row, i in each])


def prompted(given: Mapping[str, Tensor], words: Tensor, offset: int) -> tuple[dict[str, Tensor], list[int]]:
    """Inputs with the words of the prompt, and where they begin."""
    mask = given["attention_mask"]
    begins = places(mask, offset)
    longer = {
        "input_ids": put(given["input_ids"], words, begins),
        "attention_mask": put(mask, torch.ones(len(words)), begins),
    }
    return {**given, **longer}, begins


def _layers(layers: Any, states: Tensor, *more: Any) -> Tensor:
    for layer in layers:
        out = layer(states, *more)
        states = out[0] if isinstance(out, tuple) else out
    return states


def _among(states: Tensor, vectors: Tensor, at: int) -> Tensor:
    wide = vectors.expand(len(states), -1, -1)
    return torch.cat([states[:, :at], wide, states[:, at:]], dim=1)


def _without(states: Tensor, count: int, at: int) -> Tensor:
    return torch.cat([states[:, :at], states[:, at + count :]], dim=1)


def vit(model: Any, pixels: Tensor, vectors: Tensor) -> Tensor:
    """Last states of a ViT whose prompt stands behind the class token."""
    layers = model.layers if hasattr(model, "layers") else model.encoder.layer
    states = _layers(layers, _among(model.embeddings(pixels), vectors, 1))
    return model.layernorm(_without(states, len(vectors), 1))  # type: ignore[no-any-return]


class _Bias(nn.Module):
    """Stands for a module of relative positions: zero where a prompt behind the first is."""

    def __init__(self, module: nn.Module, count: int) -> None:
        super().__init__()
        self.module, self.count = module, count

    def forward(self, *args: Any, **given: Any) -> Tensor:
        bias = self.module(*args, **given)
        for axis in (2, 3):
            gap = torch.zeros_like(bias.narrow(axis, 0, 1)).repeat_interleave(self.count, axis)
            rest = bias.narrow(axis, 1, bias.shape[axis] - 1)
            bias = torch.cat([bias.narrow(axis, 0, 1), gap, rest], dim=axis)
        return bias


def beit(model: Any, pixels: Tensor, vectors: Tensor) -> Tensor:
    """Last states of a BEiT (before its norm) whose prompt takes no part in relative positions."""
    holders = [module for module in model.modules() if hasattr(module, "relative_position_bias")]
    for holder in (h for h in holders if isinstance(h.relative_position_bias, nn.Module)):
        holder.relative_position_bias = _Bias(holder.relative_position_bias, len(vectors))
    embedded = model.embeddings(pixels, None)
    states = _among(embedded[0] if isinstance(embedded, tuple) else embedded, vectors, 1)
    for layer in model.layers if hasattr(model, "layers") else model.encoder.layer:
        out = layer(states, resolution=tuple(pixels.shape[2:]))
        states = out[0] if isinstance(out, tuple) else out
    return model.layernorm(_without(states, len(vectors), 1))  # type: ignore[no-any-return]


def clip_vision(model: Any, pixels: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Last states and pooled state of CLIP's image tower."""
    tower = getattr(model, "vision_model", model)
    states = _among(tower.pre_layrnorm(tower.embeddings(pixels)), vectors, 1)
    states = _without(_layers(tower.encoder.layers, states, None), len(vectors), 1)
    return states, tower.post_layernorm(states[:, 0])


def whisper(model: Any, features: Tensor, decoder_ids: Tensor, vectors: Tensor) -> Tensor:
    """Last states of Whisper's decoder, which reads the encoder's prompt along with the sound."""
    encoder = model.encoder
    states = nn.functional.gelu(encoder.conv2(nn.functional.gelu(encoder.conv1(features))))
    states = states.permute(0, 2, 1) + encoder.embed_positions.weight
    states = encoder.layer_norm(_layers(encoder.layers, _among(states, vectors, 0), None))
    return model.decoder(input_ids=decoder_ids, encoder_hidden_states=states)[0]  # type: ignore[no-any-return]
