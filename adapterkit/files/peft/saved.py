"""What PEFT calls modules_to_save: heads, and poolers inside the base."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from adapterkit.adapter import Adapter
from adapterkit.errors import FileFormatError, Problem
from adapterkit.files.peft.names import relatives
from adapterkit.files.present import state_dict
from adapterkit.model.blueprint import Blueprint
from adapterkit.model.walk import CHILD, child

Tensors = dict[str, torch.Tensor]


def take_modules(
    rest: Mapping[str, torch.Tensor], saved: tuple[str, ...], blueprint: Blueprint, source: str
) -> tuple[dict[str, Tensors], dict[str, Tensors]]:
    """Heads by path and poolers by address.

    Args: rest: tensors of no unit, by key without PEFT's prefix; saved: the config's modules_to_save.
    Raises: FileFormatError: tensors of anything else, or a module to save that has no tensors.
    """
    model = blueprint.model
    heads: dict[str, Tensors] = {}
    poolers: dict[str, Tensors] = {}
    head_paths = {head.path for head in blueprint.heads}
    spelled = {name: pooler.address for pooler in blueprint.poolers for name in relatives(model, pooler.path)}
    problems, owners = [], set()
    for key, value in rest.items():
        key = key.replace(".modules_to_save.", ".")  # older versions of PEFT kept the name of the wrapper
        owner = next((p for p in _parents(key) if p in head_paths or p in spelled or _ends(p, saved)), None)
        if owner is None:
            message = "belongs to no adapted module, and to no head or pooler"
            problems.append(Problem("unknown-tensors", message, key, file=source))
        elif owner in spelled:
            poolers.setdefault(spelled[owner], {})[key[len(owner) + 1 :]] = value
        elif owner in head_paths or child(model, owner) is None:
            # a head that this class has not got is refused later, unless heads are not wanted
            heads.setdefault(owner, {})[key[len(owner) + 1 :]] = value
        else:
            message = "was trained as a whole, but is neither head nor pooler here"
            problems.append(Problem("peft-modules", message, owner, file=source))
        owners.add(owner)
    for path, module in own_modules(model):
        if (
            _ends(path, saved)
            and owners.isdisjoint(relatives(model, path))
            and any(True for _ in module.parameters())
        ):
            message = "is named by modules_to_save, but the file has no tensors of it"
            problems.append(Problem("missing-tensors", message, path, file=source))
    if problems:
        raise FileFormatError(problems)
    return heads, poolers


def give_modules(
    adapter: Adapter, blueprint: Blueprint, head: bool | str, directory: str
) -> tuple[tuple[str, ...], Tensors]:
    """modules_to_save and its tensors: the adapter's heads, and the poolers that feed them.

    Raises: FileFormatError: PEFT, which looks at the ends of paths only, would take other modules too.
    """
    modules: dict[str, nn.Module] = {}
    if head is not False:
        modules = {found.path: adapter.heads[found.address] for found in adapter.plan.heads}
        for pooler in blueprint.poolers:
            if modules or pooler.address in adapter.poolers:
                modules[pooler.path] = adapter.poolers.get(pooler.address, pooler.module)
    problems = [
        Problem("peft-ambiguous", f"PEFT would also take {path} for {name}", name, file=directory)
        for path, module in own_modules(blueprint.model)
        for name in modules
        if path not in modules and path.endswith(name) and module.state_dict()
    ]
    if problems:
        raise FileFormatError(problems)
    tensors = {
        f"{path}.{key}": value
        for path, module in modules.items()
        for key, value in state_dict(module).items()
        if f"{CHILD}." not in key
    }
    return tuple(modules), tensors


def own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules of the model itself, by every path they have."""
    for path, module in model.named_modules(remove_duplicate=False):
        if path and CHILD not in path.split("."):
            yield path, module


def _parents(key: str) -> Iterator[str]:
    """Paths of the modules that a key lies in, the outermost first."""
    return (key[: dot.start()] for dot in re.finditer(r"\.", key))


def _ends(path: str, names: Iterable[str]) -> bool:
    return any(path.endswith(name) for name in names)
