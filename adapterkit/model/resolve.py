"""Interface + model -> Blueprint. The only code that walks modules; it changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from torch import nn

from adapterkit.errors import Problem, ResolveError, SpecError, listing
from adapterkit.model import layouts, linear
from adapterkit.model.blueprint import Blueprint, Head, Slot, StackInfo
from adapterkit.model.heads import find_heads
from adapterkit.model.walk import child, expand, join, missing, named_parameters
from adapterkit.spec import registry
from adapterkit.spec.schema import Attention, Interface, Layer, Mlp, Path, Stack, Sublayer
from adapterkit.spec.text import Loc

_MISSING = object()
_ROLES: dict[str, tuple[str, ...]] = {
    "attention": ("q", "k", "v", "o"),
    "cross_attention": ("q", "k", "v", "o"),
    "mlp": ("gate", "up", "down"),
}
# attributes under which attention modules keep head counts, where no config shows them
_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads")


@dataclass(frozen=True)
class Found:
    """A module that a path of the spec named."""

    module: nn.Module
    path: str
    said: Path


@dataclass
class _Draft:
    """What is gathered for one stack; thrown away if an alternative does not fit."""

    slots: dict[str, Slot] = field(default_factory=dict)
    places: dict[str, Slot] = field(default_factory=dict)
    problems: dict[tuple[Loc, str], Callable[[], Problem]] = field(default_factory=dict)
    """Made only when they are shown: an alternative that does not fit is no error, and finding hints takes time."""
    presence: dict[tuple[Loc, str], set[bool]] = field(default_factory=dict)
    kernels: dict[str, Any] = field(default_factory=dict)
    eager: dict[str, str | None] = field(default_factory=dict)
    sizes: dict[str, tuple[int | None, int | None]] = field(default_factory=dict)

    def absorb(self, other: _Draft) -> None:
        self.slots |= other.slots
        self.places |= other.places
        self.problems |= {key: p for key, p in other.problems.items() if key not in self.problems}
        for key, seen in other.presence.items():
            self.presence.setdefault(key, set()).update(seen)
        self.kernels |= other.kernels
        self.eager |= other.eager
        self.sizes |= other.sizes


class _Scope:
    """One model with one interface: the whole model, or a part of it."""

    def __init__(self, interface: Interface, model: nn.Module, path: str, prefix: str, by_default: bool) -> None:
        self.interface = interface
        self.model = model
        self.path = path
        self.prefix = prefix
        self.by_default = by_default
        self.config = getattr(model, "config", None)
        self.base, self.base_path = _base_of(model, path)
        self.classes = {cls.__name__ for cls in chain(type(model).__mro__, type(self.base).__mro__)}

    def problem(self, loc: Loc, code: str, message: str, expected: str = "", hint: str = "") -> Problem:
        mark = self.interface.mark(loc)
        place = {"file": mark.file, "line": mark.line, "column": mark.column} if mark else {}
        return Problem(code, message, ".".join(map(str, loc)), expected, hint, **place)

    def holds(self, when: Mapping[str, Any] | None, config: Any, loc: Loc, draft: _Draft) -> bool:
        """Whether every field of `when` has its value in the config."""
        for name, value in (when or {}).items():
            actual = getattr(config, name, _MISSING)
            if actual is _MISSING:
                known = sorted(key for key in vars(config) if not key.startswith("_")) if config is not None else []
                self.note(draft, (*loc, "when"), "unknown-config-field", f"the config has no field {name!r}", listing(known))
                return False
            if actual != value or isinstance(actual, bool) != isinstance(value, bool):
                return False
        return True

    def note(self, draft: _Draft, loc: Loc, code: str, message: str, expected: str = "", hint: str = "") -> None:
        self.note_lazily(draft, loc, code, lambda: (message, expected, hint))

    def note_lazily(self, draft: _Draft, loc: Loc, code: str, facts: Callable[[], tuple[str, str, str]]) -> None:
        # the same fact on every layer is one problem
        draft.problems.setdefault((loc, code), lambda: self.problem(loc, code, *facts()))


def _base_of(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The model without its head, and its path: what transformers calls `base_model`."""
    prefix = getattr(model, "base_model_prefix", None)
    inner = model._modules.get(prefix) if isinstance(prefix, str) and prefix else None
    return (inner, join(path, str(prefix))) if inner is not None else (model, path)


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
    what = "holds no transformers model" if not found else f"holds {len(found)}: {listing(p for _, p in found)}"
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
    model_type = inner.config.model_type
    try:
        return registry.by_name(model_type)
    except SpecError as error:
        raise ResolveError(replace(error.problems[0], code="no-interface")) from None


