"""Adapter -> directory in PEFT's format, giving the same numbers there; what PEFT cannot say is refused."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from adapterkit.adapter import Adapter
from adapterkit.errors import FileFormatError, Problem, listing
from adapterkit.files.disk import to_json, write_directory
from adapterkit.files.native import base_model
from adapterkit.files.peft import prompt
from adapterkit.files.peft.config import CONFIG, PREFIX_MOVES
from adapterkit.files.peft.names import refuse_unnamed
from adapterkit.files.peft.reading import PREFIX, WEIGHTS
from adapterkit.files.peft.saved import give_modules, own_modules
from adapterkit.methods.base import SlotConfig, Unit
from adapterkit.methods.dora import DoRA, DoRAConfig
from adapterkit.methods.ia3 import IA3Config, ScaleInput
from adapterkit.methods.lora import LoRA, LoRAConfig
from adapterkit.methods.prefix import PrefixTuningConfig
from adapterkit.methods.prompt import PromptTuningConfig
from adapterkit.methods.vera import VeRAConfig
from adapterkit.methods.weights import readable
from adapterkit.model.blueprint import Blueprint, Slot

Tensors = dict[str, torch.Tensor]
Units = Mapping[str, list[tuple[Slot, Any]]]
"""Path of a host -> what acts there: more than one unit where roles share a fused matrix."""


@dataclass(frozen=True)
class _Said:
    """What a method writes: tensors by key below PEFT's prefix, and fields of the config."""

    tensors: Tensors
    fields: dict[str, Any]


def write(directory: Path, adapter: Adapter, blueprint: Blueprint, head: bool | str) -> Path:
    """Write one adapter for `PeftModel.from_pretrained` on a model of the same class.

    Raises: FileFormatError: the method, an option, or what is adapted together has no expression in PEFT.
    """
    file = str(directory)
    refuse_unnamed(blueprint, file)
    if isinstance(adapter.config, PromptTuningConfig):
        vectors, fields = prompt.written(adapter, blueprint, file)
        return write_directory(directory, {WEIGHTS: vectors}, {CONFIG: to_json(_common(blueprint) | fields)})
    if isinstance(adapter.config, PrefixTuningConfig):
        expected = "adapterkit's own format"
        raise FileFormatError(Problem("peft-prompt", PREFIX_MOVES, expected=expected, file=file))
    writer = next((w for config, w in _METHODS.items() if type(adapter.config) is config), None)
    if writer is None:
        known = [*(config.method for config in _METHODS), PromptTuningConfig.method]
        expected = f"one of {listing(known)}, or adapterkit's own format"
        raise FileFormatError(
            Problem("peft-method", f"PEFT has no {adapter.config.method}", "", expected, file=file)
        )
    units: dict[str, list[tuple[Slot, Unit]]] = {}
    for slot in adapter.plan.slots:
        units.setdefault(slot.path, []).append((slot, adapter.units[slot.address]))
    saved, modules = give_modules(adapter, blueprint, head, file)
    said = writer(adapter, units, file)
    config = (
        _common(blueprint)
        | {
            "target_modules": exactly(units, [path for path, _ in own_modules(blueprint.model)], dotted=True),
            "modules_to_save": list(saved) or None,
            # Conv1D keeps its weight transposed; PEFT sees that for itself, but warns if this does not say so
            "fan_in_fan_out": all(slot.transposed for slot in adapter.plan.slots),
        }
        | said.fields
    )
    tensors = {f"{PREFIX}{key}": value for key, value in (said.tensors | modules).items()}
    if isinstance(adapter.config, VeRAConfig) and adapter.shared is not None:
        tensors |= {f"base_model.vera_{name}": value for name, value in adapter.shared.state_dict().items()}
    return write_directory(directory, {WEIGHTS: tensors}, {CONFIG: to_json(config)})


def _common(blueprint: Blueprint) -> dict[str, Any]:
    """Fields that every type has."""
    known = base_model(blueprint.model)
    return {
        "auto_mapping": None,
        "base_model_name_or_path": known["id"],
        "revision": known["revision"],
        "task_type": None,
        "inference_mode": True,
    }


def exactly(wanted: Iterable[str], among: Iterable[str], *, dotted: bool) -> list[str] | str:
    """What PEFT takes for exactly these paths: a list, or a pattern where one ends another path.

    Args: dotted: PEFT compares whole names at the end, not letters.
    """
    paths = list(wanted)
    ends = tuple(f".{path}" if dotted else path for path in paths)
    if all(other in paths or not other.endswith(ends) for other in among):
        return paths
    return "|".join(map(re.escape, paths))


def _refuse(problems: list[Problem]) -> None:
    if problems:
        raise FileFormatError(problems)


# -- LoRA and DoRA


