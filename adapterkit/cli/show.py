"""`adapterkit show`: the modules of a model with its slots marked, and what each method would train."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from adapterkit.api import kit_for
from adapterkit.cli import models, report
from adapterkit.cli.families import ready
from adapterkit.errors import ConfigError, PlanError
from adapterkit.kit import Kit
from adapterkit.model.blueprint import Blueprint


def run(name: str, interface: str | None, as_json: bool) -> None:
    model = models.named(name)
    kit = kit_for(model, interface)
    methods = {method: _planned(kit, method) for method in ready()}
    total = sum(parameter.numel() for parameter in model.parameters())
    blueprint = kit.blueprint
    if as_json:
        data = {**blueprint.to_dict(), "model": type(model).__name__, "parameters": total, "methods": methods}
        report.as_json(data)
        return
    print(f"{type(model).__name__} ({blueprint.interface_name}), {total:,} parameters")
    for line in tree(model, marks(blueprint)):
        print(line)
    print()
    rows = [_cells(method, found) for method, found in methods.items()]
    report.table(("method", "slots", "parameters", "%", ""), rows)


def _planned(kit: Kit, method: str) -> dict[str, Any]:
    try:
        plan = kit.plan(method, head=False)
    except (PlanError, ConfigError) as error:
        return {"refused": error.problems[0].message}
    return {"slots": len(plan.slots), "parameters": plan.parameters, "percent": round(plan.percent, 4)}


def _cells(method: str, found: dict[str, Any]) -> tuple[str, ...]:
    if "refused" in found:
        return (method, "-", "-", "-", found["refused"])
    return (method, str(found["slots"]), f"{found['parameters']:,}", f"{found['percent']:.2f}", "")


def marks(blueprint: Blueprint) -> dict[str, list[str]]:
    """Module path -> what the interface calls it, with the shape of what may be adapted."""
    found: dict[str, list[str]] = {}
    for slot in blueprint:
        shape = f" {slot.shape[1]} -> {slot.shape[0]}" if slot.shape else ""
        found.setdefault(slot.path, []).append(slot.address + shape)
    for address, place in blueprint.places.items():
        found.setdefault(place.path, []).append(address)
    for head in (*blueprint.heads, *blueprint.poolers):
        if head.address not in found.setdefault(head.path, []):
            found[head.path].append(head.address)
    return found


def tree(model: nn.Module, marked: dict[str, list[str]]) -> Iterator[str]:
    """One line for each module; layers that look alike are shown once."""
    yield from _lines(model, "", 1, marked)


def _lines(module: nn.Module, path: str, depth: int, marked: dict[str, list[str]]) -> Iterator[str]:
    blocks = [(name, _block(name, child, path, depth, marked)) for name, child in module.named_children()]
    while blocks:
        name, (kind, below) = blocks[0]
        looks = _without_numbers(kind, below)
        alike = 1
        while alike < len(blocks) and name.isdigit() and _without_numbers(*blocks[alike][1]) == looks:
            alike += 1
        label = name if alike == 1 else f"{name} ... {blocks[alike - 1][0]}  ({alike} alike)"
        yield f"{'  ' * depth}{label}  {kind}".rstrip()
        yield from below
        blocks = blocks[alike:]


def _block(
    name: str, module: nn.Module, path: str, depth: int, marked: dict[str, list[str]]
) -> tuple[str, list[str]]:
    """What follows the name of a module on its line, and the lines below."""
    here = f"{path}.{name}" if path else name
    said = marked.get(here)
    kind = type(module).__name__ + (f"  <- {', '.join(said)}" if said else "")
    return kind, list(_lines(module, here, depth + 1, marked))


def _without_numbers(kind: str, below: list[str]) -> str:
    """The text of a layer without its own number, which stands in the addresses."""
    return re.sub(r"\.\d+(?=[.,\s]|$)", ".*", "\n".join((kind, *below)))
