"""Sites: modules of the model whose class is swapped for one that also runs the active units.

The class of the single instance is changed, never its attributes: state-dict keys, isinstance, deepcopy,
pickle, compile, export and sharding keep working, and a compiled graph notices the change of class (forward
hooks would be ignored).
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from adapterkit.errors import CompositionError, PlanError, Problem
from adapterkit.inject import again, apart, attention, lanes, replaced
from adapterkit.inject.lanes import Seen
from adapterkit.model.blueprint import Blueprint
from adapterkit.model.walk import CHILD
from adapterkit.runtime import Program, Runtime, Step
from adapterkit.spec.schema import Kernel


class Site(nn.Module):
    """Container of the units at one module, registered as its child `adapterkit`."""

    key: str
    runtime: Runtime
    program: Program | None
    stacked: dict[Any, Any]
    """Weights of several units put together, kept as long as these are the same; see grouped.py."""
    host_config: Any
    """The config of a host that computes attention; see attention.py."""

    def __init__(self, key: str, runtime: Runtime) -> None:
        super().__init__()
        # at once: `nn.Module` would look at each of them for what it may be
        self.__dict__.update(key=key, runtime=runtime, program=None, stacked={}, host_config=None)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "stacked": {}}

    def _replicate_for_data_parallel(self) -> Any:
        """Refuse what DataParallel does in the thread of an override: its copies run in others.

        Raises: CompositionError.
        """
        if self.runtime.override.programs is not None:
            message = "DataParallel runs copies of the model in threads that do not see kit.using(...)"
            expected = "kit.activate(...), or one process for each device"
            raise CompositionError(Problem("override-replicated", message, self.key, expected))
        replica: Any = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica.__dict__["stacked"] = {}  # of another device
        return replica

    def forward(self) -> None:
        raise NotImplementedError("a site is run by its host")

    @property
    def adapterkit(self) -> Site:
        """The site, as what runs lanes looks for it."""
        return self

    @property
    def held(self) -> tuple[Step, ...]:
        """Steps that wait here until something elsewhere asks for them."""
        override = self.runtime.override.programs
        program = self.program if override is None else override.get(self.key)
        return program.held if program is not None else ()

    def prompt(self, stack: str, x: torch.Tensor) -> torch.Tensor | None:
        """The vectors (1 or B, P, D) that wait here for the embedded tokens x (B, T, D) of a stack."""
        return lanes.prompt(self.held, stack, x, self)

    def prompt_length(self, stack: str) -> int:
        """P, the same for every example."""
        return lanes.prompt_length(self.held, stack, self)


def _forward(base: type[nn.Module]) -> Callable[..., Any]:
    original = base.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        site = self._modules[CHILD]  # as an attribute it would be looked for in vain first, at every call
        override = site.runtime.override.programs
        program = site.program if override is None else override.get(site.key)
        if program is None:
            return original(self, *args, **kwargs)
        units = site._modules
        for key in program.entry:
            args, kwargs = units[key](args, kwargs, self, site.runtime.override.flow)
        if program.composed:
            if program.lone and len(args) == 1 and not kwargs:
                return lanes.lone(program.outputs[0], original(self, args[0]), args[0], self)
            return _composed(original, program, self, args, kwargs)
        if program.instead is not None:
            return units[program.instead](*args, **kwargs)
        if program.joined and len(args) == 1 and not kwargs:
            unit = units[program.outputs[0]]
            return unit(None, args[0], Seen(self) if "_hf_hook" in unit.__dict__ else self)
        run = partial(attention.run, original, program.kernel) if program.kernel else original
        name = "" if args else next(iter(kwargs), "")
        x = args[0] if args else kwargs.get(name)
        for key in program.inputs:
            unit = units[key]
            x = unit(x, Seen(self) if "_hf_hook" in unit.__dict__ else self)
        if name:  # called by keyword
            out = run(self, **{**kwargs, name: x})
        else:
            out = run(self, x, *args[1:], **kwargs)
        for key in program.outputs:
            unit = units[key]
            out = unit(out, x, Seen(self) if "_hf_hook" in unit.__dict__ else self)
        return out

    return forward


def _composed(
    original: Callable[..., Any], program: Program, host: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The same for a program that has lanes."""
    if program.instead is not None:
        return lanes.instead(program.instead, args, kwargs, host, original)
    if program.around is not None and apart.runs_whole(program.around, host):
        return apart.around(
            program.around, args, kwargs, host, lambda given: _composed(original, program, host, (), given)
        )
    run = partial(attention.run, original, program.kernel) if program.kernel else original
    name = "" if args else next(iter(kwargs), "")
    x = lanes.inputs(program.inputs, args[0] if args else kwargs.get(name), host)
    out = run(host, **{**kwargs, name: x}) if name else run(host, x, *args[1:], **kwargs)
    return lanes.outputs(program.outputs, out, x, host)


def _call(base: type[nn.Module]) -> Callable[..., Any]:
    original = base.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        site = self._modules[CHILD]
        override = site.runtime.override.programs
        program = site.program if override is None else override.get(site.key)
        if program is not None and program.before is not None and args:
            args = (site._modules[program.before](args[0]), *args[1:])
        return original(self, *args, **again.carried(self, kwargs))

    return call


def _rebuild(base: Any, *attended: Any) -> nn.Module:
    cls = adapted(base, *attended)
    module: nn.Module = cls.__new__(cls)
    return module


