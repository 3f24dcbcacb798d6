"""Interface + model -> Blueprint. The only code that walks modules; it changes nothing."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from torch import nn

from adapterkit.errors import Problem, ResolveError, SpecError, did_you_mean, listing
from adapterkit.model.bind import add_place, add_slot
from adapterkit.model.blueprint import Blueprint, Head, Slot, StackInfo
from adapterkit.model.heads import find_heads, find_loose, owner_of, owners
from adapterkit.model.repeat import Layers
from adapterkit.model.scope import ITSELF, Draft, Found, Here, Scope
from adapterkit.model.walk import child, expand, join, missing
from adapterkit.spec import registry
from adapterkit.spec.paths import Path
from adapterkit.spec.schema import Interface, Stack


@dataclass
class _Gathered:
    """What all scopes of a model have given so far."""

    draft: Draft = field(default_factory=Draft)
    stacks: dict[str, StackInfo] = field(default_factory=dict)
    claimed: list[nn.Module] = field(default_factory=list)
    output_path: list[nn.Module] = field(default_factory=list)
    poolers: list[Head] = field(default_factory=list)
    heads: list[tuple[str, nn.Module]] = field(default_factory=list)
    between: list[str] = field(default_factory=list)
    apart: list[str] = field(default_factory=list)
    unsupported: dict[str, str] = field(default_factory=dict)


def locate(model: nn.Module) -> tuple[nn.Module, str]:
    """The transformers model at or inside `model`, and its path: wrappers may hold one.

    Raises: ResolveError: there is none, or more than one.
    """
    if hasattr(getattr(model, "config", None), "model_type"):
        return model, ""
    found: list[tuple[nn.Module, str]] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for _, outer in found)
        if not inside and hasattr(getattr(module, "config", None), "model_type"):
            found.append((module, path))
    if len(found) == 1:
        return found[0]
    what = (
        "holds no transformers model" if not found else f"holds {len(found)}: {listing(p for _, p in found)}"
    )
    raise ResolveError(
        Problem(
            "no-interface",
            f"{type(model).__name__} has no config with a model type and {what}",
            expected="an interface of its own: interface='my.yaml'",
        )
    )


def interface_of(model: nn.Module, interface: Any = None) -> Interface:
    """The interface that was given, or the one known for the model's type.

    Raises: ResolveError: none is known. SpecError: the given one has problems.
    """
    if interface is not None:
        return registry.load(interface)
    inner, _ = locate(model)
    config: Any = inner.config
    model_type = config.model_type
    try:
        return registry.by_name(model_type)
    except SpecError as error:
        if error.code != "unknown-interface":
            raise
        raise ResolveError(replace(error.problems[0], code="no-interface")) from None


def resolve(model: nn.Module, interface: Any = None) -> Blueprint:
    """Bind every slot of the interface to a module of the model.

    Args: interface: path, model type, dict or Interface; default: by the model's type.
    Raises: ResolveError: with everything that does not fit; SpecError: the interface itself has problems.
    """
    spec = interface_of(model, interface)
    inner, path = locate(model) if spec.model_type and _holds_transformers_model(model) else (model, "")
    found = _Gathered()
    scope = Scope(spec, inner, path, "", True)
    _resolve_scope(scope, found)
    if found.draft.problems:
        raise ResolveError(make() for make in found.draft.problems.values())
    heads = find_heads(model, found.claimed, found.output_path, found.heads)
    # a class with heads may have the parts of its base side by side with them, without a base around these
    flat = scope.base is inner and heads and hasattr(scope.config, "model_type") and not _is_base(inner)
    return Blueprint(
        interface=spec,
        interface_name=registry.name_of(spec) or "custom",
        model=model,
        slots=found.draft.slots,
        places=found.draft.places,
        stacks=found.stacks,
        heads=heads,
        poolers=tuple(found.poolers),
        loose=find_loose(model, found.claimed if flat else [scope.base]),
        unsupported=found.unsupported,
        scales=found.draft.scales,
        without=found.draft.without,
        between=tuple(found.between),
        apart=tuple(found.apart),
    )


def _holds_transformers_model(model: nn.Module) -> bool:
    if hasattr(getattr(model, "config", None), "model_type"):
        return True
    return any(hasattr(module.__dict__.get("config"), "model_type") for module in model.modules())


def _resolve_scope(scope: Scope, found: _Gathered) -> None:
    """Resolve the stacks and the parts of one scope."""
    found.unsupported |= scope.interface.unsupported
    output = _quietly(getattr(scope.model, "get_output_embeddings", None))
    table = _quietly(getattr(scope.model, "get_input_embeddings", None))
    if scope.base is not scope.model:
        found.claimed.append(scope.base)
    for name, stack in scope.interface.stacks.items():
        here = Here(
            scope, found.draft, scope.base, scope.base_path, scope.sub_config(stack.config), ("stacks", name)
        )
        absent = stack.present_in is not None and not scope.classes & set(stack.present_in)
        if absent or not here.holds(stack.when):
            continue
        info = _resolve_stack(here, name, stack)
        if info is not None:
            found.stacks[info.address] = info
            _claim(found, info)
            found.output_path += _output_path(scope, stack, output)
    found.claimed += [module for module in (table,) if module is not None]
    spoken = list(found.output_path)  # what the model alone says, the interface may name a head
    found.output_path += [module for module in (output,) if module is not None]
    outer = Here(scope, found.draft, scope.model, scope.path, scope.config, ("heads",))
    heads: list[tuple[int, Found]] = []
    for index, path in enumerate(scope.interface.heads):
        head = outer.find(path, index)
        if head is not None:
            heads.append((index, head))
    inner = Here(scope, found.draft, scope.base, scope.base_path, scope.config, ("between",))
    between: dict[str, nn.Module] = {}
    for index, path in enumerate(scope.interface.between):
        module = inner.find(path, index)
        if module is not None:
            found.claimed.append(module.module)
            found.between.append(module.path)
            between[module.path] = module.module
    _resolve_parts(scope, found)
    taken = owners(found.draft, found.stacks, between, spoken) if heads else {}
    for index, head in heads:
        owner = owner_of(head.module, taken)
        if owner is not None:
            fact = f"{head.path!r} is no head of its own: it holds weights of {owner}"
            expected = "a module with weights that nothing else of the interface claims"
            outer.note("not-a-head", fact, expected, words=(index,))
        found.heads.append((head.path, head.module))


def _claim(found: _Gathered, info: StackInfo) -> None:
    """What a stack speaks of is no head; its pooler is kept in mind."""
    found.claimed.append(info.root)
    for word in ("embeddings.table", "embeddings.out"):
        if f"{info.address}.{word}" in found.draft.places:
            found.claimed.append(found.draft.places[f"{info.address}.{word}"].module)
    pooler = found.draft.places.get(f"{info.address}.pooler")
    if pooler is not None:
        found.poolers.append(Head(pooler.address, pooler.path, pooler.module))


def _resolve_parts(scope: Scope, found: _Gathered) -> None:
    """Each part is a scope of its own, with the interface of its own model type."""
    for name, part in scope.interface.parts.items():
        here = Here(scope, found.draft, scope.base, scope.base_path, scope.config, ("parts", name))
        module = here.find(part.at, "at")
        if module is None:
            continue
        found.claimed.append(module.module)
        config = getattr(module.module, "config", None) or scope.sub_config(part.config)
        kind = part.interface or getattr(config, "model_type", None)
        if kind not in registry.model_types() and kind not in registry.interfaces():
            if part.optional is not None:
                found.apart.append(module.path)
                continue
            fact = f"there is no interface for a model of type {kind!r}"
            here.note("no-interface", fact if kind else "the part has no config with a model type")
            continue
        spec = registry.by_name(kind)
        inner = Scope(
            spec, module.module, module.path, f"{scope.prefix}{name}/", scope.by_default and part.by_default
        )
        inside = _Gathered(
            found.draft,
            found.stacks,
            found.claimed,
            poolers=found.poolers,
            between=found.between,
            apart=found.apart,
        )
        _resolve_scope(inner, inside)
        for address, info in found.stacks.items():
            if part.reads is not None and address.startswith(inner.prefix) and info.reads is None:
                found.stacks[address] = replace(info, reads=part.reads)
        if part.by_default:
            found.unsupported |= inside.unsupported  # of the others, see the stacks


def _is_base(model: nn.Module) -> bool:
    """Whether transformers takes the class for the base model of a type, heads or not."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    names = MODEL_MAPPING_NAMES.get(model.config.model_type, ())  # type: ignore[union-attr, arg-type]
    return type(model).__name__ in ((names,) if isinstance(names, str) else names)


