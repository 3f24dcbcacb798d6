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


def loose_parameters(model: nn.Module) -> tuple[str, ...]:
    """Weights that a class with a head keeps directly, in no module that could be copied.

    Those of a model that is its own base, such as a scale of logits, are no head.
    """
    inner = getattr(model, "base_model", model)
    own = (name for name, parameter in model._parameters.items() if parameter is not None)
    return tuple(own) if isinstance(inner, nn.Module) and inner is not model else ()


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
