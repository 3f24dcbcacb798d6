"""A directory with the weights of an AdapterFusion: `<module>.adapter_fusion_layer.<name>.<parameter>`.

The adapters that are fused have directories of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from adapterkit.errors import FileFormatError, Problem
from adapterkit.files.adapterhub import keys
from adapterkit.files.adapterhub.comparison import check_model, differences, told_of, weights_file
from adapterkit.files.adapterhub.config import validated
from adapterkit.files.adapterhub.member import Shapes
from adapterkit.files.adapterhub.places import hub_of
from adapterkit.files.content import Content
from adapterkit.files.disk import read_json, read_tensors
from adapterkit.methods.fusion import FusionConfig
from adapterkit.model.blueprint import Blueprint
from adapterkit.model.branches import branches

CONFIG = "adapter_fusion_config.json"
WEIGHTS = ("model_adapter_fusion.safetensors", "pytorch_model_adapter_fusion.bin")


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


def read(directory: Path, blueprint: Blueprint, allow_bin: bool) -> Content:
    """The fusion in a directory of AdapterHub; it stands at every branch that the file has weights for.

    Raises: FileFormatError: with everything that is unknown, missing or cannot be reproduced.
    """
    data = read_json(directory / CONFIG)
    with told_of(directory):
        return _content(data, directory, blueprint, allow_bin)


def _content(data: Mapping[str, Any], directory: Path, blueprint: Blueprint, allow_bin: bool) -> Content:
    hub = hub_of(blueprint)
    check_model(data, blueprint)
    theirs, name = validated(FusionFile, data.get("config", {})), str(data.get("name"))
    problems = list(_refusals(theirs))
    if hub.own_adapters == "removed":
        message = "AdapterHub fuses adapters of this model without the model's own adapters"
        problems.append(Problem("not-reproducible", message))
    if problems:
        raise FileFormatError(problems)
    given = keys.sort(read_tensors(weights_file(directory, WEIGHTS), allow_bin), name, blueprint)
    acted_on = branches(blueprint, hub.hooked)
    places = tuple(address for address in acted_on if ("fusion", address) in given.parts)
    widths = {address: (acted_on[address].shape or (0, 0))[0] for address in places}
    problems = list(differences([{("fusion", a): theirs.shapes(w) for a, w in widths.items()}], given))
    if problems:
        raise FileFormatError(problems)
    children = tuple(map(str, data.get("adapter_names") or name.split(",")))
    dropout = theirs.dropout_prob
    if dropout is None:
        dropout = float(getattr(blueprint.model.config, "attention_probs_dropout_prob", 0.0))
    options = theirs.model_dump(exclude={"dropout_prob", "temperature", "value_initialized"})
    config = FusionConfig(
        children=children,
        places=places,
        branch="before_norm" if hub.hooked else "after_norm",
        adds_stream=True,
        dropout=dropout,
        **options,
    )
    return Content(
        name="+".join(children) if name == ",".join(children) else name,
        config=config,
        tensors=dict(_tensors(given)),
        addresses=places,
        source=str(directory),
        facts={key: data.get(key) for key in ("model_name", "model_class", "model_type", "version")},
    )


def _refusals(theirs: FusionFile) -> Iterator[Problem]:
    if theirs.temperature:
        message = "AdapterHub divides the scores by a number that starts at 50 and falls with every call"
        hint = "after 980 calls it is 1, which is what 'temperature': false means"
        yield Problem("not-reproducible", message, "temperature", hint=hint)


def _tensors(given: keys.Keyed) -> Iterator[tuple[str, torch.Tensor]]:
    for (_, address), own in given.parts.items():
        for name, tensor in own.items():
            if not name.startswith("dense."):
                yield f"{address}.{name}", tensor
