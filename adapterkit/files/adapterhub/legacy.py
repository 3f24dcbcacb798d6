"""Files of older versions of their library, which the newest one changes when it loads them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}
"""In files without a version -> what they mean (adapters 1.3.0, utils.py, ACTIVATION_RENAME)."""
_MODULES = {
    "attention_text_task_adapters": "adapters",
    "attention_text_lang_adapters": "adapters",
    "layer_text_task_adapters": "adapters",
    "layer_text_lang_adapters": "adapters",
    "invertible_lang_adapters": "invertible_adapters",
}
"""In keys (adapters 1.3.0, loading.py, legacy_weights_mapping)."""
_SCALED = (1, 1, 0)
"""Up to here a LoRA was trained without its alpha / r, whatever the file says."""


def updated(data: Mapping[str, Any]) -> dict[str, Any]:
    """A config file as the newest version of theirs understands it."""
    found, config = dict(data), dict(data["config"])
    if "version" not in data and config.get("non_linearity") in _ACTIVATIONS:
        config["non_linearity"] = _ACTIVATIONS[config["non_linearity"]]
    version = re.match(r"adapters\.(\d+)\.(\d+)\.(\d+)(\.?[a-z])?", str(data.get("version", "")))
    number = tuple(map(int, version.groups()[:3])) if version is not None else _SCALED
    is_old = number < _SCALED or (number == _SCALED and version is not None and bool(version[4]))
    # alone; in a union theirs leaves it as it is
    if is_old and config.get("architecture") == "lora" and "r" in config:
        config["alpha"] = config["r"]
    return {**found, "config": config}


def renamed(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors under the keys that the newest version gives them."""
    found = {}
    for key, tensor in tensors.items():
        for old, new in _MODULES.items():
            key = key.replace(old, new)
        found[key] = tensor
    return found