def _quietly(getter: Callable[[], Any] | None) -> nn.Module | None:
    """A model's embeddings, None where it says that it has none."""
    try:
        found = getter() if getter is not None else None
    except (NotImplementedError, AttributeError):
        return None
    return found if isinstance(found, nn.Module) else None


def _output_path(scope: Scope, stack: Stack, output: nn.Module | None) -> list[nn.Module]:
    """Modules between the last states and the vocabulary, in a class that has one; each has some of them."""
    said = stack.unembed
    if said is None or (output is None and said.path is None):
        return []
    names = (name for path in (said.path, *said.through) if path for name in path.names())
    return [found for found in (child(scope.model, name) for name in names) if found is not None]


def _resolve_stack(here: Here, name: str, stack: Stack) -> StackInfo | None:
    """The one root below which everything is found; else the problems of the nearest."""
    tried = [_try_stack(here, name, stack, root) for root in _roots(here, stack.at)]
    complete = [(info, draft) for info, draft in tried if not draft.problems]
    if len(complete) == 1:
        here.draft.absorb(complete[0][1])
        return complete[0][0]
    if complete:
        paths = listing(info.path or "." for info, _ in complete)
        here.note("ambiguous", f"more than one alternative fits: {paths}", "expected exactly one")
    elif tried:
        nearest = min((draft for _, draft in tried), key=lambda draft: len(draft.problems))
        here.draft.absorb(Draft(problems=nearest.problems))
    return None