@cache
def adapted(
    base: type[nn.Module], kernel: Kernel | None = None, eager: str | None = None, bias: str | None = None
) -> type[nn.Module]:
    """The subclass of `base` whose forward runs the site. It keeps the names that other libraries look at.

    Args: kernel, eager, bias: how the class computes attention, where the interface says it.
    """
    namespace = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_adapterkit_base": base,
        "forward": _forward(base),
        # the class itself cannot be found by name when unpickling
        "__reduce_ex__": lambda self, protocol: (_rebuild, (base, kernel, eager, bias), self.__getstate__()),
        **attention.namespace(base, kernel, eager),
        **({} if bias is None else {bias: attention.shifted(getattr(base, bias))}),
    }
    if issubclass(base, nn.Sequential):
        # it runs and counts its children, of which the site is none
        namespace["__iter__"] = lambda self: iter(_members(self))
        namespace["__len__"] = lambda self: len(_members(self))
        namespace["__getitem__"] = lambda self, at: nn.Sequential(*_members(self))[at]
    if hasattr(base, "gradient_checkpointing"):
        # such a layer decides within its call (some versions: in `__call__`) what is run again in backward
        namespace["__call__"] = _call(base)
        namespace["forward"] = again.forward(namespace["forward"])
    return type(base.__name__, (base,), namespace)


def _members(module: nn.Module) -> list[Any]:
    return [child for name, child in module._modules.items() if name != CHILD]


def base_class(module: nn.Module) -> type[nn.Module]:
    """The class the module had before it became a site."""
    found: type[nn.Module] = type(module).__dict__.get("_adapterkit_base", type(module))
    return found


def site_of(module: nn.Module) -> Site | None:
    """The site at a module, None if it is none."""
    found = module._modules.get(CHILD)
    return found if isinstance(found, Site) else None


def check(module: nn.Module, path: str, runtime: Runtime) -> None:
    """Refuse a module whose forward was replaced on the instance: a swapped class would be ignored.

    So is one with adapters of another kit: a module runs what one kit activates.
    Raises: PlanError. accelerate's replacement is allowed, since it calls `_old_forward`, which we rebind.
    """
    site = site_of(module)
    if site is not None and site.runtime is not runtime:
        what = f"{path} ({type(module).__name__}) has adapters that were attached to another model around it"
        expected = "one model for all adapters, or detach there first"
        raise PlanError(Problem("shared-module", what, expected=expected))
    if "forward" in module.__dict__ and "_old_forward" not in module.__dict__:
        what = f"the forward of {path} ({type(module).__name__}) was replaced by another library"
        raise PlanError(Problem("wrapped-forward", what, expected="attach first, then wrap"))
    if CHILD in module._modules and site_of(module) is None:
        raise PlanError(Problem("wrapped-forward", f"{path} already has a child named {CHILD!r}"))


def open_site(
    module: nn.Module,
    key: str,
    runtime: Runtime,
    kernel: Kernel | None = None,
    eager: str | None = None,
    bias: str | None = None,
) -> Site:
    """Make a module a site, or give back the one it is."""
    site = site_of(module)
    if site is None:
        replaced.attend()
        site = Site(key, runtime)
        site.__dict__["training"] = module.training
        cls: Any = type(module)
        _become(module, adapted(cls, kernel, eager, bias))  # first: Python may refuse it
        module._modules[CHILD] = site
    elif kernel is not None or eager is not None or bias is not None:
        cls = base_class(module)
        _become(module, adapted(cls, kernel, eager, bias))
    site.__dict__["host_config"] = module.__dict__.get("config")
    return site


def close_site(module: nn.Module, path: str) -> None:
    """Give a module its class back and drop the site.

    Raises: PlanError: another library wrapped it after attach.
    """
    check_unwrapped(module, path)
    _become(module, base_class(module))
    del module._modules[CHILD]


def check_called(blueprint: Blueprint, paths: Iterable[str]) -> None:
    """Refuse parts of a layer of torch that in evaluation reads their weights without calling them.

    Raises: PlanError.
    """
    if not torch.backends.mha.get_fastpath_enabled():
        return
    for address, info in blueprint.stacks.items():
        for index, layer in enumerate(info.layers):
            if isinstance(layer, nn.TransformerEncoderLayer):
                around = blueprint.places[f"{address}.{index}.layer"].path
                if any(path.startswith(f"{around}.") for path in paths):
                    what = f"{around} is an nn.TransformerEncoderLayer: evaluated, it calls no part of it"
                    expected = "torch.backends.mha.set_fastpath_enabled(False) before you attach"
                    raise PlanError(Problem("weight-without-call", what, address, expected))


def check_unwrapped(module: nn.Module, path: str) -> None:
    """Refuse to take a site out from under another library's wrapper."""
    wrapped = "forward" in module.__dict__ and "_old_forward" not in module.__dict__
    if wrapped or "_adapterkit_base" not in type(module).__dict__:
        what = f"{path} ({type(module).__name__}) was wrapped by another library after attach"
        raise PlanError(Problem("wrapped-on-top", what, expected="that wrapper removed first"))


def _become(module: nn.Module, cls: type[nn.Module]) -> None:
    # past `nn.Module`, which would look at the class for what it may be
    object.__setattr__(module, "__class__", cls)
    # a compiler may look at a module again only where a dictionary of it has changed, and take the old graph
    module.__dict__[CHILD] = None
    del module.__dict__[CHILD]
    if "_old_forward" in module.__dict__:
        # accelerate was there first: its wrapper calls the forward that it remembers
        module.__dict__["_old_forward"] = types.MethodType(cls.forward, module)
