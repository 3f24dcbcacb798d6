"""Keys of their weight files: the model's own module paths, with or without the prefix of its base."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from adapterkit.errors import FileFormatError, Problem, did_you_mean
from adapterkit.files.adapterhub.places import Layer, hub_of, layers
from adapterkit.files.paths import known_paths, layer_paths, stack_paths
from adapterkit.model.blueprint import Blueprint
from adapterkit.model.branches import branches
from adapterkit.model.cores import cores

Tensors = dict[str, torch.Tensor]
Host = tuple[str, str]
"""Kind of a module of theirs, and where: the path of a slot or core, the address of a branch, layer or stack.
A model that others are made of has the address of one of its stacks with '.' in place of the stack."""
MARKS = {
    "lora": "loras",
    "bottleneck": "adapters",
    "reft": "reft_layer.refts",
    "invertible": "invertible_adapters",
    "prompt": "prompt_tuning.prompt_tunings",
    "fusion": "adapter_fusion_layer",
    "prefix": "prefix_tuning.pool.prefix_tunings",
    "prefix_pool": "prefix_tuning.prefix_tunings",
    "prefix_gate": "prefix_tuning.prefix_gates",
}
"""Kind -> what their keys say between the path of a module and the name of the adapter."""
_CONTAINERS = {
    "attention": "attention_adapters",
    "cross_attention": "cross_attention_adapters",
    "mlp": "output_adapters",
}
"""Below a layer, the modules that keep bottlenecks, where an interface says nothing else."""


@dataclass(frozen=True)
class Keyed:
    """The tensors of a file by where they belong."""

    parts: dict[Host, Tensors] = field(default_factory=dict)
    """Host in this model -> parameter in their words -> tensor."""
    modules: dict[Host, str] = field(default_factory=dict)
    """Host in this model -> the path that the file gives it."""
    shared: dict[str, Tensors] = field(default_factory=dict)
    """Path of a base model in the file -> parameter -> tensor."""

    def base_of(self, host: Host) -> str | None:
        """The base model in the file that a host lies in, of those that share tensors."""
        module = self.modules[host]
        return max((b for b in self.shared if not b or module.startswith(f"{b}.")), key=len, default=None)


def sort(tensors: Mapping[str, torch.Tensor], name: str, blueprint: Blueprint) -> Keyed:
    """Find the host of every tensor.

    Raises: FileFormatError: keys that mean no module of this model, or one that another key means, too.
    """
    hosts = {kind: _named(own, hub_of(blueprint).prefix) for kind, own in _hosts(blueprint).items()}
    # a model of models names the module of one of them once more, as its own
    hosts["invertible"] = {"": ".", **hosts["invertible"]}
    found, problems = Keyed(), []
    for key, tensor in tensors.items():
        base, common, shared = f".{key}".partition(f".shared_parameters.{name}.")
        if common:
            found.shared.setdefault(base[1:], {})[shared] = tensor
            continue
        kind, module, parameter = _cut(key, name)
        host = (kind, hosts.get(kind, {}).get(module, ""))
        if not host[1]:
            hint = did_you_mean(module, hosts.get(kind, ()))
            problems.append(Problem("unknown-tensors", "belongs to no module of this model", key, "", hint))
        elif found.modules.setdefault(host, module) != module:
            message = f"belongs to the same module as tensors at {found.modules[host]!r}"
            problems.append(Problem("bad-file", message, key))
        else:
            found.parts.setdefault(host, {})[parameter] = tensor
    if problems:
        raise FileFormatError(problems)
    return found


def _cut(key: str, name: str) -> tuple[str, str, str]:
    """Kind, module and parameter of a key; no kind, where it is none of theirs."""
    for kind, mark in MARKS.items():
        module, own, parameter = f".{key}".partition(f".{mark}.{name}.")
        if own:
            return kind, module[1:], parameter
    return "", key, ""


def spelled(blueprint: Blueprint) -> dict[Host, str]:
    """What their library calls every host, in a base class: by the older path, which is the longer one."""
    found: dict[Host, str] = {}
    prefixes = hub_of(blueprint).prefix
    for kind, hosts in _hosts(blueprint).items():
        for host, paths in hosts.items():
            names = [_bare(path, prefixes) for path in paths]
            # a model that is not made of others is the root itself
            found[kind, host] = "" if host == "/." else max(names, key=len)
    return found


def _hosts(blueprint: Blueprint) -> dict[str, dict[str, Iterable[str]]]:
    """Kind -> host -> every path that it may have."""
    linear = {slot.path: known_paths(blueprint, slot) for slot in blueprint if slot.layer is not None}
    bottlenecks, refts, acted_on = {}, {}, branches(blueprint)
    for layer in layers(blueprint):
        paths = layer_paths(blueprint, layer.stack, layer.index)
        refts[layer.address] = paths
        for sublayer in _CONTAINERS:
            address = f"{layer.address}.{sublayer}"
            if address in acted_on:
                container = container_of(layer, sublayer)
                bottlenecks[address] = tuple(f"{path}.{container}" for path in paths)
    stacks = {stack: stack_paths(blueprint, stack) for stack in blueprint.stacks}
    attentions = {core.path: known_paths(blueprint, core) for core in cores(blueprint).values()}
    return {
        "prompt": dict(stacks),
        "prefix": dict(attentions),
        "prefix_gate": dict(attentions),
        "prefix_pool": dict(_models(blueprint)),
        "lora": dict(linear),
        "bottleneck": dict(bottlenecks),
        "fusion": dict(bottlenecks),
        "reft": dict(refts),
        "invertible": dict(stacks),
    }


def container_of(layer: Layer, sublayer: str) -> str:
    """The module below a layer that keeps the bottlenecks of a sublayer."""
    said, stack = layer.hub.adapters, layer.stack.rpartition("/")[2]
    return said.get(f"{stack}.{sublayer}") or said.get(sublayer) or _CONTAINERS[sublayer]


def _models(blueprint: Blueprint) -> dict[str, list[str]]:
    """The models that this one is made of, itself if of none -> where each may be."""
    found: dict[str, list[str]] = {}
    for stack, info in blueprint.stacks.items():
        own = info.path.split(".") if info.path else []
        around = [".".join(own[:length]) for length in range(len(own), -1, -1)]
        model = f"{stack.rpartition('/')[0]}/."
        found[model] = [path for path in found.get(model, around) if path in around]
    return found


def _named(hosts: Mapping[str, Iterable[str]], prefixes: Iterable[str]) -> dict[str, str]:
    """Name -> host. A name that is the first of one host, its own, means that one."""
    names: dict[str, dict[str, bool]] = {}
    for host, paths in hosts.items():
        for number, path in enumerate(paths):
            for name in _with_and_without(path, prefixes):
                own = number == 0 and name == path
                names.setdefault(name, {})[host] = own or names.get(name, {}).get(host, False)
    found = {}
    for name, meant in names.items():
        owners = [host for host, own in meant.items() if own] or list(meant)
        if len(owners) == 1:
            found[name] = owners[0]
    return found


def _with_and_without(path: str, prefixes: Iterable[str]) -> Iterator[str]:
    """A path as a base class and as the classes with heads write it."""
    bare = _bare(path, prefixes)
    for name in (path, bare, *(f"{prefix}.{bare}" for prefix in prefixes)):
        yield name.removesuffix(".")


def _bare(path: str, prefixes: Iterable[str]) -> str:
    """A path as a base class writes it."""
    dotted = f"{path}."
    found = next((dotted.removeprefix(f"{p}.") for p in prefixes if dotted.startswith(f"{p}.")), dotted)
    return found.removesuffix(".")
