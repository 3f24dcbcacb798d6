"""Putting units and heads into a model and taking them out again. All or nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from adapterkit.errors import PlanError, Problem
from adapterkit.inject import entry
from adapterkit.inject.site import Site, check, check_unwrapped, close_site, open_site, site_of
from adapterkit.inject.state import slug
from adapterkit.methods.base import Helper, Unit
from adapterkit.methods.lora import Gate
from adapterkit.methods.weights import PLAIN
from adapterkit.model.blueprint import Blueprint, Head, Slot
from adapterkit.model.walk import CHILD, is_managed, is_sharded, tensors
from adapterkit.planning import Draft, Plan
from adapterkit.runtime import Runtime


def device_of(place: Slot | Head, model: nn.Module) -> torch.device:
    """Where the units of a host belong: with its weight, or where accelerate runs it if that is offloaded.

    A host without tensors, such as a dropout, is where the nearest module around it has some.
    """
    path, module = place.path, place.module
    while True:
        found = _first_tensor(module)
        if found is not None:
            owner, tensor = found
            hook = owner.__dict__.get("_hf_hook")
            if tensor.is_meta and hook is not None:
                return torch.device(getattr(hook, "execution_device", "cpu") or "cpu")
            return tensor.device
        if not path:
            return torch.device("cpu")
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)


def _first_tensor(module: nn.Module) -> tuple[nn.Module, nn.Parameter] | None:
    """The first parameter of a module with the module that holds it, adapters aside."""
    own = next((p for p in module._parameters.values() if p is not None), None)
    if own is not None:
        return module, own
    below = (_first_tensor(child) for name, child in module.named_children() if name != CHILD)
    return next((found for found in below if found is not None), None)


def dtype_named(given: str | torch.dtype, expected: str = "'float32', 'bfloat16', ...") -> torch.dtype:
    """A floating-point type, which may be given by its name. Raises: PlanError: it is none."""
    named = getattr(torch, given.removeprefix("torch."), None) if isinstance(given, str) else given
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        message = f"{given!r} is no floating-point type"
        raise PlanError(Problem("bad-dtype", message, "dtype", expected))
    return named


def dtype_of(host: nn.Module, model: nn.Module, policy: str | torch.dtype) -> torch.dtype:
    """Type of the units of a host: `match` is that of its weight, for quantised weights that of the model."""
    if policy != "match":
        return dtype_named(policy, "'match', 'float32', ...")
    weight = host._parameters.get("weight")
    if weight is not None and weight.is_floating_point():
        return weight.dtype
    own = (p.dtype for p in model.parameters() if p.is_floating_point())
    return next(own, torch.get_default_dtype())


def move(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Like `module.to`, but at once if there is nothing to do: an attach moves many small modules."""
    if any(tensor.device != device or tensor.dtype != dtype for tensor in tensors(module)):
        module.to(device, dtype)


def cast(plan: Plan, draft: Draft, model: nn.Module, dtype: str | torch.dtype) -> None:
    """Units to the device and type of their hosts."""
    hosts = {slot.address: slot for slot in plan.slots} | {"shared": plan.slots[0]}
    for address, module in draft.modules().items():
        host = hosts[address]
        move(module, device_of(host, model), dtype_of(host.module, model, dtype))


def copies_of(heads: Sequence[Head]) -> dict[Head, nn.Module]:
    """Copies for an adapter to train.

    Raises: PlanError: a head is quantised.
    """
    for head in heads:
        for tensor in head.module.parameters():
            if not tensor.is_floating_point() or not (type(tensor) in PLAIN or is_sharded(tensor)):
                message = f"{head.path} is quantised, so that no adapter could have a copy of it to train"
                expected = "a model whose head was left out when it was quantised, or head=False"
                raise PlanError(Problem("quantised-head", message, head.address, expected))
    return {head: copy_head(head.module) for head in heads}


def copy_head(module: nn.Module) -> nn.Module:
    """A copy of a head without what adapters put into it.

    Raises: PlanError: it is sharded; no group would know the copy.
    """
    if is_managed(module) or any(is_sharded(tensor) for tensor in module.parameters()):
        message = "the model is sharded: its task heads cannot be copied for an adapter"
        expected = "attach and load first, then shard; or head=False"
        raise PlanError(Problem("sharded-before", message, "head", expected))
    site = module._modules.pop(CHILD, None)
    cls = type(module)
    try:
        if site is not None:
            module.__class__ = cls.__dict__["_adapterkit_base"]
        return copy.deepcopy(module)
    finally:
        if site is not None:
            module.__class__ = cls
            module._modules[CHILD] = site


