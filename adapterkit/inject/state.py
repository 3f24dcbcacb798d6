"""Adapter tensors in the state dict of the model: their keys, and checkpoints that are loaded into the model.

A library may rename the path of a module when it saves, but not what follows `adapterkit.`; that part is
unique in the model, so that a tensor finds its place by it alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import nn

from adapterkit.errors import FileFormatError, Problem, listing
from adapterkit.model.walk import CHILD

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
    found = {part: state_dict[key] for part, key in given.items() if not is_manifest(part)}
    if given:
        found |= _in_common(found, own)
        _compare(found.keys(), {p for p in own if not is_manifest(p)})
    for key in given.values():
        del state_dict[key]
    for part, (key, tensor) in own.items():
        state_dict[prefix + key] = found.get(part, tensor)


def _in_common(
    given: Mapping[str, torch.Tensor], own: Mapping[str, tuple[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """One value for every tensor that several adapters have in common; a checkpoint may hold it once.

    Raises: FileFormatError: the checkpoint has several values for it.
    """
    found: dict[str, torch.Tensor] = {}
    problems = []
    for parts in _groups(own):
        values = [given[part] for part in parts if part in given]
        if any(not torch.equal(values[0], value) for value in values[1:]):
            message = f"the checkpoint has several values for {listing(parts)}, one tensor here"
            problems.append(Problem("not-shared", message, expected="kit.unshare() first"))
        found |= dict.fromkeys(parts, values[0]) if values else {}
    if problems:
        raise FileFormatError(problems)
    return found


def _groups(own: Mapping[str, tuple[str, torch.Tensor]]) -> list[list[str]]:
    """Suffixes of one and the same parameter, where it has several."""
    groups: dict[int, list[str]] = {}
    for part, (_, tensor) in own.items():
        if isinstance(tensor, nn.Parameter):
            groups.setdefault(id(tensor), []).append(part)
    return [parts for parts in groups.values() if len(parts) > 1]


def part_tensors(model: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Give every key of a tensor in common but the first a copy: libraries refuse to save a tensor twice."""
    own = own_tensors(model)
    for _, *others in _groups(own):
        for part in others:
            key = prefix + own[part][0]
            if key in state_dict and not isinstance(state_dict[key], nn.Parameter):
                state_dict[key] = state_dict[key].clone()


def _compare(given: Set[str], own: Set[str]) -> None:
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


def to_buffer(content: bytes) -> torch.Tensor:
    """Bytes as a uint8 tensor, so that they travel in a state dict."""
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def from_buffer(buffer: torch.Tensor) -> str:
    return bytes(buffer.cpu().numpy().tobytes()).decode()


def strip(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Only the adapter tensors of a checkpoint, by suffix."""
    return {part: tensor for key, tensor in tensors.items() if (part := suffix(key)) is not None}
