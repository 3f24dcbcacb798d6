"""Tensors of a module for a file, also those that accelerate keeps elsewhere while it does not run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from adapterkit.errors import FileFormatError, Problem
from adapterkit.model.walk import is_managed, is_sharded


def state_dict(module: nn.Module) -> dict[str, torch.Tensor]:
    """As `module.state_dict()`, with nothing on the meta device.

    Raises: FileFormatError: tensors were never loaded, or what has offloaded them does not say where to; or
        they were quantised after attach, or are sharded.
    """
    found = dict(module.state_dict())
    refuse_unwritable(found)
    if any(tensor.is_meta for tensor in found.values()):
        for path, part in module.named_modules():
            hook: Any = part.__dict__.get("_hf_hook")
            for one in getattr(hook, "hooks", (hook,)):
                kept: Any = getattr(one, "weights_map", None)
                for name in (*part._parameters, *part._buffers) if kept is not None else ():
                    key = f"{path}.{name}" if path else name
                    if key in found and found[key].is_meta and name in kept:
                        found[key] = kept[name]
    refuse_away(found)
    return found


def refuse_parted(module: nn.Module, address: str) -> None:
    """Refuse a module of which this process holds parts, whatever they look like. Raises: FileFormatError."""
    empty = any(not parameter.numel() for parameter in module.parameters())  # DeepSpeed, between passes
    if is_managed(module) or empty:
        raise FileFormatError(Problem("sharded", _PARTED, address, _WHOLE))


def refuse_unwritable(values: Mapping[str, Any]) -> None:
    """Refuse parts, and what holds no numbers or others in their place. Raises: FileFormatError."""
    problems = []
    for key, value in values.items():
        if isinstance(value, torch.Tensor) and is_sharded(value):
            problems.append(Problem("sharded", _PARTED, key, _WHOLE))
        elif not isinstance(value, torch.Tensor) or hasattr(type(value), "__tensor_flatten__"):
            message = "is quantised, so that its own numbers are not there to write"
            problems.append(Problem("weight-unreadable", message, key))
    if problems:
        raise FileFormatError(problems)


def refuse_away(tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors that have no numbers here. Raises: FileFormatError."""
    message = "is not loaded, so that it has no numbers to write"
    away = [Problem("weight-unreadable", message, key) for key, tensor in tensors.items() if tensor.is_meta]
    if away:
        raise FileFormatError(away)


_PARTED = "is sharded: this process holds a part of it"
_WHOLE = "a full checkpoint of the model (get_model_state_dict, full_state_dict=True), which ak.load reads"