class Injection:
    """What one adapter has put into the model: (host path, key) of every module."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.hosts: dict[str, nn.Module] = {}
        self.entries: list[tuple[str, str]] = []
        self.by_address: dict[str, tuple[str, str]] = {}
        self.helpers: Sequence[Helper] = ()


def inject(
    runtime: Runtime,
    name: str,
    modules: Sequence[tuple[Slot | Head, nn.Module]],
    shared: nn.Module | None,
    helpers: Sequence[Helper],
    manifest: torch.Tensor,
    top: entry.Top,
) -> Injection:
    """Register the modules of one adapter at their hosts, and the helpers that are not there yet.

    Raises: PlanError: a host cannot take them; the model is as before.
    """
    done = Injection(name)
    plan = [(place.path, place.module, place.address, module) for place, module in modules]
    if shared is not None:
        plan.insert(0, (plan[0][0], plan[0][1], "shared", shared))
    hosts = [(path, host) for path, host, _, _ in plan]
    hosts += [(helper.place.path, helper.place.module) for helper in helpers if helper.place.path != top.key]
    first_path: dict[nn.Module, str] = {}
    for path, host in hosts:
        check(host, path, runtime)
        site, known = site_of(host), first_path.setdefault(host, path)
        known = known if site is None else site.key
        if known != path:  # a site knows one place only
            expected = "a module for each place, as after save_pretrained and from_pretrained"
            raise PlanError(Problem("shared-module", f"{path} is the same module as {known}", path, expected))
    opened: list[tuple[str, nn.Module]] = []

    def opening(host: nn.Module, path: str, unit: nn.Module | None = None) -> Site:
        is_new = CHILD not in host._modules
        said = (unit.kernel, unit.eager, unit.bias_method) if isinstance(unit, Unit) else ()
        site = open_site(host, path, runtime, *said)
        if is_new:
            opened.append((path, host))
        return site

    try:
        for path, host, address, module in plan:
            site = opening(host, path, module)
            key = slug(name, address)
            if key in site._modules:
                message = f"{name!r} and {address!r} give a key that is taken: {key!r}"
                raise PlanError(Problem("name-clash", message, address, "another name"))
            if module.training != host.training:
                module.train(host.training)
            site._modules[key] = module
            site.stacked.clear()  # an adapter of this name may have been there before
            _say_initialised(module)
            _watch_gates(module, address.partition(":")[2] or address, runtime)
            done.hosts[path] = host
            done.entries.append((path, key))
            done.by_address[address] = (path, key)
        done.helpers = helpers
        for helper in helpers:
            path, host = helper.place.path, helper.place.module
            if path == top.key:
                top.units.setdefault(helper.key, helper.make())
                continue
            opening(host, path)._modules.setdefault(helper.key, helper.make())
            done.hosts[path] = host
        first = site_of(plan[0][1])
        assert first is not None
        beside = next((tensor for _, module in modules for tensor in module.parameters()), manifest)
        first.register_buffer(slug(name, "manifest"), manifest.to(beside.device))
    except BaseException:
        for path, key in done.entries:
            _site(done.hosts[path])._modules.pop(key, None)
        for path, host in opened:
            close_site(host, path)
        raise  # helpers that others use too may stay: they do nothing by themselves
    return done


def _say_initialised(unit: nn.Module) -> None:
    """Let transformers keep the numbers: `model.init_weights()` draws those anew that do not say so."""
    for module in unit.modules() if unit._modules else (unit,):
        module.__dict__["_is_hf_initialized"] = True


def _watch_gates(unit: nn.Module, address: str, runtime: Runtime) -> None:
    """Let the gates of a unit say what they let through, under its address."""
    if not unit._modules:
        return  # most units: a walk of each of them takes time
    gates = {path: module for path, module in unit.named_modules() if isinstance(module, Gate)}
    for path, gate in gates.items():
        gate.label = address if len(gates) == 1 else f"{address}.{path}"
        gate.runtime = runtime


def open_entries(blueprint: Blueprint, runtime: Runtime) -> dict[str, nn.Module]:
    """Make the first layer of every stack a site, if it can be checkpointed. Returns those layers by path.

    Raises: PlanError: another library has replaced the forward of one; the model is as before.
    """
    stacks = {}
    for address, info in blueprint.stacks.items():
        if hasattr(info.layers[0], "gradient_checkpointing"):
            stacks[blueprint.places[f"{address}.0.layer"].path] = info.layers
    for path, (first, *_) in stacks.items():
        check(first, path, runtime)
    opened: dict[str, nn.Module] = {}
    try:
        for path, layers in stacks.items():
            open_site(layers[0], path, runtime)._modules[entry.KEY] = entry.InputGrad(layers)
            opened[path] = layers[0]
    except BaseException:
        close_entries(opened)
        raise
    return opened


def _site(host: nn.Module) -> Site:
    site = site_of(host)
    assert site is not None
    return site


def eject(injection: Injection, others: Iterable[Injection], top: entry.Top) -> None:
    """Take one adapter out, with the helpers that no other needs; sites that are empty then are closed.

    Raises: PlanError: another library wrapped a host on top; nothing is changed then.
    """
    for path, host in injection.hosts.items():
        check_unwrapped(host, path)
    needed = {(helper.place.path, helper.key) for other in others for helper in other.helpers}
    own = {(helper.place.path, helper.key) for helper in injection.helpers} - needed
    for path, key in (*injection.entries, *own):
        modules = top.units if path == top.key else _site(injection.hosts[path])._modules
        modules.pop(key, None)
    for path, host in injection.hosts.items():
        site = _site(host)
        site._buffers.pop(slug(injection.name, "manifest"), None)
        if not site._modules:
            close_site(host, path)


def close_entries(hosts: Mapping[str, nn.Module]) -> None:
    """Close the entry sites."""
    for path, host in hosts.items():
        site = site_of(host)
        if site is not None:
            site._modules.pop(entry.KEY, None)
            if not site._modules:
                close_site(host, path)
