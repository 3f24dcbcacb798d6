"""What users call first: attach, load, plan, of. Each finds or makes the kit of a model and hands on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapterkit.errors import ConfigError, NotAttachedError, PlanError, Problem
from adapterkit.files import reader
from adapterkit.kit import Head_, Kit, Method
from adapterkit.model.resolve import resolve
from adapterkit.model.walk import ATTRIBUTE
from adapterkit.planning import Plan
from adapterkit.spec import registry
from adapterkit.spec.schema import Interface

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP, DataParallel, FSDP or a compiled wrapper.

    Raises: ConfigError: it is no module.
    """
    if not isinstance(model, nn.Module):
        message = f"a model is a torch.nn.Module, not {type(model).__name__}"
        raise ConfigError(Problem("not-a-module", message, "model", "such as AutoModel.from_pretrained(...)"))
    while ATTRIBUTE not in model.__dict__:
        names = ("_orig_mod", "_fsdp_wrapped_module", *(("module",) if isinstance(model, _WRAPPERS) else ()))
        inner = next((found for name in names if (found := model._modules.get(name)) is not None), None)
        if inner is None:
            return model
        model = inner
    return model


def of(model: nn.Module) -> Kit:
    """The kit of a model, seen through DDP, DataParallel, FSDP and compiled wrappers.

    Raises: NotAttachedError: nothing is attached.
    """
    kit = unwrapped(model).__dict__.get(ATTRIBUTE)
    if not isinstance(kit, Kit):
        raise NotAttachedError(
            Problem("not-attached", f"no adapter is attached to this {type(model).__name__}")
        )
    return kit


def _refuse_replicated(model: nn.Module) -> None:
    """Refuse an adapter to be trained in a model that DDP has: gradients of what comes later stay apart.

    Raises: PlanError.
    """
    while isinstance(model, nn.Module) and ATTRIBUTE not in model.__dict__:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            message = "DistributedDataParallel keeps equal in all processes what it found when it was made"
            expected = "attach first, then wrap; trainable=False for what is not trained"
            raise PlanError(Problem("replicated-before", message, "model", expected))
        model = model._modules.get("_orig_mod") or model._modules.get("module")  # type: ignore[assignment]


def kit_for(model: nn.Module, interface: Any = None) -> Kit:
    """The kit of a model, a new one (not yet marked on the model) if it has none."""
    model = unwrapped(model)
    kit = model.__dict__.get(ATTRIBUTE)
    if not isinstance(kit, Kit):
        return Kit(model, resolve(model, interface))
    if interface is not None:
        if registry.digest(registry.load(interface)) != registry.digest(kit.blueprint.interface):
            message = "the model already has adapters under another interface"
            raise PlanError(Problem("other-interface", message, "interface", kit.blueprint.interface_name))
    return kit


def attach(
    model: nn.Module,
    method: Method,
    *,
    name: str = "default",
    interface: str | Path | dict[str, Any] | Interface | None = None,
    activate: bool = True,
    trainable: bool = True,
    strict: bool = True,
    head: Head_ = "auto",
    seed: int | None = None,
    dtype: str | torch.dtype = "match",
    replace: bool = False,
) -> Kit:
    """Add an adapter to a model: resolve, plan, inject, freeze the base, activate.

    Args:
        model: any model that an interface describes; its class and its methods stay as they are.
        method: a name ("lora"), a shorthand ("lora[r=4]"), a config or a dict.
        name: letters, digits, '_' and '-'.
        interface: path, model type, dict or Interface; default: by the model's type.
        activate: let it act at once.
        trainable: let it be trained.
        strict: refuse when something asked for is missing; False attaches what exists and lists the rest
            in `.plan.missing`.
        head: give the adapter its own copy of the task heads; "auto" does so where there are any.
        seed: start from the same weights on every device.
        dtype: "match" the hosts, a name or a torch.dtype.
        replace: replace an adapter of the same name.
    Raises: SpecError, ResolveError, ConfigError, PlanError; the model is as before then.
    """
    if trainable:
        _refuse_replicated(model)
    return kit_for(model, interface).attach(
        method,
        name=name,
        activate=activate,
        trainable=trainable,
        strict=strict,
        head=head,
        seed=seed,
        dtype=dtype,
        replace=replace,
    )


def load(
    model: nn.Module,
    source: str | Path,
    *,
    name: str | None = None,
    interface: str | Path | dict[str, Any] | Interface | None = None,
    activate: bool = True,
    trainable: bool = False,
    head: Head_ = "auto",
    revision: str | None = None,
    local_files_only: bool = False,
    allow_bin: bool = False,
) -> Kit:
    """Add the adapters of a directory or hub id: native, AdapterHub or PEFT files, or a full checkpoint.

    Args:
        source: a directory, a checkpoint directory of the model, or a hub id.
        name: of the adapter here; default: the one in the file.
        interface: as for `attach`. By hand it says also of a model of another type that the file fits it.
        activate, trainable, head: as for `attach`.
        revision, local_files_only: for hub ids.
        allow_bin: read torch files too, with `weights_only=True`.
    Raises: FileFormatError: unknown or missing tensors, other shapes, a newer format, a head that does not
        fit, a model of another family; the model is as before then.
    """
    if trainable:
        _refuse_replicated(model)
    interface = reader.interface_for(source, interface, revision, local_files_only, unwrapped(model))
    return kit_for(model, interface).load(
        source,
        name=name,
        activate=activate,
        trainable=trainable,
        head=head,
        revision=revision,
        local_files_only=local_files_only,
        allow_bin=allow_bin,
    )


def plan(
    model: nn.Module,
    method: Method,
    *,
    name: str = "default",
    interface: str | Path | dict[str, Any] | Interface | None = None,
    strict: bool = True,
    head: Head_ = "auto",
) -> Plan:
    """What attach would do. Nothing is changed; the model may be on the meta device."""
    return kit_for(model, interface).plan(method, name=name, strict=strict, head=head)
