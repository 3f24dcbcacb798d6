"""`adapterkit list`: which family can have which method, as its interface says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from adapterkit.cli import report
from adapterkit.errors import SpecError, listing
from adapterkit.methods.names import METHODS, parse
from adapterkit.spec import registry
from adapterkit.spec.schema import Attention, Interface, Layer, Mlp, Stack
from adapterkit.spec.vocabulary import ATTENTION_ROLES, MLP_ROLES


def run(as_json: bool) -> None:
    rows = [_row(entry) for entry in registry.known_files()]
    if as_json:
        report.as_json({"interfaces": rows})
        return
    cells = [
        (
            row["name"],
            ", ".join(row["model_types"]) or "-",
            *("-" if no else "yes" for no in row["methods"].values()),
        )
        for row in rows
    ]
    report.table(("interface", "model types", *METHODS), cells)
    reasons = {(why, row["name"]): None for row in rows for why in row["methods"].values() if why}
    for why, name in reasons:
        print(f"{name}: {why}")


def _row(entry: registry.Entry) -> dict[str, Any]:
    """One interface; for each method why the family cannot have it, None if it can."""
    row: dict[str, Any] = {"name": entry.name, "file": str(entry.path), "shipped": entry.shipped}
    try:
        interface = registry.load(entry.path)
    except SpecError as error:
        why = f"{entry.path} has {len(error.problems)} problems: see `adapterkit check`"
        return {**row, "model_types": [], "methods": dict.fromkeys(METHODS, why)}
    methods = {name: refusal(interface, name) for name in METHODS}
    return {**row, "model_types": list(interface.model_type or ()), "methods": methods}


def refusal(interface: Interface, method: str) -> str | None:
    """Why a family cannot have a method with its default options, None if it can.

    A model made of models has what its parts have.
    """
    if method in interface.unsupported:
        return interface.unsupported[method]
    wanted = getattr(parse(method), "targets", ())
    if wanted == "all" or interface.parts:
        return None
    roles = {role for stack in interface.stacks.values() for role in _roles_of_stack(stack)}
    lacking = [role for role in wanted if role.rpartition(".")[2] not in roles]
    return f"it has no {listing(lacking)}" if lacking else None


def _roles_of_stack(stack: Stack) -> Iterator[str]:
    yield from stack.extra
    layers: list[Layer] = [stack, *(stack.kinds.of.values() if stack.kinds else ())]
    for layer in layers:
        for sublayer in (layer.attention, layer.cross_attention, layer.mlp):
            if sublayer is not None:
                yield from _roles(sublayer)


def _roles(sublayer: Attention | Mlp) -> Iterator[str]:
    for option in sublayer.any_of or ():
        yield from _roles(option)
    known = ATTENTION_ROLES if isinstance(sublayer, Attention) else MLP_ROLES
    yield from (role for role in known if getattr(sublayer, role) is not None)
    yield from sublayer.fused.order if sublayer.fused else ()
    yield from sublayer.extra
