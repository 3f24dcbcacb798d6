"""ReFT: `<layer>.reft_layer.refts.<name>.units.<number>.<parameter>`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn
from torch.nn.utils.parametrizations import orthogonal

from adapterkit.errors import FileFormatError, Problem
from adapterkit.files.adapterhub.config import validated
from adapterkit.files.adapterhub.keys import Host, Keyed, Tensors
from adapterkit.files.adapterhub.member import Member, Part, Shapes, Units
from adapterkit.files.adapterhub.places import layers
from adapterkit.methods.activations import ACTIVATIONS
from adapterkit.methods.reft import ReFTConfig
from adapterkit.model.blueprint import Blueprint
from adapterkit.model.branches import layer_slots


class ReFTFile(BaseModel):
    """`config` of an adapter_config.json; fields and defaults of adapters 1.3.0, ReftConfig.

    `subtract_projection` is not written by them, so that DiReFT is read as NoReFT, by them as here; where a
    file has the option, it counts.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    architecture: Literal["reft"]
    layers: Literal["all"] | tuple[int, ...]
    prefix_positions: int
    suffix_positions: int
    r: int
    orthogonality: bool
    subtract_projection: bool = True
    tied_weights: bool = False
    dropout: float = 0.05
    non_linearity: str | None = None
    dtype: str | None = None
    init_weights_seed: int | None = None
    output_reft: bool = True


class ReFTMember(Member):
    """A ReFT config on one model."""

    def __init__(self, config: Mapping[str, Any], blueprint: Blueprint) -> None:
        self.theirs = validated(ReFTFile, config)
        self.blueprint = blueprint
        slots = layer_slots(blueprint)
        numbered = {layer.address: layer.number for layer in layers(blueprint)}
        chosen = self.theirs.layers
        self.widths = {
            address: (slots[f"{address}.layer"].shape or (0, 0))[0]
            for address, number in numbered.items()
            if f"{address}.layer" in slots and (chosen == "all" or number in chosen)
        }

    @property
    def units(self) -> dict[str, str]:
        """Number of each unit of theirs -> ours; '' where it exists and is not used."""
        prefix = "prefix" if self.theirs.prefix_positions else ""
        suffix = "suffix" if self.theirs.suffix_positions else ""
        return {"0": prefix or suffix} if self.theirs.tied_weights else {"0": prefix, "1": suffix}

    def refusals(self) -> Iterator[Problem]:
        theirs = self.theirs
        if theirs.non_linearity is not None and theirs.non_linearity.lower() not in ACTIVATIONS:
            message = f"there is no activation {theirs.non_linearity!r}"
            yield Problem("unsupported-option", message, "non_linearity")
        if not any(self.units.values()):
            yield Problem("bad-option", "edits no position", "prefix_positions", "at least 1 somewhere")
        if theirs.suffix_positions and len({address.rpartition(".")[0] for address in self.widths}) > 1:
            message = "AdapterHub takes the last positions of one stack for those of the others"
            yield Problem("not-reproducible", message, "suffix_positions")
        if theirs.prefix_positions > self._room():
            message = "AdapterHub takes the positions of one stack for those of the others, which has fewer"
            yield Problem("not-reproducible", message, "prefix_positions", f"at most {self._room():g}")

    def _room(self) -> float:
        """Positions of the shortest of several stacks, as far as configs say them: those of images."""
        stacks = {address.rpartition(".")[0] for address in self.widths}
        infos = [self.blueprint.stacks[stack] for stack in stacks if len(stacks) > 1]
        return min([_patches(info.root) for info in infos if info.inputs.ids is None], default=math.inf)

    def wanted(self, given: Keyed) -> dict[Host, Shapes]:
        return {("reft", address): self._shapes(width) for address, width in self.widths.items()}

    def _shapes(self, width: int) -> Shapes:
        rank = self.theirs.r
        found: Shapes = {}
        for number in self.units:
            found[f"units.{number}.learned_source.weight"] = (rank, width)
            found[f"units.{number}.learned_source.bias"] = (rank,)
            if self.theirs.orthogonality:
                weight = f"units.{number}.projection.parametrizations.weight"
                found |= {f"{weight}.original": (rank, width), f"{weight}.0.base": (width, width)}
            else:
                found[f"units.{number}.projection.weight"] = (rank, width)
        return found

    def parts(self, given: Keyed) -> Iterator[Part]:
        theirs = self.theirs
        if not self.widths:
            return
        units: Units = {}
        for address in self.widths:
            found, unit = given.parts["reft", address], units.setdefault(f"{address}.layer", {})
            for number, ours in self.units.items():
                if ours:
                    unit |= self._unit(found, number, ours)
        config = ReFTConfig(
            r=theirs.r,
            prefix_positions=theirs.prefix_positions,
            suffix_positions=theirs.suffix_positions,
            orthogonal=theirs.orthogonality,
            subtract_projection=theirs.subtract_projection,
            into_padding=True,
            tied_weights=theirs.tied_weights,
            non_linearity=None if theirs.non_linearity is None else theirs.non_linearity.lower(),
            dropout=theirs.dropout,
            layers=None if theirs.layers == "all" else tuple(self.widths),
        )
        yield Part(config, units)

    def _unit(self, found: Tensors, number: str, ours: str) -> Tensors:
        here = f"units.{number}"
        if self.theirs.orthogonality:
            weight = f"{here}.projection.parametrizations.weight"
            rows = orthonormal(found[f"{weight}.original"], found[f"{weight}.0.base"])
        else:
            rows = found[f"{here}.projection.weight"]
        return {
            f"{ours}.source.weight": found[f"{here}.learned_source.weight"],
            f"{ours}.source.bias": found[f"{here}.learned_source.bias"],
            f"{ours}.projection": rows,
        }


def _patches(module: nn.Module) -> float:
    """Positions of an image in a stack by its config: those of its patches, and one; inf if it says none."""
    config = getattr(module, "config", None)
    image, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if not isinstance(image, int) or not isinstance(patch, int):
        return math.inf
    return (image // patch) ** 2 + 1


def orthonormal(original: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """The matrix (R, D) that torch's orthogonal parametrisation makes of its tensors."""
    linear = nn.Linear(original.shape[1], original.shape[0], bias=False, dtype=original.dtype)
    orthogonal(linear)
    linear.load_state_dict(
        {"parametrizations.weight.original": original, "parametrizations.weight.0.base": base}
    )
    with torch.no_grad():
        rows: torch.Tensor = linear.weight.detach().clone()
    if not torch.allclose(rows @ rows.t(), torch.eye(len(rows), dtype=rows.dtype), atol=1e-4):
        message = "the parametrisation of an orthogonal matrix gives one that is not"
        raise FileFormatError(Problem("bad-file", message))
    return rows


def parametrised(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The tensors (R, D) and (D, D) of torch's orthogonal parametrisation that give this matrix (R, D)."""
    linear = nn.Linear(rows.shape[1], rows.shape[0], bias=False, dtype=rows.dtype)
    orthogonal(linear)
    linear.weight = rows
    found = linear.state_dict()
    weight = "parametrizations.weight"
    return found[f"{weight}.original"].contiguous(), found[f"{weight}.0.base"].contiguous()
