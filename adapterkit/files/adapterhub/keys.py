"""Keys of their weight files: the model's own module paths, with or without the prefix of its base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from adapterkit.errors import FileFormatError, Problem, did_you_mean
from adapterkit.files.adapterhub.places import hub_of
from adapterkit.files.paths import known_paths
from adapterkit.model.blueprint import Blueprint


@dataclass(frozen=True)
class Keyed:
    """The tensors of a file by where they belong."""

    parts: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    """Path of the host in this model -> parameter in their words -> tensor."""
    modules: dict[str, str] = field(default_factory=dict)
    """Path of the host in this model -> the path that the file gives it."""
    shared: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    """Path of a base model in the file -> parameter -> tensor."""


def sort(tensors: Mapping[str, torch.Tensor], name: str, blueprint: Blueprint) -> Keyed:
    """Find the host of every tensor.

    Raises: FileFormatError: keys that mean no module of this model, or one that another key means, too.
    """
    hosts, found, problems = _hosts(blueprint), Keyed(), []
    for key, tensor in tensors.items():
        module, own, parameter = key.partition(f".loras.{name}.")
        base, common, shared = f".{key}".partition(f".shared_parameters.{name}.")
        if common:
            found.shared.setdefault(base[1:], {})[shared] = tensor
        elif not own or module not in hosts:
            hint = did_you_mean(module, hosts)
            problems.append(Problem("unknown-tensors", "belongs to no module of this model", key, "", hint))
        elif found.modules.setdefault(hosts[module], module) != module:
            message = f"belongs to the same module as tensors at {found.modules[hosts[module]]!r}"
            problems.append(Problem("bad-file", message, key))
        else:
            found.parts.setdefault(hosts[module], {})[parameter] = tensor
    if problems:
        raise FileFormatError(problems)
    return found


def _hosts(blueprint: Blueprint) -> dict[str, str]:
    """Every name that a host may have in a file -> its path here; names that could mean two are left out."""
    prefixes = hub_of(blueprint).prefix
    names: dict[str, set[str]] = {}
    for slot in blueprint:
        if slot.layer is not None:
            for path in known_paths(blueprint, slot):
                for name in _with_and_without(path, prefixes):
                    names.setdefault(name, set()).add(slot.path)
    paths = {slot.path for slot in blueprint}
    return {
        name: name if name in paths else next(iter(found))
        for name, found in names.items()
        if name in paths or len(found) == 1
    }


def _with_and_without(path: str, prefixes: Iterable[str]) -> Iterable[str]:
    """A path as a base class and as the classes with heads write it."""
    bare = next(
        (path.removeprefix(f"{prefix}.") for prefix in prefixes if path.startswith(f"{prefix}.")), path
    )
    return (path, bare, *(f"{prefix}.{bare}" for prefix in prefixes))
