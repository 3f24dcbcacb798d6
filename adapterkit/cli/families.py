"""`adapterkit list`: which family can have which method, as its interface says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from typing import Any

from adapterkit.cli import report
from adapterkit.errors import ConfigError, SpecError, listing
from adapterkit.methods.base import MethodConfig
from adapterkit.methods.names import METHODS, PRESETS, parse
from adapterkit.spec import registry
from adapterkit.spec.paths import Path
from adapterkit.spec.schema import Attention, Interface, Layer, Stack, Sublayer
from adapterkit.spec.vocabulary import ATTENTION_ROLES, MLP_ROLES, SUBLAYERS


def run(as_json: bool) -> None:
    rows = [_row(entry) for entry in registry.known_files()]
    if as_json:
        report.as_json({"interfaces": rows})
        return
    cells = [
        (
            row["name"],
            ", ".join(row["model_types"]) or "-",
            _summary(row["methods"]),
            "no" if row["parallel"] else "partly" if row["parallel_not_at"] else "yes",
        )
        for row in rows
    ]
    report.table(("interface", "model types", "methods", "Parallel"), cells)
    print(f"\nmethods: {', '.join(ready())}")
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for method, why in (*row["methods"].items(), ("Parallel", row["parallel"])):
            if why is not None:
                reasons.setdefault((row["name"], why), []).append(method)
    for (name, why), methods in reasons.items():
        print(f"{name}: no {', '.join(methods)}: {why}")
    for row in rows:
        some: dict[str, list[str]] = {}
        for method, whys in row["partly"].items():
            for why in whys:
                some.setdefault(why, []).append(method)
        for why, methods in some.items():
            print(f"{row['name']}: {', '.join(methods)} not in every layer or model: {why}")
        if row["parallel_not_at"]:
            print(f"{row['name']}: no Parallel of adapters at {listing(row['parallel_not_at'])}: {ROWLESS}")


ROWLESS = "what these modules are called with has no row for each example"


def _summary(methods: Mapping[str, str | None]) -> str:
    lacking = [name for name, why in methods.items() if why is not None]
    if not lacking:
        return "all"
    return "none" if len(lacking) == len(methods) else f"all but {listing(lacking, 6)}"


@cache
def ready() -> Mapping[str, MethodConfig]:
    """Every method that needs no options and trains something, by name."""
    found: dict[str, MethodConfig] = {}
    for name in (*METHODS, *PRESETS):
        with suppress(ConfigError):  # it cannot be without options
            found[name] = parse(name)
    return {name: config for name, config in found.items() if config.trains}


def _row(entry: registry.Entry) -> dict[str, Any]:
    """One interface; for each method why the family cannot have it, None if it can."""
    row: dict[str, Any] = {"name": entry.name, "file": str(entry.path), "shipped": entry.shipped}
    try:
        interface = registry.load(entry.path)
    except SpecError as error:
        why = f"{entry.path} has {len(error.problems)} problems: see `adapterkit check`"
        found = {"methods": dict.fromkeys(ready(), why), "parallel": why, "parallel_not_at": [], "partly": {}}
        return {**row, "model_types": [], **found}
    methods = {name: _unsupported(interface, name, config) for name, config in ready().items()}
    types = list(interface.model_type or ())
    row |= {"parallel": no_parallel(interface), "parallel_not_at": list(rowless(interface))}
    row["partly"] = {
        name: list(whys) for name, config in ready().items() if (whys := partly(interface, config))
    }
    return {**row, "model_types": types, "methods": methods}


def _unsupported(interface: Interface, name: str, config: MethodConfig) -> str | None:
    return interface.unsupported.get(name) or refusal(interface, config)


def no_parallel(interface: Interface) -> str | None:
    """Why a family cannot have several adapters in one batch, None if it can."""
    odd = [name for name, stack in interface.stacks.items() if stack.batch not in (None, "first")]
    return f"the stream of {listing(odd)} has no row for each example" if odd else None


def rowless(interface: Interface) -> Iterator[str]:
    """Roles whose adapters cannot act side by side in one batch: what is there has no rows of examples."""
    found = (
        f"{word}.{role}"
        for stack in interface.stacks.values()
        if stack.batch in (None, "first")
        for word, sublayer in _sublayers(stack)
        for role, path in _maps(word, sublayer)
        if path.batch == "second" or (path.batch == "none" and not _apart(stack, sublayer))
    )
    yield from dict.fromkeys(found)


def _maps(word: str, sublayer: Sublayer) -> Iterator[tuple[str, Path]]:
    """Linear maps of a sublayer by role or extra name."""
    known = MLP_ROLES if word == "mlp" else ATTENTION_ROLES
    for role, path in (*((role, getattr(sublayer, role)) for role in known), *sublayer.extra.items()):
        if path is not None:
            yield role, path
    if sublayer.fused is not None:
        yield from ((role, sublayer.fused.path) for role in sublayer.fused.roles)


def _apart(stack: Stack, sublayer: Sublayer) -> bool:
    """Whether the core of an attention can be called for the examples of each adapter."""
    core = getattr(sublayer, "core", None)
    return core is not None and core.batch in (None, "first") and "none" in stack.inputs.batch.values()


def refusal(interface: Interface, config: MethodConfig) -> str | None:
    """Why a family cannot have a method, None if it can. A model made of models has what its parts have."""
    if config.method in interface.unsupported:
        return interface.unsupported[config.method]
    for member in getattr(config, "configs", ()):
        why = refusal(interface, member)
        if why is not None:
            return why
    said = [sublayer for stack in interface.stacks.values() for sublayer in _sublayers(stack)]
    branches = {word for word, sublayer in said if "branch" not in sublayer.without}
    roles = {role for stack in interface.stacks.values() for role in (*stack.extra, *stack_roles(stack))}
    wanted = getattr(config, "targets", ())
    lacking = [role for role in wanted if role.rpartition(".")[2] not in roles] if wanted != "all" else []
    lacking += [word for word in getattr(config, "locations", ()) if word not in branches]
    if interface.parts:
        return None
    if config.place == "embeddings" and not any(
        s.embeddings and s.embeddings.out for s in interface.stacks.values()
    ):
        return "no stack has embeddings that are named"
    cores = [sublayer for _, sublayer in said if isinstance(sublayer, Attention)]
    if config.place == "core" and all("core" in sublayer.without for sublayer in cores):
        return next((sublayer.without["core"] for sublayer in cores), "it has no attention")
    if not lacking:
        return None
    reasons = dict.fromkeys(reason for word in lacking if (reason := _reason(said, word)))
    return f"it has no {listing(lacking)}" + (f": {listing(reasons)}" if reasons else "")


def partly(interface: Interface, config: MethodConfig) -> tuple[str, ...]:
    """Why a method that a family can have finds no place in some layers, or in some of its models."""
    if refusal(interface, config) is not None:
        return ()
    members = getattr(config, "configs", ()) or (config,)
    wanted = {word for one in members for field in ("targets", "locations") for word in _words(one, field)}
    said = [sublayer for stack in interface.stacks.values() for sublayer in _sublayers(stack)]
    found = (_reason([one], word) for word in wanted for one in said)
    return tuple(dict.fromkeys(sorted(filter(None, found))))


def _words(config: MethodConfig, field: str) -> tuple[str, ...]:
    words = getattr(config, field, None) or ()
    return () if isinstance(words, str) else tuple(words)


def _reason(said: list[tuple[str, Sublayer]], lacking: str) -> str:
    """Why there is no such role or no branch of such a sublayer, where the interface tells."""
    word, _, role = lacking.rpartition(".")
    told = (
        sublayer.without.get("branch" if lacking == kind else role, "")  # type: ignore[call-overload]
        for kind, sublayer in said
        if lacking == kind or not word or word == kind
    )
    return next(filter(None, told), "")


def _layers(stack: Stack) -> list[Layer]:
    return [stack, *(stack.kinds.of.values() if stack.kinds else ())]


def _sublayers(stack: Stack) -> Iterator[tuple[str, Sublayer]]:
    """Every sublayer of every kind of layer with its word; its alternatives one by one."""
    for layer in _layers(stack):
        for word in SUBLAYERS:
            sublayer = getattr(layer, word)
            if sublayer is not None:
                yield from ((word, option) for option in sublayer.any_of or (sublayer,))


def stack_roles(stack: Stack) -> Iterator[str]:
    """Every role and extra name that some layer of the stack has."""
    for word, sublayer in _sublayers(stack):
        known = MLP_ROLES if word == "mlp" else ATTENTION_ROLES
        yield from (role for role in known if getattr(sublayer, role) is not None)
        yield from sublayer.fused.roles if sublayer.fused else ()
        yield from sublayer.extra
