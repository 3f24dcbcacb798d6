"""Finding modules by path, with errors that name the children that exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from adapterkit.errors import did_you_mean, listing

CHILD = "adapterkit"
"""Name of the child under which a module carries what adapters put there."""
ATTRIBUTE = "_adapterkit"
"""Where the model keeps its kit."""


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether this process holds only its part of a tensor (`fully_shard`, tensor parallelism)."""
    return getattr(tensor, "device_mesh", None) is not None


def is_managed(module: nn.Module) -> bool:
    """Whether torch shards the tensors of a module (FSDP, `fully_shard`): parts, whole for a pass only."""
    return bool(getattr(module, "_is_fsdp_managed_module", False))


def parameters(model: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """The parameters of a model without those of adapters, each once: its module, its name there, itself.

    Several times faster than `named_parameters`: attach walks the whole model.
    """
    found: list[tuple[nn.Module, str, nn.Parameter]] = []
    seen: set[int] = set()
    stack = [model]
    while stack:
        module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if own := module._parameters:
            for name, parameter in own.items():
                if parameter is not None and id(parameter) not in seen:
                    seen.add(id(parameter))
                    found.append((module, name, parameter))
        if inside := module._modules:
            for name, below in inside.items():
                if below is not None and name != CHILD:
                    stack.append(below)
    return found


def tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """Parameters and buffers of a small module; one that is there twice comes twice."""
    for found in (module._parameters, module._buffers):
        yield from (tensor for tensor in found.values() if tensor is not None)
    for below in module._modules.values():
        if below is not None:
            yield from tensors(below)


def child(module: nn.Module, path: str) -> nn.Module | None:
    """The module at `path` below `module`; None if it is missing or set to None."""
    if path == ".":
        return module
    for part in path.split("."):
        # plain dictionary look-ups: attribute access on modules is ten times slower
        found = module._modules.get(part)
        if found is None:
            return None
        module = found
    return module


def plain(module: nn.Module, name: str) -> Any:
    """An attribute of a module that is no tensor and no module, None if there is none.

    `getattr` is slow where there is none: it looks among tensors and children first.
    """
    if name in module.__dict__:
        return module.__dict__[name]
    return getattr(module, name, None) if hasattr(type(module), name) else None


def join(root: str, path: str) -> str:
    """Path of `path` below `root`, where either may mean the thing itself."""
    if path == ".":
        return root
    return f"{root}.{path}" if root else path


def expand(module: nn.Module, pattern: str) -> list[tuple[str, nn.Module]]:
    """Layers below `module`: the members of the list at `pattern`; '*' stands for all members of a list."""
    found = [("", module)]
    for part in pattern.split("."):
        step = []
        for path, node in found:
            names = list(node._modules) if part == "*" else [part] if part in node._modules else []
            step += [(join(path, name), node._modules[name]) for name in names]
        found = [(path, node) for path, node in step if node is not None]
    if pattern.endswith("*"):
        return found
    return [
        (f"{path}.{name}", member)
        for path, node in found
        if isinstance(node, (nn.ModuleList, nn.Sequential, nn.ModuleDict))
        for name, member in node._modules.items()
        if member is not None
    ]


def missing(module: nn.Module, path: str, at: str = "") -> tuple[str, str, str]:
    """Why `path` is not below `module`, which is found at `at`: (fact, children that exist, hint)."""
    node, walked = module, []
    for part in path.split("."):
        following = node._modules.get(part)
        if following is None:
            break
        walked.append(part)
        node = following
    where = join(at, ".".join(walked) or ".") or "the model itself"
    state = "is None" if part in node._modules else "does not exist"
    names = [name for name, found in node._modules.items() if found is not None]
    rest = path.split(".")[len(walked) + 1 :]
    near = [".".join((*walked, name, *rest)) for name in names]
    near = [found for found in near if child(module, found) is not None]
    guess = did_you_mean(path, near) or did_you_mean(part, _leaves(node))
    return f"{path!r} {state} in {where} ({type(node).__name__})", f"children there: {listing(names)}", guess


def _leaves(module: nn.Module) -> Iterator[str]:
    return (name for name, _ in module.named_modules() if name and re.fullmatch(r"[^.]+(\.[^.]+)?", name))
