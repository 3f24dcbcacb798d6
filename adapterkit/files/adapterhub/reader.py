"""Reading a directory of AdapterHub's `adapters`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from adapterkit.errors import FileFormatError, Problem, listing
from adapterkit.files.adapterhub import keys
from adapterkit.files.adapterhub.bottleneck import BottleneckMember
from adapterkit.files.adapterhub.comparison import check_model, differences, told_of, weights_file
from adapterkit.files.adapterhub.invertible import InvertibleMember
from adapterkit.files.adapterhub.legacy import renamed, updated
from adapterkit.files.adapterhub.lora import LoRAMember
from adapterkit.files.adapterhub.member import Member
from adapterkit.files.adapterhub.places import hub_of
from adapterkit.files.adapterhub.prefix import PrefixMember
from adapterkit.files.adapterhub.prompt import PromptMember
from adapterkit.files.adapterhub.reft import ReFTMember
from adapterkit.files.adapterhub.silence import SilenceMember
from adapterkit.files.content import Content
from adapterkit.files.disk import read_json, read_tensors
from adapterkit.methods.base import MethodConfig
from adapterkit.methods.union import union
from adapterkit.model.blueprint import Blueprint

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter.safetensors", "pytorch_adapter.bin")
HEAD = "head_config.json"
_METHODS: dict[str, Callable[[Mapping[str, Any], Blueprint], Member]] = {
    "lora": LoRAMember,
    "mtl_lora": LoRAMember,
    "reft": ReFTMember,
    "prompt_tuning": PromptMember,
    "prefix_tuning": PrefixMember,
}


def recognises(data: Mapping[str, Any]) -> bool:
    """Whether a config was written by AdapterHub."""
    return isinstance(data.get("config"), dict) and "model_type" in data and "peft_type" not in data


def read(directory: Path, blueprint: Blueprint, allow_bin: bool) -> Content:
    """The adapter in a directory of AdapterHub.

    Their modules become units at the slots where they act. Where they compute otherwise than the paper, the
    config that is returned says so; what we cannot compute is refused.

    Raises: FileFormatError: with everything that is unknown, missing or cannot be reproduced.
    """
    data = read_json(directory / CONFIG)
    with told_of(directory):
        return _content(data, directory, blueprint, allow_bin)


def _content(data: Mapping[str, Any], directory: Path, blueprint: Blueprint, allow_bin: bool) -> Content:
    hub_of(blueprint)
    check_model(data, blueprint)
    data = updated(data)
    found, name = members(data["config"], blueprint), str(data.get("name"))
    refuse(problem for member in found for problem in member.refusals())
    tensors = renamed(read_tensors(weights_file(directory, WEIGHTS), allow_bin))
    given = keys.sort(tensors, name, blueprint)
    refuse(_differences(found, given))
    config, tensors, addresses = adapter(found, given, blueprint)
    return Content(
        name=name,
        config=config,
        tensors=tensors,
        addresses=addresses,
        heads={f"heads.{name}": {}} if (directory / HEAD).is_file() else {},
        source=str(directory),
        facts={key: data.get(key) for key in ("model_name", "model_class", "model_type", "version")},
    )


def adapter(
    found: Sequence[Member], given: keys.Keyed, blueprint: Blueprint
) -> tuple[MethodConfig, dict[str, torch.Tensor], tuple[str, ...]]:
    """Config, tensors and the addresses of the slots that tensors of theirs are here.

    Raises: FileFormatError: they cannot be had as what the config says.
    """
    parts = [part for member in found for part in member.parts(given)]
    config = union([part.config for part in parts])
    chosen = {slot.address: slot for slot in config.select(blueprint).slots}
    tensors: dict[str, torch.Tensor] = {}
    addresses: list[str] = []
    for number, part in enumerate(parts):
        mark, inside = (f"{number}:", f"members.{number}.") if len(parts) > 1 else ("", "")
        # what is shared alone stands at the slots that the config selects
        addresses += [f"{mark}{a}" for a in part.units] or [a for a in chosen if a.startswith(mark)]
        tensors |= {f"{mark}{a}.{n}": tensor for a, unit in part.units.items() for n, tensor in unit.items()}
        tensors |= {f"shared.{inside}{n}": tensor for n, tensor in part.shared.items()}
    return config, tensors, tuple(addresses)


def members(config: Mapping[str, Any], blueprint: Blueprint) -> list[Member]:
    """What a config means on this model.

    Raises: FileFormatError: a method that is not known; options that are unknown, wrong or not had.
    """
    own_removed = hub_of(blueprint).own_adapters == "removed"
    return [*_members(config, blueprint), *([SilenceMember(blueprint)] if own_removed else [])]


def _members(config: Mapping[str, Any], blueprint: Blueprint) -> list[Member]:
    """The methods of a config."""
    architecture = config.get("architecture")
    if architecture == "union":
        inner = config.get("configs")
        if not isinstance(inner, list) or not all(isinstance(one, dict) for one in inner):
            raise FileFormatError(Problem("bad-option", f"{inner!r} is no list of configs", "configs"))
        return [member for one in inner for member in _members(one, blueprint)]
    if architecture is None:
        found = BottleneckMember(config, blueprint)
        inverted = [InvertibleMember(found.theirs, blueprint)] if found.theirs.inv_adapter else []
        return [found, *inverted] if found.branches or not inverted else [*inverted]
    if not isinstance(architecture, str) or architecture not in _METHODS:
        message = f"holds an adapter of architecture {architecture!r}, which is not known"
        expected = f"one of {listing(['bottleneck', *_METHODS, 'union'])}"
        raise FileFormatError(Problem("unsupported-method", message, expected=expected))
    return [_METHODS[architecture](config, blueprint)]


def refuse(problems: Iterable[Problem]) -> None:
    """Raise an error with these problems, if there are any."""
    found = list(problems)
    if found:
        raise FileFormatError(found)


def _differences(found: Sequence[Member], given: keys.Keyed) -> Iterator[Problem]:
    """Where a file has not got exactly the tensors that its config asks for in this model."""
    yield from differences([member.wanted(given) for member in found], given)
    if not any(member.shares for member in found):
        for base in given.shared:
            yield Problem("unknown-tensors", "the config shares no tensors", f"{base}.shared_parameters")
