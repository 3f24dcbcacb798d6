"""The observed columns of layers of a model as stacks: where each begins, what it is called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from adapterkit.author.column import Column, base_path
from adapterkit.author.describe import Notes, Scene
from adapterkit.author.graph import Projection
from adapterkit.author.stacks import StackFacts, column

_WORDS: Mapping[str, tuple[str, ...]] = {
    "decoder": ("decoder",),
    "vision": ("vision", "visual", "image", "patch"),
    "audio": ("audio", "speech", "sound"),
    "text": ("text", "language"),
    "encoder": ("encoder",),
}


def columns(scene: Scene, notes: Notes) -> list[Column]:
    """The observed columns with their names and roots."""
    whole = [_whole(scene, one) for one in scene.seen.stacks]
    facts = [replace(one, tables=_own_tables(scene, one, whole)) for one in whole]
    base = base_path(scene.model)
    paths = [one.path for one in facts]
    found: list[Column] = []
    for seen in facts:
        root = base if len(facts) == 1 else _root(seen.path, [p for p in paths if p != seen.path], base)
        root = _with_tables(scene, seen, _owner(scene, seen.path, root), base)
        found.append(Column(scene, seen, "", root, notes))
    names: dict[str, int] = {}
    for one in found:
        name = _name(one, len(found))
        names[name] = names.get(name, 0) + 1
        one.name = name if names[name] == 1 else f"{name}{names[name]}"
        one.by_default = not any(_leads_to(scene, one.facts, other.facts) for other in found)
    return found


def _own_tables(scene: Scene, one: StackFacts, whole: list[StackFacts]) -> tuple[Projection, ...]:
    """The tables that a stream begins with, without those of another that it is made of."""
    behind = scene.graph.closure([one.entering])
    before = [other for other in whole if other is not one and other.leaving in behind]
    others = scene.graph.closure([other.entering for other in before])
    return tuple(table for table in one.tables if table.node not in others)


def _leads_to(scene: Scene, one: StackFacts, other: StackFacts) -> bool:
    """Whether states of a stack without tokens of its own are tokens of another, which has more of them."""
    if one is other or one.tables or not other.tables or one.leaving is None:
        return False
    return one.leaving in scene.graph.closure([other.entering])


def between(scene: Scene, found: list[Column], unclaimed: list[str], notes: Notes) -> list[str]:
    """Of the modules that no stack speaks of, those that are no heads: they lead to a stack, or did not run.

    Args: unclaimed: their paths.
    """
    graph = scene.graph
    read = [v for one in found for v in (one.facts.entering, one.facts.leaving) if v is not None]
    behind = graph.closure(read)
    named: list[str] = []
    for path in unclaimed:
        calls = [call for call in graph.calls if call.path == path or call.path.startswith(f"{path}.")]
        if any(behind.intersection(call.outputs) for call in calls):
            named.append(path)
        elif not calls:
            named.append(path)
            text = f"{path} did not run with the inputs that were tried: nothing was seen of it"
            notes.remark(("between",), text)
    return named


def _root(path: str, others: list[str], base: str) -> str:
    """The outermost module that holds this list of layers and none of the others."""
    parts = path.split(".")
    start = len(base.split(".")) if base else 0
    for count in range(start + 1, len(parts)):
        outer = ".".join(parts[:count])
        if "*" in outer:
            break
        if not any(other == outer or other.startswith(f"{outer}.") for other in others):
            return outer
    return base


def _whole(scene: Scene, facts: StackFacts) -> StackFacts:
    """The column with those layers of its list that compute no attention: they are of another kind."""
    if "*" in facts.path:
        return facts
    known = {one.call.index for one in facts.layers}
    paths = [f"{facts.path}.{name}" for name, _ in scene.modules[facts.path].named_children()]
    calls = [call for path in paths for call in scene.graph.calls_of(path) if call.index not in known]
    more = [one for one in map(scene.seen.layer, calls) if one.branches]
    if not more:
        return facts
    layers = sorted((*facts.layers, *more), key=lambda one: one.call.index)
    return column(scene.graph, facts.path, tuple(layers))


def _owner(scene: Scene, path: str, root: str) -> str:
    """The module that has the config of these layers, if that is further in."""
    whole = getattr(scene.modules[root], "config", None)
    parts = path.split(".")
    for count in range(len(parts) - 1, len(root.split(".")) if root else 0, -1):
        outer = ".".join(parts[:count])
        config = getattr(scene.modules.get(outer), "config", None)
        if config is not None and config is not whole and hasattr(config, "model_type"):
            return _outermost(scene, parts, count, config, root)
    return root


def _with_tables(scene: Scene, facts: StackFacts, root: str, base: str) -> str:
    """The root, or the nearest module above it that also holds the tables of the ids."""
    while root != base and any(scene.below(table.path, root) is None for table in facts.tables):
        root = root.rpartition(".")[0]
    return root


def _outermost(scene: Scene, parts: list[str], count: int, config: Any, root: str) -> str:
    """The outermost module on the way that has this config."""
    start = len(root.split(".")) if root else 0
    for size in range(start + 1, count + 1):
        outer = ".".join(parts[:size])
        if getattr(scene.modules.get(outer), "config", None) is config:
            return outer
    return ".".join(parts[:count])


def _name(column: Column, count: int) -> str:
    """A name for the stack, by the words of its path; by what attention may see, if it is alone."""
    path = column.facts.path.lower()
    if count > 1:
        order = ("vision", "audio", "text", "decoder", "encoder")
        for name in order:
            if any(word in path for word in _WORDS[name]):
                return name
    causal = any(
        bool(getattr(column.scene.modules[event.core.path], "is_causal", False))
        for layer in column.facts.layers
        for branch in layer.branches
        if branch.kind == "attention"
        for event in branch.events
    )
    return "decoder" if causal else "encoder"
