"""PEFT's directory -> Content: every tensor has a place, every place its tensors, or it is refused."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from adapterkit.errors import FileFormatError, Problem, did_you_mean
from adapterkit.files.content import Content
from adapterkit.files.disk import read_json, read_tensors
from adapterkit.files.peft import prompt
from adapterkit.files.peft.config import CONFIG, IA3File, LoRAFile, PeftFile, PromptFile, VeRAFile, parse
from adapterkit.files.peft.names import hosts, known, lookup, refuse_unnamed
from adapterkit.files.peft.saved import take_modules
from adapterkit.methods.base import MethodConfig
from adapterkit.methods.dora import DoRAConfig
from adapterkit.methods.ia3 import IA3Config
from adapterkit.methods.lora import LoRAConfig
from adapterkit.methods.vera import VeRAConfig
from adapterkit.model.blueprint import Blueprint, Slot

WEIGHTS = "adapter_model.safetensors"
WEIGHTS_BIN = "adapter_model.bin"
PREFIX = "base_model.model."
SHARED = {"base_model.vera_A": "A", "base_model.vera_B": "B"}
# what follows the path of a module in a key -> tensor of a unit
PARTS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_magnitude_vector": "m",
    "lora_magnitude_vector.weight": "m",
    "ia3_l": "scale",
    "vera_lambda_d": "d",
    "vera_lambda_b": "b",
}

Tensors = dict[str, torch.Tensor]
T = TypeVar("T")


@dataclass(frozen=True)
class _Found:
    """Contents of a directory, with every module of it placed."""

    said: Any
    """The config, of the class that belongs to the type."""
    paths: dict[Slot, str]
    """Slot -> its path in the file."""
    units: dict[Slot, Tensors]
    rest: Tensors
    """Tensors that belong to no unit."""
    source: str

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(slot.role for slot in self.units))


def read(directory: Path, blueprint: Blueprint, allow_bin: bool) -> Content:
    """The adapter in a directory that PEFT wrote.

    Raises: FileFormatError: a config that cannot be honoured, or tensors that do not fit the model.
    """
    source = str(directory)
    refuse_unnamed(blueprint, source)
    data = read_json(directory / CONFIG)
    said = parse(data, str(directory / CONFIG))
    only_bin = (directory / WEIGHTS_BIN).is_file() and not (directory / WEIGHTS).is_file()
    tensors = read_tensors(directory / (WEIGHTS_BIN if only_bin else WEIGHTS), allow_bin)
    # PEFT computes in float32 where a file has half precision
    half = {key for key, value in tensors.items() if value.is_floating_point() and value.element_size() < 4}
    tensors = {key: value.float() if key in half else value for key, value in tensors.items()}
    if isinstance(said, PromptFile):
        return prompt.content(said, tensors, blueprint, source, data)
    units, rest = _split(tensors, source)
    placed = _place(units, said, blueprint, source)
    found = _Found(
        said, {s: p for p, s in placed.items()}, {s: units[p] for p, s in placed.items()}, rest, source
    )
    config, shared = _METHODS[type(said)](found)
    heads, poolers = take_modules(rest, said.modules_to_save or (), blueprint, source)
    return Content(
        name="default",
        config=config,
        tensors=shared
        | {f"{s.address}.{name}": value for s, unit in found.units.items() for name, value in unit.items()},
        addresses=tuple(slot.address for slot in found.units),
        heads=heads,
        poolers=poolers,
        source=source,
        facts=data,
    )


def _split(tensors: Tensors, source: str) -> tuple[dict[str, Tensors], Tensors]:
    """Tensors of units by module path, and those that belong to no unit."""
    units: dict[str, Tensors] = defaultdict(dict)
    rest: Tensors = {}
    problems = []
    for key, value in tensors.items():
        bare = key.removeprefix(PREFIX)
        part = next((part for part in PARTS if bare.endswith(f".{part}")), None)
        if part is not None:
            units[bare.removesuffix(f".{part}")][PARTS[part]] = value
        elif ".lora_embedding_" in bare:
            problems.append(
                Problem("peft-embedding", "updates an embedding, which no method here does", key, file=source)
            )
        elif bare.endswith(".lora_B.bias"):
            problems.append(
                Problem("peft-bias", "is the bias of an update, which no method here has", key, file=source)
            )
        else:
            rest[bare] = value
    if problems:
        raise FileFormatError(problems)
    if not units:
        raise FileFormatError(Problem("bad-file", "holds no tensors of an adapter", file=source))
    return units, rest


def _place(
    units: Mapping[str, Tensors], said: PeftFile, blueprint: Blueprint, source: str
) -> dict[str, Slot]:
    """Path in the file -> slot, for every module of the file.

    Raises: FileFormatError: a module that the model has not got, tensors that PEFT would not use, modules
        that it would adapt and that have no tensors.
    """
    names = known(blueprint)
    meant, slots = lookup(names), hosts(blueprint)
    problems: list[Problem] = []
    placed: dict[str, Slot] = {}
    for path in units:
        paths = meant.get(path, set())
        taken = {slot.path for slot in placed.values()}
        if len(paths) > 1 or paths & taken:
            why = f"may mean {' or '.join(sorted(paths))}" if len(paths) > 1 else "is there under two names"
            problems.append(
                Problem("peft-ambiguous", why, path, "the class it was trained with", file=source)
            )
        elif paths:
            placed[path] = slots[next(iter(paths))]
        else:
            message = "is no linear map that the interface knows"
            problems.append(
                Problem("no-such-slot", message, path, "", did_you_mean(path, meant), file=source)
            )
        if said.target_modules is not None and not said.matches(path):
            message = "has tensors, but the config does not name it: PEFT leaves it out"
            problems.append(Problem("peft-unmatched", message, path, file=source))
    if not problems:
        kinds = {kind for path, slot in placed.items() for kind, name in names[slot.path] if name == path}
        for path in names.keys() - {slot.path for slot in placed.values()}:
            if any(kind in kinds and said.matches(name) for kind, name in names[path]):
                message = "is named by the config, but the file has no tensors of it"
                problems.append(Problem("missing-tensors", message, path, file=source))
    if problems:
        raise FileFormatError(problems)
    return placed


def _lora(found: _Found) -> tuple[MethodConfig, Tensors]:
    said: LoRAFile = found.said
    method = DoRAConfig if said.use_dora else LoRAConfig
    config = method(
        targets=found.targets,
        r=spread({slot: said.rank(path) for slot, path in found.paths.items()}),
        alpha=spread({slot: said.alpha(path) for slot, path in found.paths.items()}),
        dropout=said.lora_dropout,
        rslora=said.use_rslora,
    )
    return config, {}


def _ia3(found: _Found) -> tuple[MethodConfig, Tensors]:
    """A vector that scales the input is a row in the file, one that scales the output a column."""
    said: IA3File = found.said
    problems, sides = [], {}
    for slot, unit in found.units.items():
        path = found.paths[slot]
        sides[slot] = "input" if said.is_feedforward(path) else "output"
        d_out, d_in = slot.shape or (0, 0)
        wanted = (1, d_in) if sides[slot] == "input" else (d_out, 1)
        for name, value in unit.items():
            if tuple(value.shape) != wanted:
                message = f"has shape {tuple(value.shape)}, {wanted} was expected to scale the {sides[slot]}"
                problems.append(Problem("other-shape", message, f"{path}.ia3_l", file=found.source))
            unit[name] = value.flatten()
    if problems:
        raise FileFormatError(problems)
    usual = IA3Config()
    unusual = {slot: side for slot, side in sides.items() if side != usual.side(slot)}
    alike = {slot.role for slot in unusual}.isdisjoint(slot.role for slot in sides.keys() - unusual.keys())
    return IA3Config(
        targets=found.targets,
        sides={slot.role if alike else slot.address: side for slot, side in unusual.items()},
    ), {}


def _vera(found: _Found) -> tuple[MethodConfig, Tensors]:
    said: VeRAFile = found.said
    shared = {f"shared.{name}": found.rest.pop(key) for key, name in SHARED.items() if key in found.rest}
    if len(shared) < len(SHARED):
        message = "the file lacks the frozen matrices; drawn again, they need not be the same"
        expected = "save_projection=True when PEFT saves"
        raise FileFormatError(
            Problem("peft-projection", message, "save_projection", expected, file=found.source)
        )
    return VeRAConfig(
        targets=found.targets, r=said.r, d_initial=said.d_initial, dropout=said.vera_dropout
    ), shared


_METHODS: dict[type[PeftFile], Callable[[_Found], tuple[MethodConfig, Tensors]]] = {
    LoRAFile: _lora,
    IA3File: _ia3,
    VeRAFile: _vera,
}


def spread(values: Mapping[Slot, T]) -> T | dict[str, T]:
    """One value if all slots have the same, else one for each role, else one for each address."""
    if len(set(values.values())) == 1:
        return next(iter(values.values()))
    roles = {slot.role: value for slot, value in values.items()}
    if all(roles[slot.role] == value for slot, value in values.items()):
        return roles
    return {slot.address: value for slot, value in values.items()}