def resolve(model: nn.Module, interface: Any = None) -> Blueprint:
    """Bind every slot of the interface to a module of the model.

    Args: interface: path, model type, dict or Interface; default: by the model's type.
    Raises: ResolveError: with everything that does not fit; SpecError: the interface itself has problems.
    """
    spec = interface_of(model, interface)
    inner, path = locate(model) if spec.model_type and hasattr_config(model) else (model, "")
    draft = _Draft()
    stacks: dict[str, StackInfo] = {}
    claimed: list[nn.Module] = []
    through: list[nn.Module] = []
    poolers: list[Head] = []
    named_heads: list[Found] = []
    unsupported: dict[str, str] = {}
    _resolve_scope(_Scope(spec, inner, path, "", True), draft, stacks, claimed, through, poolers, named_heads, unsupported)
    if draft.problems:
        raise ResolveError(make() for make in draft.problems.values())
    heads = find_heads(model, claimed, through, [(f.path, f.module) for f in named_heads])
    return Blueprint(
        interface=spec,
        interface_name=registry.name_of(spec) or "custom",
        model=model,
        slots=draft.slots,
        places=draft.places,
        stacks=stacks,
        heads=heads,
        poolers=tuple(poolers),
        parameters=sum(parameter.numel() for _, parameter in named_parameters(model)),
        unsupported=unsupported,
    )


def hasattr_config(model: nn.Module) -> bool:
    """Whether a transformers model is somewhere at or in `model`."""
    if hasattr(getattr(model, "config", None), "model_type"):
        return True
    return any(hasattr(module.__dict__.get("config"), "model_type") for module in model.modules())


def _resolve_scope(
    scope: _Scope,
    draft: _Draft,
    stacks: dict[str, StackInfo],
    claimed: list[nn.Module],
    through: list[nn.Module],
    poolers: list[Head],
    named_heads: list[Found],
    unsupported: dict[str, str],
) -> None:
    """Resolve the stacks and the parts of one scope."""
    unsupported.update(scope.interface.unsupported)
    output = _quietly(getattr(scope.model, "get_output_embeddings", None))
    if scope.base is not scope.model:
        claimed.append(scope.base)
    for name, stack in scope.interface.stacks.items():
        if stack.present_in is not None and not scope.classes & set(stack.present_in):
            continue
        config = _sub_config(scope, stack.config)
        loc: Loc = ("stacks", name)
        if stack.when and not scope.holds(stack.when, config, loc, draft):
            continue
        info, found = _best(
            [_try_stack(scope, name, stack, at, config) for at in _alternatives(scope, stack.at, config, loc, draft)],
            scope,
            loc,
        )
        draft.absorb(found)
        if info is None:
            continue
        stacks[info.address] = info
        claimed.append(info.root)
        for which in ("embeddings.table", "embeddings.out"):
            if f"{info.address}.{which}" in found.places:
                claimed.append(found.places[f"{info.address}.{which}"].module)
        if f"{info.address}.pooler" in found.places:
            place = found.places[f"{info.address}.pooler"]
            poolers.append(Head(place.address, place.path, place.module))
        through += _output_path(scope, stack, output)
    table = _quietly(getattr(scope.model, "get_input_embeddings", None))
    claimed += [found for found in (table,) if found is not None]
    through += [found for found in (output,) if found is not None]
    for index, said in enumerate(scope.interface.heads):
        found_head = _find(scope, said, scope.model, scope.path, scope.config, ("heads", index), draft)
        if found_head is not None:
            named_heads.append(found_head)
    for name, part in scope.interface.parts.items():
        loc = ("parts", name)
        found = _find(scope, part.at, scope.base, scope.base_path, scope.config, (*loc, "at"), draft)
        if found is None:
            continue
        claimed.append(found.module)
        part_config = getattr(found.module, "config", None) or _sub_config(scope, part.config)
        try:
            spec = registry.by_name(part_config.model_type)
        except (SpecError, AttributeError):
            kind = getattr(part_config, "model_type", "without a model type")
            scope.note(draft, loc, "no-interface", f"there is no interface for the part, a model of type {kind!r}")
            continue
        inner = _Scope(spec, found.module, found.path, f"{scope.prefix}{name}/", scope.by_default and part.by_default)
        _resolve_scope(inner, draft, stacks, claimed, [], poolers, [], unsupported)


