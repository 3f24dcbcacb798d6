"""Adapter tensors in the state dict of the model: their keys, and checkpoints that are loaded into the model.

A library may rename the path of a module when it saves, but not what follows `adapterkit.`; that part is
unique in the model, so that a tensor finds its place by it alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from adapterkit.errors import FileFormatError, Problem, listing
from adapterkit.inject.site import CHILD

MANIFEST = "manifest"
NAME = re.compile(r"^[A-Za-z0-9_-]+\Z")


def slug(name: str, address: str) -> str:
    """Key of a unit in its site: unique in the model, free of dots, no attribute of a module."""
    return f"{name}__{re.sub(r'[^A-Za-z0-9_-]', '_', address)}"


def suffix(key: str) -> str | None:
    """What follows `adapterkit.` in a state-dict key, None for a key of the base model."""
    _, found, rest = key.rpartition(f".{CHILD}.")
    return rest if found else None


def is_manifest(part: str) -> bool:
    return part.endswith(f"__{MANIFEST}")


def own_tensors(model: nn.Module) -> dict[str, tuple[str, torch.Tensor]]:
    """Suffix -> (key, tensor) of every adapter tensor in the model."""
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        parts = path.split(".")
        if CHILD not in parts:
            continue
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in module._non_persistent_buffers_set:
                key = f"{path}.{name}"
                found[str(suffix(key))] = (key, tensor)
    return found


def place_tensors(module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Load-state-dict pre-hook of the model: put adapter tensors where they belong, or refuse the checkpoint.

    A checkpoint with no adapter tensor is one of the base model alone and leaves the adapters as they are.
    One that holds some must hold exactly those that are attached, whatever `strict` says.
    Raises: FileFormatError.
    """
    given = {part: key for key in state_dict if key.startswith(prefix) and (part := suffix(key)) is not None}
    own = own_tensors(module)
    if given:
        _compare({p for p in given if not is_manifest(p)}, {p for p in own if not is_manifest(p)})
    for part, (key, tensor) in own.items():
        old = given.pop(part, None)
        value = state_dict.pop(old) if old is not None else tensor
        state_dict[prefix + key] = tensor if is_manifest(part) else value
    for old in given.values():  # manifests of another version of an adapter
        del state_dict[old]


def _compare(given: set[str], own: set[str]) -> None:
    if given == own:
        return
    problems = []
    for code, what, parts in (
        ("unknown-tensors", "holds tensors of adapters that are not attached", given - own),
        ("missing-tensors", "lacks tensors of adapters that are attached", own - given),
    ):
        if parts:
            problems.append(
                Problem(code, f"the checkpoint {what}: {listing(sorted(parts), 6)}", expected=_advice())
            )
    raise FileFormatError(problems)


def _advice() -> str:
    return "the same adapters attached under the same names, or ak.load(model, checkpoint) to take them out"


def to_buffer(text: str) -> torch.Tensor:
    """Text as a uint8 tensor, so that it travels in a state dict."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def from_buffer(buffer: torch.Tensor) -> str:
    return bytes(buffer.cpu().numpy().tobytes()).decode()


def strip(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Only the adapter tensors of a checkpoint, by suffix."""
    return {part: tensor for key, tensor in tensors.items() if (part := suffix(key)) is not None}
