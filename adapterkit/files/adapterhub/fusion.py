"""A directory with the weights of an AdapterFusion: `<module>.adapter_fusion_layer.<name>.<parameter>`.

The adapters that are fused have directories of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from adapterkit.adapter import Adapter
from adapterkit.errors import FileFormatError, Problem
from adapterkit.files.adapterhub import keys, reader
from adapterkit.files.adapterhub.comparison import check_model, differences, told_of, weights_file
from adapterkit.files.adapterhub.config import validated
from adapterkit.files.adapterhub.member import Shapes
from adapterkit.files.adapterhub.places import hub_of
from adapterkit.files.adapterhub.spelling import spell, unsaid
from adapterkit.files.adapterhub.writing import facts
from adapterkit.files.content import Content
from adapterkit.files.disk import read_json, read_tensors, to_json, write_directory
from adapterkit.files.present import state_dict
from adapterkit.methods.fusion import BranchFusion, FusionConfig
from adapterkit.model.blueprint import Blueprint
from adapterkit.model.branches import Branch, branches

CONFIG = "adapter_fusion_config.json"
WEIGHTS = ("model_adapter_fusion.safetensors", "pytorch_model_adapter_fusion.bin")
_NO_DROPOUT = 1e-12
"""Drops nothing, and is not 0."""


class FusionFile(BaseModel):
    """`config` of an adapter_fusion_config.json; fields of adapters 1.3.0, AdapterFusionConfig."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: bool
    query: bool
    value: bool
    query_before_ln: bool
    regularization: bool
    residual_before: bool
    temperature: bool
    value_before_softmax: bool
    value_initialized: bool | str
    dropout_prob: float | None = None

    def shapes(self, width: int) -> Shapes:
        """Every tensor that they keep at a branch (adapters 1.3.0, methods/modeling.py, BertFusion)."""
        found: Shapes = {}
        for word in ("query", "key", "value"):
            if getattr(self, word):
                found[f"{word}.weight"] = (width, width)
                found |= {f"{word}.bias": (width,)} if word != "value" else {}
        # without projections they have a layer that nothing reads
        return found or {"dense.weight": (1, width), "dense.bias": (1,)}

    def config(
        self, children: tuple[str, ...], places: tuple[str, ...], blueprint: Blueprint
    ) -> FusionConfig:
        """What it means on this model."""
        # theirs takes 0 for what is not said (adapters 1.3.0, methods/bottleneck.py, add_fusion_layer)
        dropout = self.dropout_prob or _dropout(blueprint)
        options = self.model_dump(exclude={"dropout_prob", "temperature", "value_initialized"})
        return FusionConfig(
            children=children,
            places=places,
            branch="before_norm" if hub_of(blueprint).hooked else "after_norm",
            adds_stream=True,
            partial=True,
            dropout=0.0 if dropout == _NO_DROPOUT else dropout,
            value_initialized=bool(self.value_initialized),
            **options,
        )


def _dropout(blueprint: Blueprint) -> float:
    return float(getattr(blueprint.model.config, "attention_probs_dropout_prob", 0.0))


def read(directory: Path, blueprint: Blueprint, allow_bin: bool) -> Content:
    """The fusion in a directory of AdapterHub; it stands at every branch that the file has weights for.

    Raises: FileFormatError: with everything that is unknown, missing or cannot be reproduced.
    """
    data = read_json(directory / CONFIG)
    with told_of(directory):
        return _content(data, directory, blueprint, allow_bin)


