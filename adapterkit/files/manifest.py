"""What is needed to take an adapter out of a full checkpoint: one tensor that travels in the state dict."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic_core import to_json

from adapterkit.errors import FileFormatError, Problem, did_you_mean
from adapterkit.files import kinship
from adapterkit.inject.state import from_buffer, to_buffer
from adapterkit.model.blueprint import Blueprint
from adapterkit.planning import Plan
from adapterkit.spec import registry

FORMAT_VERSION = 1
WORDS = ("format", "format_version", "name", "config", "interface", "slots", "heads")
"""What the configs of native files and manifests have in common."""


def describe(plan: Plan, blueprint: Blueprint) -> dict[str, Any]:
    """The part of a config that native files and manifests share."""
    spec = blueprint.interface
    shipped = registry.is_shipped(blueprint.interface_name)
    return {
        "format": "adapterkit",
        "format_version": FORMAT_VERSION,
        "name": plan.name,
        "config": plan.config.to_dict(),
        "interface": {
            **kinship.describe(blueprint),
            "spec": None if shipped else registry.dump(spec),
        },
        "slots": {slot.address: list(slot.shape or ()) for slot in plan.slots},
        "heads": [head.path for head in plan.heads],
    }


def write(plan: Plan, blueprint: Blueprint, shares: Sequence[str] = ()) -> torch.Tensor:
    """The manifest of an adapter as a uint8 tensor.

    Args: shares: adapters with which it has tensors in common, so that a checkpoint may lack its own.
    """
    data = {**describe(plan, blueprint), "shares": list(shares)}
    return to_buffer(to_json(data))


def check_version(data: Mapping[str, Any], file: str) -> None:
    """Refuse a format this version cannot read.

    Raises: FileFormatError.
    """
    version = data.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise FileFormatError(Problem("bad-file", "'format_version' is missing or no number", file=file))
    if version > FORMAT_VERSION:
        message = f"written in format {version}; this adapterkit reads up to format {FORMAT_VERSION}"
        raise FileFormatError(Problem("newer-format", message, hint="update adapterkit", file=file))


def check_words(data: Mapping[str, Any], words: Sequence[str], file: str) -> None:
    """Refuse what this format does not know: nothing that somebody has said is passed over.

    Raises: FileFormatError.
    """
    unknown = sorted(data.keys() - set(words))
    if unknown:
        raise FileFormatError(
            Problem("bad-file", f"has an unknown key {key!r}", "", "", did_you_mean(key, words), file)
            for key in unknown
        )


def read(buffer: torch.Tensor, file: str) -> dict[str, Any]:
    """The manifest in a checkpoint.

    Raises: FileFormatError: it is damaged, or newer than this adapterkit.
    """
    try:
        data = json.loads(from_buffer(buffer))
    except ValueError:
        data = None
    if not isinstance(data, dict):
        raise FileFormatError(Problem("bad-file", "the manifest of an adapter cannot be read", file=file))
    check_version(data, file)
    kinds = {"name": str, "config": dict, "interface": dict, "slots": dict, "heads": list}
    wrong = [word for word, kind in kinds.items() if not isinstance(data.get(word), kind)]
    if wrong:
        message = f"the manifest of an adapter lacks or misstates {', '.join(wrong)}"
        raise FileFormatError(Problem("bad-file", message, file=file))
    return data