def _roots(here: Here, at: Path | None) -> list[Found]:
    """Roots the stack may have."""
    if at is None:
        return [Found(here.root, here.path, ITSELF)]
    options = at.any_of or (at,)
    modules = ((option, child(here.root, str(option.path))) for option in options)
    found = [Found(m, join(here.path, str(option.path)), option) for option, m in modules if m is not None]
    if not found:
        here.at("at").note_lazily(
            "path-not-found", lambda: missing(here.root, str(options[0].path), here.path)
        )
    return found


def _try_stack(outer: Here, name: str, stack: Stack, root: Found) -> tuple[StackInfo, Draft]:
    """Resolve one stack below one possible root."""
    scope, draft, address = outer.scope, Draft(), outer.scope.prefix + name
    here = outer.moved(
        draft=draft,
        root=root.module,
        path=root.path,
        stack=address,
        address=address,
        batch=stack.batch,
    )
    for word, said in _stack_places(stack).items():
        found = here.find(said, *word.split("."))
        if found:
            add_place(here, f"{here.address}.{word}", found)
    for extra, said in stack.extra.items():
        found = here.find(said, "extra", extra)
        if found:
            add_slot(here, extra, found, ("extra", extra))
    layers = _layers(here.at("layers"), stack)
    kinds = _kinds(here.at("kinds"), stack, len(layers))
    if stack.kinds and not kinds:
        layers = []  # what they are made of is not known
    alike = Layers(stack)
    for index, (path, layer) in enumerate(layers):
        inside = here.moved(root=layer, path=join(here.path, path), address=f"{address}.{index}", layer=index)
        alike.bind(inside, kinds[index] if kinds else None)
    for (loc, word), seen in draft.presence.items():
        if len(seen) > 1:
            message = f"'{word}' is optional, but some layers have it and some have not"
            here.moved(loc=loc).note("partial", message)
    info = StackInfo(
        address=address,
        root=root.module,
        path=root.path,
        num_layers=len(layers),
        layers=tuple(module for _, module in layers),
        inputs=stack.inputs.of(_arguments(draft.places.get(f"{address}.entry", root))),
        parallel=_is_parallel(here, stack),
        reads=stack.reads,
        by_default=scope.by_default and stack.by_default,
        interface=scope.interface,
        kernels=draft.kernels,
        eager=draft.eager,
        sizes=draft.sizes,
        head_dims=draft.head_dims,
    )
    return info, draft


