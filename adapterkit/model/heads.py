"""Which modules are task heads: everything with weights that the interface does not claim."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os.path import commonpath

from torch import nn

from adapterkit.model.blueprint import Head, Slot, StackInfo
from adapterkit.model.scope import Draft
from adapterkit.model.walk import child


def find_heads(
    model: nn.Module,
    claimed: Iterable[nn.Module],
    output_path: Iterable[nn.Module],
    named: Iterable[tuple[str, nn.Module]],
) -> tuple[Head, ...]:
    """Task heads of `model`.

    Args:
        claimed: modules that the interface speaks of, with all that is below them.
        output_path: modules on the way to the vocabulary; they are no heads either.
        named: heads that the interface names inside what it claims.
    """
    inside = {id(module) for module in (*claimed, *output_path)}
    heads = [Head(f"head.{path}", path, module) for path, module in named]
    if id(model) not in inside:
        _collect(model, "", inside, heads)
    return tuple(heads)


def find_loose(model: nn.Module, base: Iterable[nn.Module]) -> tuple[str, ...]:
    """Parameters that lie directly on a module around the base model, or around its parts.

    They are parts of a head without a module of their own, of which no adapter can have a copy.
    """
    inside = {id(module) for module in base}
    found: list[str] = []

    def walk(module: nn.Module, path: str) -> None:
        if id(module) in inside or not any(id(inner) in inside for inner in module.modules()):
            return
        found.extend(f"{path}{name}" for name, own in module._parameters.items() if own is not None)
        for name, inner in module.named_children():
            walk(inner, f"{path}{name}.")

    walk(model, "")
    return tuple(found)


def owners(
    draft: Draft,
    stacks: Mapping[str, StackInfo],
    between: Mapping[str, nn.Module],
    output: Iterable[nn.Module],
) -> dict[nn.Module, str]:
    """Every module with weights that the interface says something else of than to be a head -> what that is.

    Modules that only lie around such ones, as the root of a stack does, may hold heads as well.
    """
    found: dict[nn.Module, str] = {}

    def add(module: nn.Module, owner: str) -> None:
        for inner in module.modules():
            if any(own is not None for own in inner._parameters.values()):
                found.setdefault(inner, owner)

    layers = {layer for info in stacks.values() for layer in info.layers}
    for address, slot in (*draft.slots.items(), *draft.places.items()):
        if slot.role != "entry" and (slot.module in layers or layers.isdisjoint(slot.module.modules())):
            add(slot.module, address)
    for address, info in stacks.items():
        around = _around(
            info, [draft.places.get(f"{address}.embeddings.{word}") for word in ("table", "out")]
        )
        if around is not None and layers.isdisjoint(around.modules()):
            add(around, f"{address}.embeddings")
        for index, layer in enumerate(info.layers):
            add(layer, f"{address}.{index}")
    for path, module in between.items():
        add(module, f"{path!r}, which is 'between'")
    for module in output:
        add(module, "the path to the vocabulary")
    return found


def _around(info: StackInfo, places: Iterable[Slot | None]) -> nn.Module | None:
    """The innermost module of a stack around all places, None if there are none, or no such module."""
    paths = [place.path.removeprefix(info.path).strip(".").replace(".", "/") for place in places if place]
    common = commonpath(paths) if paths else ""
    return child(info.root, common.replace("/", ".")) if common else None


def owner_of(head: nn.Module, owners: Mapping[nn.Module, str]) -> str | None:
    """What else the interface says of the weights in a module that it calls a head, None: nothing."""
    return next((owners[inner] for inner in head.modules() if inner in owners), None)


def _collect(module: nn.Module, path: str, claimed: set[int], heads: list[Head]) -> None:
    """Maximal modules below `module` that hold weights and nothing claimed."""
    for name, found in module.named_children():
        here = f"{path}.{name}" if path else name
        if id(found) in claimed or any(head.module is found for head in heads):
            continue
        is_list = isinstance(found, nn.ModuleList | nn.ModuleDict)  # never called itself
        if is_list or any(id(inner) in claimed for inner in found.modules()):
            _collect(found, here, claimed, heads)
        elif next(found.parameters(), None) is not None:
            heads.append(Head(f"head.{here}", here, found))