def _quietly(getter: Callable[[], Any] | None) -> nn.Module | None:
    """A model's embeddings, None where it says that it has none."""
    try:
        found = getter() if getter is not None else None
    except (NotImplementedError, AttributeError):
        return None
    return found if isinstance(found, nn.Module) else None


def _sub_config(scope: _Scope, name: str | None) -> Any:
    # a tower that stands alone has its own config as the model's config
    return getattr(scope.config, name, scope.config) if name else scope.config


def _output_path(scope: _Scope, stack: Stack, output: nn.Module | None) -> list[nn.Module]:
    """Modules between the last states and the vocabulary, in a class that has a vocabulary; each has some of them."""
    said = stack.unembed
    if said is None or (output is None and said.path is None):
        return []
    names = (name for path in (said.path, *said.through) if path for name in path.names())
    return [found for found in (child(scope.model, name) for name in names) if found is not None]


def _alternatives(scope: _Scope, at: Path | None, config: Any, loc: Loc, draft: _Draft) -> list[Found]:
    """Roots the stack may have; the one below which everything is found is taken."""
    if at is None:
        return [Found(scope.base, scope.base_path, Path(path="."))]
    options = at.any_of or (at,)
    found = []
    for option in options:
        module = child(scope.base, str(option.path))
        if module is not None:
            found.append(Found(module, join(scope.base_path, str(option.path)), option))
    if not found:
        fact, expected, hint = missing(scope.base, str(options[0].path))
        scope.note(draft, (*loc, "at"), "path-not-found", fact, expected, hint)
    return found


def _best(
    tried: list[tuple[StackInfo, _Draft]], scope: _Scope, loc: Loc
) -> tuple[StackInfo | None, _Draft]:
    """The one alternative without problems; else the problems of the nearest."""
    complete = [attempt for attempt in tried if not attempt[1].problems]
    if len(complete) == 1:
        return complete[0]
    draft = _Draft()
    if complete:
        paths = listing(info.path or "." for info, _ in complete)
        scope.note(draft, loc, "ambiguous", f"more than one alternative fits: {paths}", "exactly one")
    elif tried:
        draft.problems = min((attempt[1] for attempt in tried), key=lambda d: len(d.problems)).problems
    return None, draft


def _try_stack(scope: _Scope, name: str, stack: Stack, at: Found, config: Any) -> tuple[StackInfo, _Draft]:
    """Resolve one stack below one possible root."""
    draft, loc = _Draft(), ("stacks", name)
    address, root, path = scope.prefix + name, at.module, at.path
    layers = _layers(scope, stack, root, draft, (*loc, "layers"))
    places = {
        "entry": stack.entry,
        "exit": stack.exit,
        "final_norm": stack.final_norm,
        "pooler": stack.pooler,
        "embeddings.table": stack.embeddings.table if stack.embeddings else None,
        "embeddings.out": stack.embeddings.out if stack.embeddings else None,
    }
    for word, said in places.items():
        found = said and _find(scope, said, root, path, config, (*loc, *word.split(".")), draft)
        if found:
            _place(draft, f"{address}.{word}", address, None, None, found, stack.batch)
    for extra, said in stack.extra.items():
        found = _find(scope, said, root, path, config, (*loc, "extra", extra), draft)
        if found:
            _slot(scope, draft, f"{address}.{extra}", extra, address, None, None, found, (*loc, "extra", extra))
    kinds = _kinds(scope, stack, config, len(layers), loc, draft)
    for index, (layer_path, layer) in enumerate(layers):
        kind = kinds[index] if kinds else None
        _resolve_layer(scope, draft, stack, kind, address, index, layer, join(path, layer_path), config, loc)
    for (where, word), seen in draft.presence.items():
        if len(seen) > 1:
            scope.note(draft, where, "partial", f"'{word}' is optional, but some layers have it and some have not")
    info = StackInfo(
        address=address,
        interface=scope.interface,
        root=root,
        path=path,
        num_layers=len(layers),
        layers=tuple(module for _, module in layers),
        inputs=stack.inputs,
        parallel=stack.block == "parallel",
        reads=stack.reads,
        by_default=scope.by_default,
        kernels=draft.kernels,
        eager=draft.eager,
        sizes=draft.sizes,
    )
    return info, draft


