"""What attention is called with beside the stream and has no row for each example, where that matters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from adapterkit.author import axes
from adapterkit.author.scene import Scene as Trial
from adapterkit.author.stacks import StackFacts
from adapterkit.spec.terms import Batch

if TYPE_CHECKING:
    from adapterkit.author.describe import Scene


def beside(scene: Scene, facts: StackFacts, said: Mapping[str, Any]) -> dict[str, Batch]:
    """Argument -> 'none', for every argument of the cores without examples; empty if no map is called so."""
    if not any(_apart(block) for block in _attention(said)):
        return {}
    less = Trial("", scene.model, scene.inputs).shorter
    if less is None:
        return {}
    branches = [one for layer in facts.layers for one in layer.branches]
    cores = dict.fromkeys(event.core.path for one in branches for event in one.events)
    found = axes.arguments(scene.graph, less.graph, cores)
    return {name: axis for name, axis in found.items() if axis == "none"}


def _attention(said: Any) -> Iterator[Mapping[str, Any]]:
    """Every attention block of a stack, wherever it stands."""
    if isinstance(said, Mapping):
        if "core" in said:
            yield said
        for one in said.values():
            yield from _attention(one)
    elif isinstance(said, list | tuple):
        for one in said:
            yield from _attention(one)


def _apart(block: Mapping[str, Any]) -> bool:
    """Whether a map inside the core is called with what belongs to no example, while the core is not."""
    named = [*block.values(), *block.get("extra", {}).values()]
    rowless = [one for one in named if isinstance(one, Mapping) and one.get("batch") == "none"]
    return any(str(one.get("path", "")).startswith(f"{block['core']}.") for one in rowless)
