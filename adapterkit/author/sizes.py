"""Head counts that neither the config's usual fields nor the core show."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adapterkit.author.layers import BranchFacts, LayerFacts
from adapterkit.model import linear
from adapterkit.model.bind import usual_heads

if TYPE_CHECKING:
    from adapterkit.author.columns import Column
    from adapterkit.author.describe import Describer, Words


def missing_sizes(
    column: Column, describer: Describer, facts: LayerFacts, branch: BranchFacts, words: Words
) -> Words:
    """What `sizes` must say of a sublayer, so that the counts are those observed; empty if nothing."""
    scene, event = column.scene, branch.events[-1]
    wide = scene.graph.nodes[event.query].shape[-1]
    wanted = dict(zip(("heads", "kv_heads"), describer.heads(event, None), strict=True))
    rows = {role: _rows(column, facts, words, role) for role in ("q", "k")}
    # keys may have been repeated for the query heads; attention in pieces shows other numbers
    whole = scene.graph.nodes[event.query].shape[0] == describer.batch
    for word, role in (("heads", "q"), ("kv_heads", "k")):
        count = rows[role]
        if count is not None and count % wide == 0 and not (whole and role == "q"):
            wanted[word] = count // wide
    fused = words.get("fused")
    if fused is not None and set(fused["order"]) == {"q", "k", "v"}:
        size = linear.shape(scene.modules[f"{facts.call.path}.{fused['path']}"])
        if size is not None and size[0] % wide == 0:
            wanted["kv_heads"] = min(max((size[0] // wide - wanted["heads"]) // 2, 1), wanted["heads"])
    core = scene.modules[event.core.path]
    shown = dict(zip(("heads", "kv_heads"), usual_heads(column.config, core), strict=True))
    if shown == wanted:
        return {}
    found: Words = {}
    for word, count in wanted.items():
        name = _named(column, core, word, count)
        if name is not None:
            found[word] = name
        elif not _fits(shown[word], rows["q" if word == "heads" else "k"]):
            text = f"{word}: {count} here, which no field shows"
            column.notes.gap((*column.loc, branch.kind, "sizes"), text)
    return found if any(found.get(word) and shown[word] != wanted[word] for word in wanted) else {}


def _fits(shown: int | None, rows: int | None) -> bool:
    """Whether the usual fields give a count that divides the rows: attention in pieces shows another one."""
    return bool(shown and rows and rows % shown == 0)


def _rows(column: Column, facts: LayerFacts, words: Words, role: str) -> int | None:
    """Number of rows of a role that has a module of its own."""
    said = words.get(role)
    path = said.get("path") if isinstance(said, dict) else said
    if not isinstance(path, str):
        return None
    size = linear.shape(column.scene.modules[f"{facts.call.path}.{path}"])
    return size[0] if size is not None else None


def _named(column: Column, core: Any, word: str, count: int) -> str | None:
    """A field of core or config that holds this number and speaks of heads."""
    found: dict[str, Any] = {}
    for holder in (core, column.config):
        for name, value in vars(holder).items() if holder is not None else ():
            if "head" in name and "dim" not in name and type(value) is int:
                found.setdefault(name, value)
    fitting = [name for name, value in found.items() if value == count]
    near = [name for name in fitting if ("kv" in name or "key" in name) == (word == "kv_heads")]
    own = [name for name in near or fitting if column.name in name]
    return next(iter((*own, *near, *fitting)), None)
