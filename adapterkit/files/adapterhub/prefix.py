"""Prefix tuning: `<attention>.prefix_tuning.pool.prefix_tunings.<name>.<location>.<parameter>`.

Their matrices hold the keys and values of all layers; the modules of every attention name the same ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict

from adapterkit.errors import FileFormatError, Problem
from adapterkit.files.adapterhub.config import validated
from adapterkit.files.adapterhub.keys import Host, Keyed, Tensors
from adapterkit.files.adapterhub.member import Member, Part, Shapes, Units
from adapterkit.files.adapterhub.places import Layer, layers, left_out
from adapterkit.methods.activations import ACTIVATIONS
from adapterkit.methods.prefix import PrefixTuningConfig
from adapterkit.model.blueprint import Blueprint
from adapterkit.model.cores import Core, cores
from adapterkit.model.reading import read_stacks, sources

_MLP = {"wte.weight": "embedding", "control_trans.0.weight": "weight", "control_trans.0.bias": "bias"}
"""What all layers share, in their words and in ours."""
_LAST = {"control_trans.2.weight": "weight", "control_trans.2.bias": "bias"}
"""Whose rows are layer by layer those of its keys, then those of its values."""


class PrefixFile(BaseModel):
    """`config` of an adapter_config.json; fields and defaults of adapters 1.3.0, PrefixTuningConfig."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    architecture: Literal["prefix_tuning"]
    encoder_prefix: bool = True
    cross_prefix: bool = True
    leave_out: tuple[int, ...] = ()
    flat: bool = False
    prefix_length: int = 30
    bottleneck_size: int = 512
    non_linearity: str = "tanh"
    dropout: float = 0.0
    use_gating: bool = False
    shared_gating: bool = True
    init_weights_seed: int | None = None
    dtype: str | None = None