def _layers(scope: _Scope, stack: Stack, root: nn.Module, draft: _Draft, loc: Loc) -> list[tuple[str, nn.Module]]:
    """Path and module of every layer; one that is used at several depths counts once."""
    found = [(pattern, expand(root, pattern)) for pattern in stack.layers.names()]
    existing = [(pattern, layers) for pattern, layers in found if layers]
    if len(existing) == 1:
        return list({id(module): (path, module) for path, module in existing[0][1]}.values())
    if existing:
        scope.note(draft, loc, "ambiguous", f"more than one list exists: {listing(p for p, _ in existing)}", "exactly one")
        return []
    top = found[0][0].split(".*")[0]
    fact, expected, hint = missing(root, top)
    if child(root, top) is not None:
        fact, hint = f"{found[0][0]!r} holds no layers", ""
    scope.note(draft, loc, "path-not-found", fact, expected, hint)
    return []


def _kinds(scope: _Scope, stack: Stack, config: Any, count: int, loc: Loc, draft: _Draft) -> list[str] | None:
    """Kind of every layer, None for a stack of one kind."""
    if stack.kinds is None:
        return None
    values = getattr(config, stack.kinds.by, None)
    where = (*loc, "kinds", "by")
    if not isinstance(values, list | tuple) or len(values) != count:
        scope.note(draft, where, "unknown-config-field", f"config field {stack.kinds.by!r} does not list {count} layers")
        return None
    unknown = sorted(set(values) - stack.kinds.of.keys())
    if unknown:
        scope.note(draft, where, "unknown-kind", f"layers of kind {listing(unknown)}", listing(stack.kinds.of))
        return None
    return [str(value) for value in values]


def _resolve_layer(
    scope: _Scope,
    draft: _Draft,
    stack: Stack,
    kind: str | None,
    stack_address: str,
    index: int,
    layer: nn.Module,
    path: str,
    config: Any,
    loc: Loc,
) -> None:
    address = f"{stack_address}.{index}"
    own: Layer | None = stack.kinds.of[kind] if stack.kinds and kind is not None else None
    _place(draft, f"{address}.layer", stack_address, index, None, Found(layer, path, Path(path=".")), stack.batch)
    if stack.shared_norm is not None:
        found = _find(scope, stack.shared_norm, layer, path, config, (*loc, "shared_norm"), draft)
        if found:
            _place(draft, f"{address}.norm.before", stack_address, index, None, found, stack.batch)
    for word in _ROLES:
        special = own is not None and word in own.model_fields_set
        sublayer: Sublayer | None = getattr(own if special else stack, word)
        if sublayer is None:
            continue
        where = (*loc, "kinds", "of", str(kind), word) if special else (*loc, word)
        _resolve_sublayer(scope, draft, sublayer, word, stack_address, index, layer, path, config, where, stack.batch)


