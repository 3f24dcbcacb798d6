"""Reading a directory of AdapterHub's `adapters`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapterkit.errors import FileFormatError, Problem, did_you_mean, listing
from adapterkit.files.adapterhub import keys
from adapterkit.files.adapterhub.config import LoRAFile, parse
from adapterkit.files.adapterhub.places import Place, hub_of, left_out, places
from adapterkit.files.adapterhub.shared import share
from adapterkit.files.adapterhub.tensors import Units, refusals, shapes, units
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

    Their `<module>.loras.<name>.<parameter>` become units at the slots of those modules. Where they compute
    otherwise than the paper, the config that is returned says so; what we cannot compute is refused.

    Raises: FileFormatError: with everything that is unknown, missing or cannot be reproduced.
    """
    data = read_json(directory / CONFIG)
    try:
        return _content(data, directory, blueprint, allow_bin)
    except FileFormatError as error:
        source = str(directory)
        raise FileFormatError(p if p.file else replace(p, file=source) for p in error.problems) from None


def _content(data: Mapping[str, Any], directory: Path, blueprint: Blueprint, allow_bin: bool) -> Content:
    hub_of(blueprint)
    theirs, name = parse(data["config"]), str(data.get("name"))
    _check_model(data, blueprint)
    adapted = places(blueprint, theirs)
    _refuse(problem for place in adapted for problem in refusals(place, theirs))
    given = keys.sort(read_tensors(_weights(directory), allow_bin), name, blueprint)
    _refuse(_differences(adapted, theirs, given))
    found: Units = {}
    for place in adapted:
        found |= units(place, theirs, given.parts[place.host.path])
    addresses = tuple(found)
    if theirs.shares:
        found, joined = share(found, adapted, given, theirs.r)
        theirs = theirs.model_copy(update={"r": joined * theirs.r, "alpha": joined * theirs.alpha})
    times = {place.host.address: len(place.blocks) for place in adapted if place.whole}
    return Content(
        name=name,
        config=theirs.method([blueprint.slots[a] for a in addresses], left_out(blueprint, theirs), times),
        tensors={f"{a}.{name}": tensor for a, unit in found.items() for name, tensor in unit.items()},
        addresses=addresses,
        heads={f"heads.{name}": {}} if (directory / HEAD).is_file() else {},
        source=str(directory),
        facts={key: data.get(key) for key in ("model_name", "model_class", "model_type", "version")},
    )


def _refuse(problems: Iterable[Problem]) -> None:
    found = list(problems)
    if found:
        raise FileFormatError(found)


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


def _differences(adapted: tuple[Place, ...], theirs: LoRAFile, given: keys.Keyed) -> Iterator[Problem]:
    """Where a file has not got exactly the tensors that its config asks for in this model."""
    if not adapted:
        yield Problem(
            "empty-adapter", "the config adapts no module of this model, so that there is nothing to load"
        )
    wanted = {(place.host.path, n): shape for place in adapted for n, shape in shapes(place, theirs).items()}
    found = {(path, n): tensor for path, part in given.parts.items() for n, tensor in part.items()}
    names = {key: ".".join(key) for key in wanted}
    for key in found.keys() - wanted.keys():
        hint = did_you_mean(".".join(key), names.values())
        yield Problem("unknown-tensors", "the config asks for no such tensor", ".".join(key), "", hint)
    for key in wanted.keys() - found.keys():
        yield Problem("missing-tensors", "the file lacks this tensor", names[key])
    for key in wanted.keys() & found.keys():
        if tuple(found[key].shape) != wanted[key]:
            message = f"has shape {tuple(found[key].shape)}, {wanted[key]} was expected"
            yield Problem("other-shape", message, names[key])
    if not theirs.shares:
        for base in given.shared:
            yield Problem("unknown-tensors", f"{theirs.kind} shares no tensors", f"{base}.shared_parameters")
