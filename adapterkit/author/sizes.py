"""Head counts that neither the config's usual fields nor the core show."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adapterkit.author.layers import BranchFacts
from adapterkit.model import linear
from adapterkit.model.bind import usual_heads

if TYPE_CHECKING:
    from adapterkit.author.columns import Column
    from adapterkit.author.describe import Describer, Scene, Words


def missing_sizes(column: Column, describer: Describer, branch: BranchFacts, words: Words) -> Words:
    """What `sizes` must say of a sublayer, so that the counts are those observed; empty if nothing."""
    scene, event = column.scene, branch.events[-1]
    k = words.get("k")
    path = f"{branch_layer(column, branch)}.{k}" if isinstance(k, str) else None
    wanted = dict(zip(("heads", "kv_heads"), describer.heads(event, path), strict=True))
    if "fused" in words and "k" in words["fused"]["order"]:
        wanted["kv_heads"] = _fused_kv_heads(scene, column, branch, words, wanted)
    core = scene.modules[event.core.path]
    shown = dict(zip(("heads", "kv_heads"), usual_heads(column.config, core), strict=True))
    if shown == wanted:
        return {}
    found: Words = {}
    for word, count in wanted.items():
        name = _named(column, core, word, count)
        if name is None:
            column.notes.gap(
                (*column.loc, branch.kind, "sizes"), f"{word}: {count} here, which no field shows"
            )
        else:
            found[word] = name
    return found


def _fused_kv_heads(
    scene: Scene, column: Column, branch: BranchFacts, words: Words, wanted: dict[str, int]
) -> int:
    layer = branch_layer(column, branch)
    size = linear.shape(scene.modules[f"{layer}.{words['fused']['path']}"])
    wide = scene.graph.nodes[branch.events[-1].query].shape[-1]
    if size is None or set(words["fused"]["order"]) != {"q", "k", "v"} or size[0] % wide:
        return wanted["kv_heads"]
    return min(max((size[0] // wide - wanted["heads"]) // 2, 1), wanted["heads"])


def branch_layer(column: Column, branch: BranchFacts) -> str:
    """Path of the layer that a branch is in."""
    return next(one.call.path for one in column.facts.layers if branch in one.branches)


def _named(column: Column, core: Any, word: str, count: int) -> str | None:
    """A config field, or an attribute of the core, that holds this number and speaks of heads."""
    found: list[str] = []
    for holder in (column.config, core):
        for name, value in vars(holder).items() if holder is not None else ():
            if "head" in name and "dim" not in name and type(value) is int and value == count:
                found.append(name)
    near = [name for name in found if ("kv" in name or "key" in name) == (word == "kv_heads")]
    own = [name for name in near or found if column.name in name]
    return next(iter((*own, *near, *found)), None)
