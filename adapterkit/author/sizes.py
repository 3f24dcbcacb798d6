"""Head counts that neither the config's usual fields nor the core show."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adapterkit.author.layers import BranchFacts, LayerFacts
from adapterkit.model import linear
from adapterkit.model.bind import usual_heads

if TYPE_CHECKING:
    from adapterkit.author.attention import Attention
    from adapterkit.author.column import Column
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
    found = _widths(column, event, facts, words, core, wanted["kv_heads"])
    if shown == wanted:
        return found
    widths = dict(found)
    for word, count in wanted.items():
        name = _named(column, core, word, count)
        if name is not None:
            found[word] = name
        elif not _fits(shown[word], rows["q" if word == "heads" else "k"]):
            text = f"{word}: {count} here, which no field shows"
            column.notes.gap((*column.loc, branch.kind, "sizes"), text)
    return found if any(found.get(word) and shown[word] != wanted[word] for word in wanted) else widths


def _widths(
    column: Column, event: Attention, facts: LayerFacts, words: Words, core: Any, kv_heads: int
) -> Words:
    """Widths of a head of keys and values, where the rows of k and v do not show them: keys of two parts."""
    graph = column.scene.graph
    if event.kind != "function" or "k" not in words.get("fused", {}).get("order", ()):
        return {}
    size = linear.shape(column.scene.modules[f"{facts.call.path}.{words['fused']['path']}"])
    key, value = (graph.nodes[at].shape[-1] for at in (event.key, event.value))
    if size is None or key == value or len(words["fused"]["order"]) != 2:
        return {}
    found: Words = {}
    for word, wide in (("head_dim", key), ("value_dim", value)):
        name = next((n for n in _fields(column, core) if "head_dim" in n[0] and n[1] == wide), None)
        if name is None:
            return {}
        found[word] = name[0]
    return found


def _fields(column: Column, core: Any) -> list[tuple[str, Any]]:
    return [item for holder in (core, column.config) if holder is not None for item in vars(holder).items()]


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