def _content(data: Mapping[str, Any], directory: Path, blueprint: Blueprint, allow_bin: bool) -> Content:
    check_model(data, blueprint)
    theirs, name = validated(FusionFile, data.get("config", {})), str(data.get("name"))
    problems = list(_refusals(theirs, blueprint))
    if problems:
        raise FileFormatError(problems)
    given = keys.sort(read_tensors(weights_file(directory, WEIGHTS), allow_bin), name, blueprint)
    acted_on = branches(blueprint, hub_of(blueprint).hooked)
    places = tuple(address for address in acted_on if ("fusion", address) in given.parts)
    widths = {address: (acted_on[address].shape or (0, 0))[0] for address in places}
    problems = list(differences([{("fusion", a): theirs.shapes(w) for a, w in widths.items()}], given))
    if problems:
        raise FileFormatError(problems)
    listed = data.get("adapter_names") or name.split(",")
    if not isinstance(listed, list):
        raise FileFormatError(Problem("bad-file", f"{listed!r} is no list of names", "adapter_names"))
    children = tuple(map(str, listed))
    return Content(
        name="+".join(children) if name == ",".join(children) else name,
        config=theirs.config(children, places, blueprint),
        tensors=dict(_tensors(given)),
        addresses=places,
        source=str(directory),
        facts={key: data.get(key) for key in ("model_name", "model_class", "model_type", "version")},
    )


def _refusals(theirs: FusionFile, blueprint: Blueprint) -> Iterator[Problem]:
    if hub_of(blueprint).own_adapters == "removed":
        message = "AdapterHub fuses adapters of this model without the model's own adapters"
        yield Problem("not-reproducible", message)
    if theirs.temperature:
        message = "AdapterHub divides the scores by a number that starts at 50 and falls with every call"
        hint = "after 980 calls it is 1, which is what 'temperature': false means"
        yield Problem("not-reproducible", message, "temperature", hint=hint)


def _tensors(given: keys.Keyed) -> Iterator[tuple[str, torch.Tensor]]:
    for (_, address), own in given.parts.items():
        for name, tensor in own.items():
            if not name.startswith("dense."):
                yield f"{address}.{name}", tensor


def _branches(adapter: Adapter) -> set[str]:
    return {slot.address for slot in adapter.plan.slots if isinstance(slot, Branch)}


def name_of(children: Sequence[str], name: str) -> str:
    """What theirs calls a fusion: one without a name of its own by its adapters."""
    return ",".join(children) if name == "+".join(children) else name


def write(directory: Path, fusion: Adapter, adapters: Mapping[str, Adapter], blueprint: Blueprint) -> None:
    """Write a fusion so that `adapters` loads it, beside its adapters, with the same numbers.

    Raises: FileFormatError: their format, or their library on this model, cannot have it; nothing is written.
    """
    config = fusion.config
    assert isinstance(config, FusionConfig)
    if not all(isinstance(unit, BranchFusion) for unit in fusion.units.values()):
        raise unsaid("a fusion of updates of weights")
    children = [adapters[child] for child in config.children]
    for child in children:
        if "configs" in spell(child.config, child.plan.slots, blueprint):
            raise unsaid(f"a fusion of {child.name!r}, which is a union")
        if _branches(child) - _branches(children[-1]):
            message = f"a fusion where {child.name!r} acts without {children[-1].name!r}, the last"
            raise unsaid(f"{message}: its library has no number there")
    dropout = None if config.dropout == _dropout(blueprint) else config.dropout or _NO_DROPOUT
    same = config.model_dump(include=set(FusionFile.model_fields) - {"temperature"})
    theirs = FusionFile(temperature=False, dropout_prob=dropout, **same)
    reader.refuse(_refusals(theirs, blueprint))
    read = theirs.config(config.children, config.places, blueprint)
    parallel = any(getattr(child.config, "is_parallel", False) for child in children)
    for name in ("temperature", "branch", *(("adds_stream",) if parallel else ())):
        if getattr(config, name) != getattr(read, name):
            value = getattr(config, name)
            raise unsaid(f"{name}={value!r}; it would be read as {getattr(read, name)!r}", name)
    name = name_of(config.children, fusion.name)
    spelled, tensors = keys.spelled(blueprint), {}
    for slot in fusion.plan.slots:
        start = f"{spelled['fusion', slot.address]}.{keys.MARKS['fusion']}.{name}"
        own = state_dict(fusion.units[slot.address])
        for key, shape in theirs.shapes((slot.shape or (0, 0))[0]).items():
            tensors[f"{start}.{key}"] = own.get(key, torch.zeros(shape)).detach()
    data = {"adapter_names": config.children, "config": theirs.model_dump(), "name": name, **facts(blueprint)}
    write_directory(directory, {WEIGHTS[0]: tensors}, {CONFIG: to_json(data)})
