"""Writing a directory for AdapterHub's `adapters`.

Reading is the only place that knows what their tensors are here. Writing asks it where every number comes
from, by letting it read tensors of numbers that name their own place, and puts the adapter's numbers there.
What was written is then read, and must be the adapter again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from adapterkit.adapter import Adapter
from adapterkit.errors import FileFormatError, Problem, listing
from adapterkit.files.adapterhub import keys, reader
from adapterkit.files.adapterhub.keys import Keyed, Tensors
from adapterkit.files.adapterhub.member import Member
from adapterkit.files.adapterhub.places import hub_of
from adapterkit.files.adapterhub.reft import parametrised
from adapterkit.files.adapterhub.spelling import spell, unsaid
from adapterkit.files.disk import to_json, write_directory
from adapterkit.files.present import state_dict
from adapterkit.methods.base import MethodConfig
from adapterkit.methods.bottleneck import BottleneckConfig
from adapterkit.methods.ia3 import IA3Config
from adapterkit.methods.lora import LoRAConfig
from adapterkit.methods.union import UnionConfig
from adapterkit.model.blueprint import Blueprint, Slot
from adapterkit.model.branches import Branch
from adapterkit.model.cores import cores

VERSION = "adapters.1.3.0"
"""Of the library whose format this is."""
_FIRST = 2.0**20
"""Numbers from here on name places; smaller ones are constants that the reader puts in."""
_SELECTING = {"targets", "locations", "layers", "leave_out", "encoder_prefix", "cross_prefix", "stacks"}
_TOGETHER = {"first_only"}
"""What every adapter of theirs does in a setup with others."""
_PADDING = {"into_padding"}
"""What every ReFT of theirs does, and no token has other states for it."""
_STARTING = {"init", "init_weights", "init_text_ids", "random_uniform_scale", "d_initial", "phm_init_range"}
_DERIVED = {"r", "alpha", "rslora", "sides", "reduction_factor", "orthogonal"}


def write(
    directory: Path,
    adapter: Adapter,
    blueprint: Blueprint,
    head: bool | str,
    config: MethodConfig | None = None,
) -> MethodConfig:
    """Write an adapter so that `adapters` loads it with the same numbers; give its config as it will be read.

    Args: config: what it does alone, where that is not its own config.
    Raises: FileFormatError: their format, or their library on this model, cannot have it; nothing is written.
    """
    if head is not False and adapter.heads:
        message = "heads of Hugging Face's classes have no place in AdapterHub's format"
        raise FileFormatError(Problem("not-in-format", message, expected="head=False"))
    if (directory / reader.HEAD).is_file():
        message = f"holds {reader.HEAD}, a head that would be read with the adapter that is written there"
        raise FileFormatError(Problem("bad-file", message, file=str(directory)))
    hub_of(blueprint)
    own = {
        f"{address}.{name}": value.detach().cpu()
        for address, module in adapter.modules().items()
        if address not in adapter.heads and address not in adapter.poolers
        for name, value in state_dict(module).items()
    }
    config = adapter.config if config is None else config
    theirs = spell(config, adapter.plan.slots, blueprint)
    read, tensors = _tensors(theirs, own, adapter, config, blueprint)
    data = {"config": theirs, "name": adapter.name, **facts(blueprint)}
    write_directory(directory, {reader.WEIGHTS[0]: tensors}, {reader.CONFIG: to_json(data)})
    return read


def facts(blueprint: Blueprint) -> dict[str, Any]:
    """What each of their config files says of the model and of their library."""
    config = getattr(blueprint.model, "config", None)
    return {
        "hidden_size": getattr(config, "hidden_size", None),
        "model_class": type(blueprint.model).__name__,
        "model_name": getattr(config, "_name_or_path", None) or None,
        "model_type": getattr(config, "model_type", None),
        "version": VERSION,
    }


def _tensors(
    theirs: Mapping[str, Any],
    own: Mapping[str, torch.Tensor],
    adapter: Adapter,
    config: MethodConfig,
    blueprint: Blueprint,
) -> tuple[MethodConfig, Tensors]:
    """The config that will be read; key in their file -> tensor."""
    plain = reader.members(_without_parametrisation(theirs), blueprint)
    reader.refuse(problem for member in plain for problem in member.refusals())
    places = Places(plain, blueprint)
    if not places.shapes:
        raise unsaid("an adapter at these places")
    read, sources, addresses = reader.adapter(plain, places.named(), blueprint)
    _compare(adapter.plan.slots, config, read, addresses)
    if sources.keys() != own.keys():
        raise unsaid(f"its tensors: {listing(sorted(sources.keys() ^ own.keys()))}")
    for key, source in sources.items():
        if source.shape != own[key].shape:
            raise unsaid(f"a tensor of shape {tuple(own[key].shape)}", key)
        places.put(source, own[key])
    dtype = next(iter(own.values())).dtype
    found = {key: value.to(dtype) for key, value in places.keyed(adapter.name).items()}
    if theirs != _without_parametrisation(theirs):
        found = dict(_parametrised(found))
    # numbers that have no place in their tensors are seen when these are read
    given = keys.sort(found, adapter.name, blueprint)
    _, again, _ = reader.adapter(reader.members(theirs, blueprint), given, blueprint)
    for key, value in own.items():
        loose = 1e-5 if key.endswith(".projection") else 0.0  # an orthogonal matrix is computed from others
        if not torch.allclose(again[key].to(value.dtype), value, rtol=0, atol=loose):
            raise unsaid("all numbers of this tensor", key)
    return read, found


def _without_parametrisation(theirs: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(theirs)
    if "configs" in found:
        found["configs"] = [_without_parametrisation(inner) for inner in found["configs"]]
    return found | ({"orthogonality": False} if "orthogonality" in found else {})


def _parametrised(tensors: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    """Matrices of ReFT as torch keeps orthogonal ones; one that is not used is some orthogonal matrix."""
    for key, tensor in tensors.items():
        start, projection, _ = key.partition(".projection.weight")
        if not projection or ".reft_layer." not in key:
            yield key, tensor
            continue
        rows = tensor if tensor.any() else torch.eye(*tensor.shape, dtype=tensor.dtype)
        original, base = parametrised(rows)
        yield f"{start}.projection.parametrizations.weight.original", original
        yield f"{start}.projection.parametrizations.weight.0.base", base


class Places:
    """The tensors of a file that has everything its config asks for."""

    def __init__(self, members: Sequence[Member], blueprint: Blueprint) -> None:
        self.spelled = keys.spelled(blueprint)
        wanted = {host: shapes for member in members for host, shapes in member.wanted(Keyed()).items()}
        self.shapes = {(host, name): shape for host, named in wanted.items() for name, shape in named.items()}
        self.models = {c.path: f"{c.stack.rpartition('/')[0]}/." for c in cores(blueprint).values()}
        self.shared = {name: s for member in members for name, s in member.shared_wanted().items()}
        if self.shared and any("/" in stack for stack in blueprint.stacks):
            raise unsaid("tensors that the models share that this one is made of")
        self.values: dict[Any, torch.Tensor] = {}
        self.starts: list[tuple[int, Any]] = []
        at = int(_FIRST)
        for key, shape in [*self.shapes.items(), *((("", name), s) for name, s in self.shared.items())]:
            same = self._same(key)
            if same not in self.values:
                self.values[same] = torch.zeros(shape, dtype=torch.float64)
                self.starts.append((at, same))
                at += self.values[same].numel()
        self.numbers = dict[Any, torch.Tensor]()
        for start, same in self.starts:
            count = self.values[same].numel()
            self.numbers[same] = torch.arange(start, start + count, dtype=torch.float64).view(
                self.values[same].shape
            )
            if same[-1] in ("vera_D", "vera_B"):  # a vector, which they keep as a matrix
                self.numbers[same] = torch.diag(self.numbers[same].diagonal())

    def _same(self, key: tuple[Any, str]) -> tuple[Any, ...]:
        """What is one tensor under several names: the prefixes of one model, a norm of a bottleneck."""
        host, name = key
        alias = name.replace("adapter_down.0.", "adapter_norm_before.")
        if (host, alias) in self.shapes:
            name = alias
        return (self.models[host[1]], name) if host and host[0] == "prefix" else (host, name)

    def named(self) -> Keyed:
        """Tensors whose numbers say where they stand."""
        found = Keyed()
        for host, name in self.shapes:
            found.parts.setdefault(host, {})[name] = self.numbers[self._same((host, name))]
            found.modules[host] = self.spelled[host]
        if self.shared:
            found.shared[""] = {name: self.numbers["", name] for name in self.shared}
        return found

    def put(self, source: torch.Tensor, value: torch.Tensor) -> None:
        """Put the numbers of a tensor where those of `source` come from."""
        places, numbers = source.reshape(-1), value.reshape(-1).to(torch.float64)
        for start, same in self.starts:
            own = self.values[same].view(-1)
            here = (places >= start) & (places < start + own.numel())
            if here.any():
                own[(places[here] - start).long()] = numbers[here]

    def keyed(self, name: str) -> Tensors:
        """The tensors under their keys."""
        found: Tensors = {}
        for (kind, where), parameter in self.shapes:
            key = f"{self.spelled[kind, where]}.{keys.MARKS[kind]}.{name}.{parameter}".lstrip(".")
            found[key] = self.values[self._same(((kind, where), parameter))].clone()
            if kind == "prefix":  # the model itself names them once more
                pool = f"{self.spelled['prefix_pool', self.models[where]]}.{keys.MARKS['prefix_pool']}"
                found[f"{pool}.{name}.{parameter}".lstrip(".")] = found[key].clone()
        for parameter in self.shared:
            found[f"shared_parameters.{name}.{parameter}"] = self.values["", parameter].clone()
        return found


def _compare(
    slots: Sequence[Slot], config: MethodConfig, read: MethodConfig, addresses: Sequence[str]
) -> None:
    """Refuse what would be read as something else."""
    ours = {slot.address: slot for slot in slots}
    if set(addresses) != ours.keys():
        differing = listing(sorted(set(addresses) ^ ours.keys()))
        raise unsaid(f"an adapter at exactly these places; it differs at {differing}")
    mine, other = _behaviour(config, slots), _behaviour(read, slots)
    for name in sorted(mine.keys() | other.keys()):
        if mine.get(name) != other.get(name):
            raise unsaid(
                f"{name}={mine.get(name)!r} on this model; it would be read as {other.get(name)!r}", name
            )


def _behaviour(config: MethodConfig, slots: Sequence[Slot]) -> dict[str, Any]:
    """What of a config makes numbers: without how tensors start, and where slots are known anyway."""
    if isinstance(config, UnionConfig):
        found = {"method": [method.method for method, _ in config.members(slots)]}
        for index, (method, own) in enumerate(config.members(slots)):
            found |= {f"{index}:{name}": value for name, value in _behaviour(method, own).items()}
        return found
    told = config.model_dump(exclude=_SELECTING | _STARTING | _DERIVED | _TOGETHER | _PADDING)
    for slot in slots:
        if isinstance(config, LoRAConfig):
            gated = config.gating
            told[f"scale at {slot.address}"] = (config.rank(slot), None if gated else config.scaling(slot))
        elif isinstance(config, IA3Config):
            told[f"side at {slot.address}"] = config.side(slot)
        elif isinstance(config, BottleneckConfig) and isinstance(slot, Branch):
            told[f"width at {slot.address}"] = config.width(slot)
    given = config.model_dump(include={"r", "alpha"})
    if not isinstance(config, LoRAConfig) and "r" in given:
        told |= {"r": given["r"], "alpha": given.get("alpha") or given["r"]}
    if isinstance(config, IA3Config):
        told["alpha"] = config.alpha
    return {"method": config.method, **told}
