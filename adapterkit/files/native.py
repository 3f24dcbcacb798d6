"""adapterkit's own format: `adapter.safetensors`, keyed by slot address, and `adapter_config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapterkit.adapter import Adapter
from adapterkit.errors import FileFormatError, Problem
from adapterkit.files import manifest
from adapterkit.files.content import Content
from adapterkit.files.disk import read_json, read_tensors, to_json, write_directory
from adapterkit.files.present import state_dict
from adapterkit.methods.names import parse
from adapterkit.model.blueprint import Blueprint
from adapterkit.versions import __version__, installed

CONFIG = "adapter_config.json"
WEIGHTS = "adapter.safetensors"
_WORDS = (*manifest.WORDS, "base_model", "versions")


def write(directory: Path, adapter: Adapter, blueprint: Blueprint, head: bool | str = "auto") -> Path:
    """Write one adapter; its heads, and the poolers of the base that feed them, go with it."""
    tensors = {
        f"{address}.{name}": value
        for address, module in adapter.modules().items()
        if address not in adapter.heads and address not in adapter.poolers
        for name, value in state_dict(module).items()
    }
    heads = adapter.heads if head else {}
    for address, module in heads.items():
        tensors |= {f"{address}.{name}": value for name, value in state_dict(module).items()}
    for pooler in blueprint.poolers:
        # a pooler that came with the adapter goes with it, even where there is no head
        if heads or (head and pooler.address in adapter.poolers):
            module = adapter.poolers.get(pooler.address, pooler.module)
            tensors |= {
                f"{pooler.address}.{name}": value
                for name, value in state_dict(module).items()
                if "adapterkit." not in name
            }
    data = manifest.describe(adapter.plan, blueprint)
    data["heads"] = [found.path for found in adapter.plan.heads if found.address in heads]
    data["base_model"] = base_model(blueprint.model)
    data["versions"] = {"adapterkit": __version__} | {p: installed(p) for p in ("torch", "transformers")}
    return write_directory(directory, {WEIGHTS: tensors}, {CONFIG: to_json(data)})


def base_model(model: nn.Module) -> dict[str, Any]:
    """What is known of the model an adapter was made for."""
    config = getattr(model, "config", None)
    return {
        "id": getattr(config, "_name_or_path", None) or None,
        "revision": getattr(config, "_commit_hash", None),
        "model_type": getattr(config, "model_type", None),
        "class": type(model).__name__,
    }


def read(directory: Path) -> Content:
    """The adapter in a native directory.

    Raises: FileFormatError.
    """
    file = directory / CONFIG
    data = read_json(file)
    manifest.check_version(data, str(file))
    manifest.check_words(data, _WORDS, str(file))
    return to_content(data, read_tensors(directory / WEIGHTS, allow_bin=False), str(directory))


def to_content(data: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], source: str) -> Content:
    """Config and tensors of native files, or of a manifest and its tensors, as content."""
    try:
        addresses = tuple(map(str, data["slots"]))
        # a slot that is no linear map may have no shape
        slots = {str(a): (int(shape[0]), int(shape[1])) for a, shape in data["slots"].items() if shape}
        paths = [str(path) for path in data["heads"]]
        name, config = str(data["name"]), data["config"]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        problem = Problem("bad-file", f"the config lacks or misstates {error}", file=source)
        raise FileFormatError(problem) from None
    heads: dict[str, dict[str, torch.Tensor]] = {path: {} for path in paths}
    poolers: dict[str, dict[str, torch.Tensor]] = {}
    units = {}
    for key, value in tensors.items():
        head = next((path for path in paths if key.startswith(f"head.{path}.")), None)
        pooler, found, rest = key.partition(".pooler.")
        if head is not None:
            heads[head][key.removeprefix(f"head.{head}.")] = value
        elif found:
            poolers.setdefault(f"{pooler}.pooler", {})[rest] = value
        else:
            units[key] = value
    return Content(name, parse(config), units, addresses, heads, poolers, slots, source, data)
