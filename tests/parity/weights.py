"""Weights of the recorded base models, drawn again from their seeds: names and shapes are all that is kept.

The recorder went through the parameters in the order of their names: matrices got unit gain, vectors some
noise on top of where they started (0 or 1), numbers stayed. weights.safetensors keeps what cannot be drawn.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

RECIPE = "weights.json"
KEPT = "weights.safetensors"


def _generator(*key: object) -> torch.Generator:
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def draw(recipe: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Every tensor of a recipe {key: [seed, dims, family, class], tensors: {name: {shape, start}}}."""
    generator, found = _generator(*recipe["key"]), {}
    for name, said in sorted(recipe["tensors"].items()):
        noise = torch.randn(said["shape"], generator=generator)
        match noise.ndim:
            case 0 | 1:
                found[name] = torch.full_like(noise, said["start"]).add_(0.3 * noise)
            case 2:
                found[name] = noise * (1.1 / min(noise.shape) ** 0.5)
            case _:
                found[name] = noise * 0.4
    return found


def describe(
    tensors: Mapping[str, torch.Tensor], key: tuple[object, ...]
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The recipe of weights, and those that it does not give bit for bit."""
    drawn_from = {
        name: value for name, value in tensors.items() if value.any()
    }  # zeros are buffers, never drawn
    wanted = {name: {"shape": list(value.shape), "start": 0} for name, value in drawn_from.items()}
    zero = draw({"key": key, "tensors": wanted})
    for name, value in drawn_from.items():
        if value.ndim == 1:
            wanted[name]["start"] = int((value - zero[name]).mean().round())
    recipe = {"key": list(key), "tensors": wanted}
    drawn = draw(recipe)
    return recipe, {
        name: value
        for name, value in tensors.items()
        if name not in drawn or not torch.equal(value, drawn[name])
    }


def write(directory: Path) -> None:
    """Make model.safetensors from the recipe."""
    recipe = json.loads((directory / RECIPE).read_text(encoding="utf-8"))
    kept = load_file(directory / KEPT) if (directory / KEPT).exists() else {}
    save_file({**draw(recipe), **kept}, directory / "model.safetensors", {"format": "pt"})