def _resolve_sublayer(
    scope: _Scope,
    draft: _Draft,
    sublayer: Sublayer,
    word: str,
    stack: str,
    index: int,
    layer: nn.Module,
    path: str,
    config: Any,
    loc: Loc,
    batch: str | None,
) -> None:
    """One branch of one layer, through its alternatives."""
    wanted = scope.holds(sublayer.when, config, loc, draft)
    if sublayer.any_of is None:
        attempts = [(loc, sublayer)]
    else:
        numbered = [((*loc, "any_of", i), option) for i, option in enumerate(sublayer.any_of)]
        attempts = [(w, o) for w, o in numbered if o.when is None or scope.holds(o.when, config, w, draft)]
    tried = []
    for where, option in attempts:
        trial = _Draft()
        _bind_sublayer(scope, trial, option, word, stack, index, layer, path, config, where, batch)
        tried.append(trial)
    complete = [trial for trial in tried if not trial.problems]
    if not wanted:
        if complete and sublayer.when:
            values = ", ".join(f"{key}: {value}" for key, value in sublayer.when.items())
            scope.note(draft, (*loc, "when"), "present", f"{word} exists although the config does not say {values}")
        return
    if sublayer.optional is not None:
        draft.presence.setdefault((loc, word), set()).add(bool(complete))
        if not complete and all(_absent(trial) for trial in tried):
            return
    if len(complete) == 1:
        draft.absorb(complete[0])
    elif complete:
        scope.note(draft, (*loc, "any_of"), "ambiguous", "more than one alternative fits", "exactly one on each layer")
    elif tried:
        draft.absorb(min(tried, key=lambda trial: len(trial.problems)))
    else:
        scope.note(draft, (*loc, "any_of"), "no-alternative", "no alternative's 'when' holds for this config")


def _absent(trial: _Draft) -> bool:
    """Nothing of an optional sublayer is there, so that it is absent rather than misspelt."""
    return not trial.slots


def _bind_sublayer(
    scope: _Scope,
    draft: _Draft,
    said: Sublayer,
    word: str,
    stack: str,
    index: int,
    layer: nn.Module,
    path: str,
    config: Any,
    loc: Loc,
    batch: str | None,
) -> None:
    address = f"{stack}.{index}.{word}"

    def find(spec: Path | None, *names: str) -> Found | None:
        return _find(scope, spec, layer, path, config, (*loc, *names), draft) if spec is not None else None

    core = find(said.core, "core") if isinstance(said, Attention) else None
    for name, spec in _points(said):
        found = core if name == "core" else find(spec, *name.split("."))
        if found:
            _place(draft, f"{address}.{name}", stack, index, word, found, spec.batch or batch)
    for role in _ROLES[word]:
        found = find(getattr(said, role, None), role)
        if found:
            _slot(scope, draft, f"{address}.{role}", role, stack, index, word, found, (*loc, role))
    for extra, spec in said.extra.items():
        found = find(spec, "extra", extra)
        if found:
            _slot(scope, draft, f"{address}.{extra}", extra, stack, index, word, found, (*loc, "extra", extra))
    heads = _head_counts(said, core, config)
    if isinstance(said, Attention):
        draft.kernels[word], draft.eager[word], draft.sizes[word] = said.kernel, said.eager, heads
    if said.fused is not None:
        host = find(said.fused.path, "fused", "path")
        if host:
            _fused(scope, draft, said, address, stack, index, word, host, heads, (*loc, "fused"))


def _points(said: Sublayer) -> Iterable[tuple[str, Path]]:
    """Named places of a sublayer that are no linear maps."""
    named = [("core", getattr(said, "core", None)), ("out", said.out), ("tail", said.tail)]
    named.append(("own_adapter", said.own_adapter))
    if said.norm is not None:
        named += [(f"norm.{place}", getattr(said.norm, place)) for place in ("before", "after", "after_residual")]
    return ((name, spec) for name, spec in named if spec is not None)


def _find(
    scope: _Scope, said: Path, root: nn.Module, path: str, config: Any, loc: Loc, draft: _Draft
) -> Found | None:
    """The module that a path of the spec names below `root`; problems go to `draft`."""
    wanted = said.when is None or scope.holds(said.when, config, loc, draft)
    options = said.any_of or (said,)
    found = []
    for option in options:
        if option is not said and option.when is not None and not scope.holds(option.when, config, loc, draft):
            continue
        module = child(root, str(option.path))
        if module is not None:
            found.append(Found(module, join(path, str(option.path)), said))
    if said.optional is not None and wanted:
        draft.presence.setdefault((loc, str(loc[-1])), set()).add(bool(found))
    if not wanted:
        if found:
            values = ", ".join(f"{key}: {value}" for key, value in (said.when or {}).items())
            scope.note(draft, (*loc, "when"), "present", f"{found[0].path!r} exists although the config does not say {values}")
        return None
    if len({id(f.module) for f in found}) > 1:
        names = listing(f.path for f in found)
        scope.note(draft, loc, "ambiguous", f"more than one alternative exists: {names}", "exactly one")
        return None
    if not found and said.optional is None:
        scope.note_lazily(draft, loc, "path-not-found", lambda: _not_found(root, options))
    return found[0] if found else None


