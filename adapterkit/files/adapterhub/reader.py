"""Reading a directory of AdapterHub's `adapters`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from adapterkit.errors import FileFormatError, Problem, did_you_mean, listing
from adapterkit.files.adapterhub import keys
from adapterkit.files.adapterhub.config import LoRAFile, parse
from adapterkit.files.adapterhub.places import Place, hub_of, left_out, places
from adapterkit.files.adapterhub.shared import join
from adapterkit.files.adapterhub.tensors import refusals, shapes, units
from adapterkit.files.content import Content
from adapterkit.files.disk import read_json, read_tensors
from adapterkit.model.blueprint import Blueprint

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter.safetensors", "pytorch_adapter.bin")
HEAD = "head_config.json"


def recognises(data: Mapping[str, Any]) -> bool:
    """Whether a config was written by AdapterHub."""
    return isinstance(data.get("config"), dict) and "model_type" in data and "peft_type" not in data


def read(directory: Path, blueprint: Blueprint, allow_bin: bool) -> Content:
    """The adapter in a directory of AdapterHub.

    Their `<module>.loras.<name>.<parameter>` become units at the slots of those modules. Where they compute otherwise
    than the paper, the config that is returned says so; what we cannot compute is refused.

    Raises: FileFormatError: with everything that is unknown, missing or cannot be reproduced.
    """
    data, source = read_json(directory / CONFIG), str(directory)
    name = str(data.get("name"))
    try:
        hub_of(blueprint)
        theirs = parse(data["config"], source)
        _check_model(data, blueprint)
        adapted = places(blueprint, theirs)
        problems = [problem for place in adapted for problem in refusals(place, theirs)]
        if problems:
            raise FileFormatError(problems)
        given = keys.sort(read_tensors(_weights(directory), allow_bin), name, blueprint, source)
        _check(adapted, theirs, given)
        tensors, ranks = _tensors(adapted, theirs, given)
    except FileFormatError as error:
        raise FileFormatError(_in_file(problem, source) for problem in error.problems) from None
    addresses = {key.rpartition(".")[0].removesuffix(".gate"): None for key in tensors}
    addresses.pop("shared", None)
    slots = [blueprint.slots[address] for address in addresses]
    targets = tuple(dict.fromkeys(f"{slot.sublayer}.{slot.role}" for slot in slots))
    return Content(
        name=name,
        config=theirs.method(targets, left_out(blueprint, theirs), ranks),
        tensors=tensors,
        addresses=tuple(addresses),
        heads={f"heads.{name}": {}} if (directory / HEAD).is_file() else {},
        source=source,
        facts={key: data.get(key) for key in ("model_name", "model_class", "model_type", "version")},
    )


def _in_file(problem: Problem, source: str) -> Problem:
    from dataclasses import replace

    return problem if problem.file else replace(problem, file=source)


def _check_model(data: Mapping[str, Any], blueprint: Blueprint) -> None:
    """Refuse an adapter of another family, whose shapes may fit by chance."""
    known = blueprint.interface.model_type
    if known is not None and data["model_type"] not in known:
        message = f"made for a model of type {data['model_type']!r}"
        raise FileFormatError(
            Problem("other-model", message, expected=f"this model is described as {listing(known)}")
        )


def _weights(directory: Path) -> Path:
    for file in WEIGHTS:
        if (directory / file).is_file():
            return directory / file
    raise FileFormatError(Problem("bad-file", f"holds no weights: neither {WEIGHTS[0]} nor {WEIGHTS[1]}"))


def _check(adapted: tuple[Place, ...], theirs: LoRAFile, given: keys.Keyed) -> None:
    """Refuse a file that has not got exactly the tensors that its config asks for in this model."""
    if not adapted:
        raise FileFormatError(
            Problem("empty-adapter", "the config adapts no module of this model, so that nothing is left")
        )
    wanted = {
        f"{place.host.path}.{name}": shape
        for place in adapted
        for name, shape in shapes(place, theirs).items()
    }
    found = {
        f"{path}.{name}": tensor for path, parts in given.parts.items() for name, tensor in parts.items()
    }
    problems = []
    for key in sorted(found.keys() - wanted.keys()):
        hint = did_you_mean(key, wanted)
        problems.append(Problem("unknown-tensors", "the config asks for no such tensor", key, "", hint))
    for key in sorted(wanted.keys() - found.keys()):
        problems.append(Problem("missing-tensors", "the file lacks this tensor", key))
    for key in sorted(wanted.keys() & found.keys()):
        if tuple(found[key].shape) != wanted[key]:
            message = f"has shape {tuple(found[key].shape)}, {wanted[key]} was expected"
            problems.append(Problem("other-shape", message, key))
    if theirs.kind not in ("vera", "dvora"):
        problems += [
            Problem("unknown-tensors", f"{theirs.kind} shares no tensors", base) for base in given.shared
        ]
    if problems:
        raise FileFormatError(problems)


def _tensors(
    adapted: tuple[Place, ...], theirs: LoRAFile, given: keys.Keyed
) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """Our tensors, and by how much the rank of a role (of all: 'shared') is multiplied."""
    tensors = {
        k: v for place in adapted for k, v in units(place, theirs, given.parts[place.host.path]).items()
    }
    ranks = {place.host.role: len(place.blocks) for place in adapted if place.by_blocks}
    for place in adapted:
        if not place.by_blocks and ranks.get(place.host.role, 1) != 1:
            message = f"{place.host.role!r} has several ranks in this model, which one config cannot say"
            raise FileFormatError(Problem("unsupported-slot", message, place.host.address))
    if theirs.kind in ("vera", "dvora"):
        modules = {given.modules[place.host.path]: place.host.shape or (0, 0) for place in adapted}
        matrices = join(given.shared, modules, theirs.r)
        for place in adapted:
            key = f"{place.host.address}.d"
            tensors[key] = matrices.spread(given.modules[place.host.path], tensors[key])
        tensors |= {"shared.A": matrices.A, "shared.B": matrices.B}
        ranks["shared"] = matrices.count
    return tensors, ranks