class PrefixMember(Member):
    """A prefix-tuning config on one model."""

    def __init__(self, config: Mapping[str, Any], blueprint: Blueprint) -> None:
        self.theirs = validated(PrefixFile, config)
        self.blueprint = blueprint
        self.cores: dict[str, Core] = {}
        """Address of every core with a prefix -> the core."""
        self.locations: dict[str, tuple[str, str]] = {}
        """Address of a core -> the model inside the model that it belongs to, and its word for the place."""
        self.hubs = {layer.stack: layer.hub for layer in layers(blueprint)}
        known = cores(blueprint)
        for layer in layers(blueprint):
            for sublayer in ("attention", "cross_attention"):
                core = known.get(f"{layer.address}.{sublayer}.core")
                location = location_of(blueprint, layer, sublayer)
                if core is not None and self._wants(layer, location):
                    self.cores[core.address] = core
                    self.locations[core.address] = (layer.stack.rpartition("/")[0], location)

    def _wants(self, layer: Layer, location: str) -> bool:
        switches = {"encoder": self.theirs.encoder_prefix, "cross": self.theirs.cross_prefix}
        off = any(location.startswith(word) and not wanted for word, wanted in switches.items())
        return layer.number not in self.theirs.leave_out and not off

    def refusals(self) -> Iterator[Problem]:
        if self.theirs.non_linearity.lower() not in ACTIVATIONS:
            message = f"there is no activation {self.theirs.non_linearity!r}"
            yield Problem("unsupported-option", message, "non_linearity")
        for stack, hub in self.hubs.items():
            reason = "AdapterHub has no prefix tuning in this model" if hub.hooked else hub.no_prefix
            if reason is not None:
                yield Problem("not-reproducible", reason, stack)
        for stack, kept in self._shifted().items():
            if kept and not all(kept):
                message = "AdapterHub drops the position bias where only some layers have a prefix"
                yield Problem("not-reproducible", message, stack)
        for core in self.cores.values():
            if core.key_dim != core.value_dim or not core.kv_heads:
                message = "AdapterHub has prefixes for keys and values of the same known size only"
                yield Problem("not-reproducible", message, core.address)

    def _shifted(self) -> dict[str, list[bool]]:
        """Stacks with a bias of relative positions -> which layers have a prefix, if any has."""
        found: dict[str, list[bool]] = {}
        for core in cores(self.blueprint).values():
            if core.bias is not None and core.sublayer == "attention":
                found.setdefault(core.stack, []).append(core.address in self.cores)
        return {stack: kept for stack, kept in found.items() if any(kept)}

    def wanted(self, given: Keyed) -> dict[Host, Shapes]:
        counts = Counter(self.locations.values())
        first = {self.locations[address]: core for address, core in reversed(self.cores.items())}
        pools: dict[str, Shapes] = {}
        for (part, location), core in first.items():
            shapes = self._shapes(core, counts[part, location])
            pools.setdefault(part, {}).update({f"{location}.{name}": s for name, s in shapes.items()})
        found: dict[Host, Shapes] = {}
        for core in self.cores.values() if self.theirs.use_gating else ():
            gates = 1 if self.theirs.shared_gating else 2
            found["prefix_gate", core.path] = {"weight": (gates, core.width), "bias": (gates,)}
        # every attention names all prefixes of its model, and so does the model itself
        for core in cores(self.blueprint).values():
            part = core.stack.rpartition("/")[0]
            found |= {("prefix", core.path): pools[part]} if part in pools else {}
        for host in given.parts:
            if host[0] == "prefix_pool":
                found[host] = pools.get(host[1].rpartition("/")[0], {})
        return found

    def _shapes(self, core: Core, count: int) -> Shapes:
        theirs = self.theirs
        rows = count * 2 * core.kv_heads * core.key_dim
        if theirs.flat:
            return {"control_trans": (theirs.prefix_length * rows,)}
        return {
            "wte.weight": (theirs.prefix_length, core.width),
            "control_trans.0.weight": (theirs.bottleneck_size, core.width),
            "control_trans.0.bias": (theirs.bottleneck_size,),
            "control_trans.2.weight": (rows, theirs.bottleneck_size),
            "control_trans.2.bias": (rows,),
        }

    def parts(self, given: Keyed) -> Iterator[Part]:
        if not self.cores:
            return
        counts, used = Counter(self.locations.values()), Counter[tuple[str, str]]()
        pools = self._pools(given)
        units: Units = {}
        shared: Tensors = {}
        for address, core in self.cores.items():
            place = self.locations[address]
            own = {
                name.removeprefix(f"{place[1]}."): tensor
                for name, tensor in pools[place[0]].items()
                if name.startswith(f"{place[1]}.")
            }
            units[address] = self._unit(core, own, used[place], counts[place])
            used[place] += 1
            if not self.theirs.flat:
                key = core.location.replace(".", "_").replace("/", "_")
                shared |= {f"locations.{key}.{ours}": own[name] for name, ours in _MLP.items()}
            if self.theirs.use_gating:
                for name, tensor in given.parts["prefix_gate", core.path].items():
                    rows = enumerate(tensor.split(1))
                    units[address] |= {f"gates.{number}.{name}": row for number, row in rows}
        yield Part(self._config(), units, shared)

    def _pools(self, given: Keyed) -> dict[str, Tensors]:
        """The tensors of each model inside the model, which every attention of it has to name alike."""
        found: dict[str, Tensors] = {}
        parts = {core.path: core.stack.rpartition("/")[0] for core in cores(self.blueprint).values()}
        for host, tensors in given.parts.items():
            if host[0] in ("prefix", "prefix_pool"):
                part = parts[host[1]] if host[0] == "prefix" else host[1].rpartition("/")[0]
                own = found.setdefault(part, tensors)
                if not all(torch.equal(own[name], tensor) for name, tensor in tensors.items()):
                    message = "differs from the prefix at another place, which is the same module"
                    raise FileFormatError(Problem("bad-file", message, host[1]))
        return found

    def _unit(self, core: Core, own: Tensors, index: int, count: int) -> Tensors:
        """The prefix of one of `count` layers. Shapes: see `PrefixUnit`."""
        rows = 2 * core.kv_heads * core.key_dim
        if not self.theirs.flat:
            mine = slice(index * rows, (index + 1) * rows)
            return {ours: own[name][mine] for name, ours in _LAST.items()}
        whole = own["control_trans"].view(-1, count, 2, core.kv_heads, core.key_dim)
        return {"key": whole[:, index, 0], "value": whole[:, index, 1]}

    def _config(self) -> PrefixTuningConfig:
        theirs = self.theirs
        stacks = {core.stack for core in self.cores.values() if core.sublayer == "attention"}
        return PrefixTuningConfig(
            prefix_length=theirs.prefix_length,
            flat=theirs.flat,
            bottleneck_size=theirs.bottleneck_size,
            non_linearity=theirs.non_linearity.lower(),
            dropout=theirs.dropout,
            # an encoder that is a model of its own has its prefix whatever they say
            encoder_prefix=theirs.encoder_prefix or bool(stacks & read_stacks(self.blueprint)),
            cross_prefix=theirs.cross_prefix,
            shift_bias=bool(self._shifted()),
            use_gating=theirs.use_gating,
            shared_gating=theirs.shared_gating,
            leave_out=left_out(self.blueprint, theirs.leave_out),
        )


def location_of(blueprint: Blueprint, layer: Layer, sublayer: str) -> str:
    """Their word for the attentions of a sublayer."""
    said, stack = layer.hub.prefixes, layer.stack.rpartition("/")[2]
    named = said.get(f"{stack}.{sublayer}") or said.get(sublayer)
    if named:
        return named
    if sublayer == "cross_attention":
        return "cross_prefix"
    part = layer.stack.rpartition("/")[0]
    readers = (other for other in blueprint.stacks if layer.stack in sources(blueprint, other))
    is_encoder = any(other.rpartition("/")[0] == part for other in readers)
    return "encoder_prefix" if is_encoder else "self_prefix"
