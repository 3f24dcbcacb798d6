"""Module paths under which files know the linear maps of a model: this class, its relatives, other versions.

A file names a module by its path in the class and the version of transformers that it was made with. The
alternatives of an interface are paths of other versions; the prefix of the base depends on the class.
"""

from __future__ import annotations

from collections import defaultdict

from torch import nn

from adapterkit.errors import FileFormatError, Problem
from adapterkit.files.paths import known_paths
from adapterkit.model.blueprint import Blueprint, Slot


def refuse_unnamed(blueprint: Blueprint, file: str) -> None:
    """Raise FileFormatError where the interface does not say how PEFT's files name its modules."""
    if blueprint.interface.peft is None:
        message = f"the interface {blueprint.interface_name!r} does not say how PEFT names its modules"
        raise FileFormatError(
            Problem("peft-names", message, "", "a 'peft:' block in the interface", file=file)
        )


def hosts(blueprint: Blueprint) -> dict[str, Slot]:
    """Path -> slot of every linear map; a fused one as a whole."""
    return {slot.path: slot for slot in blueprint if slot.rows is None}


def known(blueprint: Blueprint) -> dict[str, list[tuple[int, str]]]:
    """Path of a linear map in this model -> its (kind of class, name) pairs; its own path is the first."""
    return {
        path: [
            pair
            for name in known_paths(blueprint, slot)
            for pair in enumerate(relatives(blueprint.model, name))
        ]
        for path, slot in hosts(blueprint).items()
    }


def lookup(names: dict[str, list[tuple[int, str]]]) -> dict[str, set[str]]:
    """Name -> paths in this model that it may mean. A real path means itself."""
    found: dict[str, set[str]] = defaultdict(set)
    for path, pairs in names.items():
        for _, name in pairs:
            found[name].add(path)
    return found | {path: {path} for path in names}


def relatives(model: nn.Module, path: str) -> list[str]:
    """A path in this class, in the base model alone, and in a class that holds the base model."""
    prefix = getattr(model, "base_model_prefix", None)
    if not isinstance(prefix, str) or not prefix:
        return [path]
    bare = path.removeprefix(f"{prefix}.") if prefix in model._modules else path
    return [path, bare, f"{prefix}.{bare}"]