def _lora(adapter: Adapter, units: Units, file: str) -> _Said:
    config = adapter.config
    assert isinstance(config, LoRAConfig)
    problems = []
    if config.gating:
        problems.append(Problem("peft-gating", "PEFT has no gates", "gating", file=file))
    if isinstance(config, DoRAConfig):
        if not config.norm_scaled:
            problems.append(Problem("peft-option", "PEFT's norm sees alpha / R", "norm_scaled", file=file))
        if config.scale_bias and any(
            getattr(slot.module, "bias", None) is not None for slot in adapter.plan.slots
        ):
            problems.append(Problem("peft-option", "PEFT does not scale the bias", "scale_bias", file=file))
        for path, there in units.items():
            if len(there) > 1 and any(slot.rows is None for slot, _ in there):
                message = "is decomposed as a whole and in parts; PEFT does so once"
                problems.append(Problem("peft-both", message, path, file=file))
    _refuse(problems)
    tensors: Tensors = {}
    sizes: dict[str, tuple[int, float]] = {}
    for path, there in units.items():
        a, b, scaling = _joined(there)
        rank = a.shape[0]
        sizes[path] = rank, scaling * (math.sqrt(rank) if config.rslora else rank)
        tensors |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
        if isinstance(config, DoRAConfig):
            tensors[f"{path}.lora_magnitude_vector"] = _magnitude(there)
    rank = Counter(rank for rank, _ in sizes.values()).most_common(1)[0][0]
    alpha = Counter(alpha for _, alpha in sizes.values()).most_common(1)[0][0]
    # '^' keeps a pattern from being the end of a longer path
    fields = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": _whole(alpha),
        "rank_pattern": {f"^{re.escape(path)}": r for path, (r, _) in sizes.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(path)}": _whole(a) for path, (_, a) in sizes.items() if a != alpha},
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "use_dora": isinstance(config, DoRAConfig),
        "bias": "none",
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    return _Said(tensors, fields)


def _whole(number: float) -> int | float:
    return int(number) if number == int(number) else number


def _joined(there: list[tuple[Slot, LoRA]]) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A (R, D_in), B (D_out, R) and scaling of one host: the ranks of all units there, side by side.

    A start that was subtracted (PiSSA, OLoRA) is one more unit: B A - B0 A0 = [B, -B0] [A; A0].
    """
    scaling = there[0][1].scaling
    lows, highs = [], []
    for slot, unit in there:
        pairs = (
            [(unit.A, unit.B)]
            if unit.A0 is None or unit.B0 is None
            else [(unit.A, unit.B), (unit.A0, -unit.B0)]
        )
        for a, b in pairs:
            # equal scalings leave every bit as it is
            b = b if unit.scaling == scaling else b * (unit.scaling / scaling)
            lows.append(a.detach())
            highs.append(_spread(slot, b.detach()))
    return torch.cat(lows), torch.cat(highs, dim=1), scaling


def _spread(slot: Slot, rows: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
    """Rows of a role in the height of its host."""
    if slot.rows is None:
        return rows
    whole = rows.new_full((slot.rows.groups * slot.rows.width, *rows.shape[1:]), fill)
    slot.rows.put(whole, rows)
    return whole


def _magnitude(there: list[tuple[Slot, DoRA]]) -> torch.Tensor:
    """Magnitudes (D_out,) of one host; rows that no unit adapts get the norm of their weight, a gain of 1."""
    slot, unit = there[0]
    if slot.rows is None:
        return unit.m.detach()
    whole: torch.Tensor = torch.linalg.vector_norm(readable(replace(slot, rows=None), "DoRA on rows"), dim=1)
    for slot, unit in there:
        assert slot.rows is not None
        slot.rows.put(whole, unit.m.detach())
    return whole


# -- (IA)^3


def _ia3(adapter: Adapter, units: Units, file: str) -> _Said:
    config = adapter.config
    assert isinstance(config, IA3Config)
    problems = []
    if config.gating:
        problems.append(Problem("peft-gating", "PEFT has no gates", "gating", file=file))
    if config.alpha != 1:
        problems.append(
            Problem("peft-option", "PEFT has no constant factor beside the vectors", "alpha", file=file)
        )
    tensors: Tensors = {}
    forward = []
    for path, there in units.items():
        inputs = [unit for _, unit in there if isinstance(unit, ScaleInput)]
        if inputs and len(there) > 1:
            problems.append(
                Problem("peft-both", "PEFT scales either input or output of a module", path, file=file)
            )
        elif inputs:
            forward.append(path)
            tensors[f"{path}.ia3_l"] = inputs[0].scale.detach()[None]
        else:
            whole = torch.stack([_spread(slot, unit.scale.detach(), 1.0) for slot, unit in there]).prod(dim=0)
            tensors[f"{path}.ia3_l"] = whole[:, None]
    _refuse(problems)
    return _Said(tensors, {"peft_type": "IA3", "feedforward_modules": exactly(forward, units, dotted=False)})


# -- VeRA


def _vera(adapter: Adapter, units: Units, file: str) -> _Said:
    config = adapter.config
    assert isinstance(config, VeRAConfig)
    problems = []
    if config.scaling != 1:
        problems.append(Problem("peft-option", "PEFT's VeRA has no scale", "alpha", file=file))
    tensors: Tensors = {}
    for path, there in units.items():
        slot, unit = there[0]
        if slot.rows is not None:
            message = "is part of a fused matrix; PEFT's VeRA takes it as a whole"
            problems.append(Problem("peft-rows", message, slot.address, "the target 'fused'", file=file))
        tensors |= {f"{path}.vera_lambda_d": unit.d.detach(), f"{path}.vera_lambda_b": unit.b.detach()}
    _refuse(problems)
    fields = {
        "peft_type": "VERA",
        "r": config.r,
        "vera_dropout": config.dropout,
        "d_initial": config.d_initial,
        "save_projection": True,
        "projection_prng_key": 0,
        "bias": "none",
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    return _Said(tensors, fields)


_METHODS: dict[type[SlotConfig], Callable[[Adapter, Units, str], _Said]] = {
    LoRAConfig: _lora,
    DoRAConfig: _lora,
    IA3Config: _ia3,
    VeRAConfig: _vera,
}