def _not_found(root: nn.Module, options: Sequence[Path]) -> tuple[str, str, str]:
    """(fact, expected, hint) about a path that does not exist."""
    fact, expected, hint = missing(root, str(options[0].path))
    tried = f"none of {listing(repr(o.path) for o in options)} exists; " if len(options) > 1 else ""
    return tried + fact, expected, hint


def _place(
    draft: _Draft, address: str, stack: str, layer: int | None, sublayer: str | None, found: Found, batch: str | None
) -> None:
    role = address.rpartition(".")[2]
    draft.places[address] = Slot(address, role, stack, layer, sublayer, found.module, found.path, batch=batch or "first")


def _slot(
    scope: _Scope,
    draft: _Draft,
    address: str,
    role: str,
    stack: str,
    layer: int | None,
    sublayer: str | None,
    found: Found,
    loc: Loc,
) -> Slot | None:
    """Add a linear slot. A weight that is used without calling its module cannot be adapted and is refused."""
    size = linear.shape(found.module)
    if size is None:
        what = f"{found.path} is a {type(found.module).__name__}"
        scope.note(draft, loc, "not-linear", what, "a linear map: Linear, Conv1D or one of their quantised kinds")
        return None
    owner = _parent(scope.model, found.path, scope.path)
    if isinstance(owner, nn.MultiheadAttention):
        what = f"{found.path} belongs to nn.MultiheadAttention, which uses its weight without calling it"
        scope.note(draft, loc, "weight-without-call", what, "a module that is called in the forward pass")
        return None
    slot = Slot(
        address,
        role,
        stack,
        layer,
        sublayer,
        found.module,
        found.path,
        size,
        None,
        linear.is_transposed(found.module),
        found.said.batch or "first",
        found.said.was,
    )
    draft.slots[address] = slot
    return slot


def _parent(model: nn.Module, path: str, model_path: str) -> nn.Module | None:
    below = path[len(model_path) + 1 :] if model_path else path
    return child(model, below.rpartition(".")[0]) if "." in below else model


def _fused(
    scope: _Scope,
    draft: _Draft,
    said: Sublayer,
    address: str,
    stack: str,
    index: int,
    word: str,
    host: Found,
    heads: tuple[int | None, int | None],
    loc: Loc,
) -> None:
    """The fused matrix as a slot of its own, and each of its roles as a stretch of its rows."""
    assert said.fused is not None
    whole = _slot(scope, draft, f"{address}.fused", "fused", stack, index, word, host, (*loc, "path"))
    if whole is None or whole.shape is None:
        return
    try:
        rows = layouts.split(whole.shape[0], said.fused.layout, said.fused.order, *heads)
    except ValueError as error:
        scope.note(draft, loc, "bad-layout", f"{host.path}: {error}", "rows as 'layout' and 'order' say", "see 'sizes'")
        return
    for role, stretch in rows.items():
        draft.slots[f"{address}.{role}"] = replace(
            whole, address=f"{address}.{role}", role=role, shape=(stretch.total, whole.shape[1]), rows=stretch
        )


def _head_counts(said: Sublayer, core: Found | None, config: Any) -> tuple[int | None, int | None]:
    """(query heads, key/value heads): what the spec says, else what config or core show."""
    if isinstance(said, Mlp):
        return None, None
    sizes = getattr(said, "sizes", None)
    holders = [holder for holder in (config, core.module if core else None) if holder is not None]

    def look(declared: int | str | None, usual: tuple[str, ...]) -> int | None:
        if isinstance(declared, int):
            return declared
        for holder in holders:
            for name in (declared,) if declared else usual:
                value = getattr(holder, name, None)
                if isinstance(value, int):
                    return value
        return None

    heads = look(getattr(sizes, "heads", None), _HEADS)
    return heads, look(getattr(sizes, "kv_heads", None), _KV_HEADS) or heads
