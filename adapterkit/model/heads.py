"""Which modules are task heads: everything with weights that the interface does not claim."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from adapterkit.model.blueprint import Head


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
        for name, child in module.named_children():
            walk(child, f"{path}{name}.")

    walk(model, "")
    return tuple(found)


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