def _arguments(entry: Slot | Found) -> Container[str]:
    """What the class of a module takes, without the adapters that may be there."""
    kind = type(entry.module)
    return _parameters(getattr(kind, "_adapterkit_base", kind).forward)


@cache
def _parameters(function: Callable[..., Any]) -> Container[str]:
    """Names of what a function takes. Kept: to ask takes longer than to bind a layer."""
    return inspect.signature(function).parameters


def _is_parallel(here: Here, stack: Stack) -> bool:
    """Whether attention and MLP read the same input, by the config where it decides."""
    at = here.at("parallel_when")
    return stack.block == "parallel" and (
        not stack.parallel_when or any([at.holds(when) for when in stack.parallel_when])
    )


def _stack_places(stack: Stack) -> dict[str, Path | None]:
    """Named places of a stack outside its layers."""
    return {
        "entry": stack.entry,
        "exit": stack.exit,
        "final_norm": stack.final_norm,
        "pooler": stack.pooler,
        "position_bias": stack.position_bias,
        "embeddings.table": stack.embeddings.table if stack.embeddings else None,
        "embeddings.out": stack.embeddings.out if stack.embeddings else None,
    }


def _layers(here: Here, stack: Stack) -> list[tuple[str, nn.Module]]:
    """Path and module of every layer; one that is used at several depths counts once."""
    found = [(pattern, expand(here.root, pattern)) for pattern in stack.layers.names()]
    existing = [(pattern, layers) for pattern, layers in found if layers]
    if len(existing) == 1:
        return list({id(module): (path, module) for path, module in existing[0][1]}.values())
    if existing:
        here.note(
            "ambiguous",
            f"more than one list exists: {listing(p for p, _ in existing)}",
            "expected exactly one",
        )
        return []
    top = found[0][0].split(".*")[0]
    if child(here.root, top) is not None:
        here.note("path-not-found", f"{found[0][0]!r} holds no layers")
    else:
        here.note_lazily("path-not-found", lambda: missing(here.root, top, here.path))
    return []


def _kinds(here: Here, stack: Stack, count: int) -> list[str] | None:
    """Kind of every layer, None for a stack of one kind."""
    if stack.kinds is None:
        return None
    by = stack.kinds.by
    values = getattr(here.config, by, None)
    if not isinstance(values, list | tuple) or len(values) != count:
        here.note("unknown-config-field", f"config field {by!r} does not list {count} layers", words=("by",))
        return None
    kinds = [str(value) for value in values]
    unknown = sorted(set(kinds) - stack.kinds.of.keys())
    if unknown:
        hint = did_you_mean(unknown[0], stack.kinds.of)
        known = f"kinds: {listing(stack.kinds.of)}"
        here.note(
            "unknown-kind", f"the model has layers of kind {listing(unknown)}", known, hint, words=("by",)
        )
        return None
    return kinds
