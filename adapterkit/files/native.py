"""adapterkit's own format: `adapter.safetensors`, keyed by slot address, and `adapter_config.json`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapterkit.adapter import Adapter
from adapterkit.errors import FileFormatError, Problem, did_you_mean, listing
from adapterkit.files import manifest
from adapterkit.files.content import Content
from adapterkit.files.disk import read_json, read_tensors, to_json, write_directory
from adapterkit.inject.injector import device_of, dtype_of
from adapterkit.methods.names import parse
from adapterkit.methods.targets import Selection
from adapterkit.model.blueprint import Blueprint, Head, Slot
from adapterkit.planning import Draft, Plan, describe
from adapterkit.versions import __version__, installed

CONFIG = "adapter_config.json"
WEIGHTS = "adapter.safetensors"


def write(directory: Path, adapter: Adapter, blueprint: Blueprint, head: bool | str = "auto") -> Path:
    """Write one adapter; its heads, and the poolers of the base that feed them, go with it."""
    tensors = {
        f"{address}.{name}": value
        for address, module in adapter.modules().items()
        if address not in adapter.heads and address not in adapter.poolers
        for name, value in module.state_dict().items()
    }
    heads = adapter.heads if head else {}
    for address, module in heads.items():
        tensors |= {f"{address}.{name}": value for name, value in module.state_dict().items()}
    for pooler in blueprint.poolers:
        # a pooler that came with the adapter goes with it, even where there is no head
        if heads or (head and pooler.address in adapter.poolers):
            module = adapter.poolers.get(pooler.address, pooler.module)
            tensors |= {
                f"{pooler.address}.{name}": value
                for name, value in module.state_dict().items()
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
    return to_content(data, read_tensors(directory / WEIGHTS, allow_bin=False), str(directory))


def to_content(data: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], source: str) -> Content:
    """Config and tensors of native files, or of a manifest and its tensors, as content."""
    try:
        slots = {str(address): (int(shape[0]), int(shape[1])) for address, shape in data["slots"].items()}
        paths = [str(path) for path in data["heads"]]
        name, config = str(data["name"]), data["config"]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
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
    return Content(name, parse(config), units, tuple(slots), heads, poolers, slots, source, data)


def slots(blueprint: Blueprint, content: Content) -> tuple[Slot, ...]:
    """The slots of this model that the content adapts.

    Raises: FileFormatError: the model has not got them all, or in other shapes.
    """
    problems, found = [], []
    available = content.config.available(blueprint)
    for address in content.addresses or ():
        slot = available.get(address)
        if slot is None:
            hint = did_you_mean(address, available)
            problems.append(
                Problem("no-such-slot", "this model has no such slot", address, "", hint, file=content.source)
            )
        elif address in content.shapes and tuple(content.shapes[address]) != slot.shape:
            message = f"made for a slot of shape {content.shapes[address]}; here it is {slot.shape}"
            problems.append(Problem("other-shape", message, address, file=content.source))
        else:
            found.append(slot)
    if problems or not found:
        raise FileFormatError(problems or [Problem("bad-file", "holds no adapter", file=content.source)])
    order = {address: i for i, address in enumerate(available)}
    return tuple(sorted(found, key=lambda slot: order[slot.address]))


def check_heads(blueprint: Blueprint, content: Content, head: bool | str) -> tuple[Head, ...]:
    """The heads that come from the file: all of the model, or none with `head=False`.

    Raises: FileFormatError: the file has other heads than the model; no head is ever left at random.
    """
    if head is False:
        return ()
    here, there = {found.path for found in blueprint.heads}, set(content.heads)
    problems = [
        Problem(
            "head-missing",
            f"the model has a head {path!r} that the file lacks",
            path,
            _HEAD,
            file=content.source,
        )
        for path in sorted(here - there)
    ]
    problems += [
        Problem(
            "head-unknown",
            f"the file has a head {path!r} that the model lacks",
            path,
            _HEAD,
            file=content.source,
        )
        for path in sorted(there - here)
    ]
    if problems:
        raise FileFormatError(problems)
    return blueprint.heads


_HEAD = "the class of model that the adapter was trained with, or head=False"


def planned(
    blueprint: Blueprint,
    content: Content,
    name: str,
    slots: tuple[Slot, ...],
    heads: tuple[Head, ...],
    draft: Draft,
) -> Plan:
    """The plan of an adapter that comes from a file."""
    return describe(blueprint, content.config, name, Selection(slots, ()), heads, draft)


def fill(plan: Plan, draft: Draft, content: Content) -> None:
    """Give the units of a plan (on the meta device) their hosts' device and the file's tensors.

    Raises: FileFormatError: with every tensor that is unknown, missing or of another shape.
    """
    hosts = {slot.address: slot.module for slot in plan.slots}
    hosts["shared"] = plan.slots[0].module
    wanted = {
        f"{address}.{key}": (module, key, value)
        for address, module in draft.modules().items()
        for key, value in module.state_dict(keep_vars=True).items()
    }
    problems = compare(
        {key: tuple(value.shape) for key, (_, _, value) in wanted.items()}, content.tensors, content.source
    )
    if problems:
        raise FileFormatError(problems)
    for address, module in draft.modules().items():
        own = {key: content.tensors[f"{address}.{key}"] for key in module.state_dict()}
        if not own:
            continue
        dtype = next(iter(own.values())).dtype
        module.to_empty(device=device_of(hosts[address]))
        module.to(dtype if dtype.is_floating_point else dtype_of(hosts[address], nn.Module(), "float32"))
        module.load_state_dict(own)


def compare(
    wanted: Mapping[str, tuple[int, ...]], given: Mapping[str, torch.Tensor], source: str
) -> list[Problem]:
    """What is unknown, missing or of another shape."""
    problems = []
    for key in sorted(given.keys() - wanted.keys()):
        hint = did_you_mean(key, wanted)
        problems.append(
            Problem("unknown-tensors", "the adapter has no such tensor", key, "", hint, file=source)
        )
    for key in sorted(wanted.keys() - given.keys()):
        problems.append(Problem("missing-tensors", "the file lacks this tensor", key, file=source))
    for key in sorted(wanted.keys() & given.keys()):
        if tuple(given[key].shape) != wanted[key]:
            message = f"has shape {tuple(given[key].shape)}, {wanted[key]} was expected"
            problems.append(Problem("other-shape", message, key, file=source))
    return problems


def filled_head(module: nn.Module, head: Head, content: Content) -> nn.Module:
    """A copy of a head with the file's tensors.

    Raises: FileFormatError: they do not fit, other labels for example.
    """
    own = content.heads[head.path]
    shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    problems = compare(shapes, own, content.source)
    if problems:
        hint = f"heads here: {listing(f'{key} {shape}' for key, shape in shapes.items())}"
        raise FileFormatError(
            [*problems, Problem("head-shape", "the head does not fit", head.path, hint, _HEAD)]
        )
    module.load_state_dict(dict(own))
    return module


def filled_poolers(
    blueprint: Blueprint, content: Content, copy: Callable[[nn.Module], nn.Module]
) -> dict[Head, nn.Module]:
    """Copies of the poolers whose tensors in the file differ from the model's: newly initialised ones come
    back.

    Raises: FileFormatError: the file has a pooler that the model lacks, or of another shape.
    """
    found: dict[Head, nn.Module] = {}
    unknown = content.poolers.keys() - {pooler.address for pooler in blueprint.poolers}
    if unknown:
        message = "the model has no such pooler"
        raise FileFormatError(
            Problem("unknown-tensors", message, address, expected=_HEAD, file=content.source)
            for address in unknown
        )
    for pooler in blueprint.poolers:
        given = content.poolers.get(pooler.address)
        if given is None:
            continue
        plain = copy(pooler.module)
        own = plain.state_dict()
        problems = compare({key: tuple(value.shape) for key, value in own.items()}, given, content.source)
        if problems:
            raise FileFormatError(problems)
        if any(not torch.equal(own[key].cpu(), given[key].cpu().to(own[key].dtype)) for key in own):
            plain.load_state_dict(dict(given))
            found[pooler] = plain
    return found
