"""Head counts that neither the config's usual fields nor the core show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from adapterkit.author.layers import BranchFacts, LayerFacts
from adapterkit.errors import listing
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
    found = _widths(column, event, facts, branch, words, core)
    if shown == wanted:
        return found
    widths = dict(found)
    loc = (*column.loc, branch.kind, "sizes")
    for word, count in wanted.items():
        name = _named(column, core, word, count)
        if name is not None:
            found[word] = name
        elif _fits(shown[word], rows["q" if word == "heads" else "k"]):
            continue
        elif word == "kv_heads" and shown[word] is None and count in (1, wanted["heads"]):
            if count != wanted["heads"]:  # one for all queries is no number that the instance chose
                found[word] = count
        else:
            held, alike = _held(column, core, count), _alike(word, wanted, wide)
            if len(held) == 1 and not alike and held[0] in vars(core):
                found[word] = held[0]
                column.notes.remark(loc, f"{held[0]!r} is taken for {word}, as it alone is {count} there")
                continue
            perhaps = f"; perhaps {listing(map(repr, held))}" if held else ""
            chance = f", but {' and '.join(alike)} {count} here, too" if held and alike else ""
            column.notes.gap(loc, f"{word}: {count} here, which no field shows{perhaps}{chance}")
    return found if any(found.get(word) and shown[word] != wanted[word] for word in wanted) else widths


def _held(column: Column, core: Any, count: int) -> list[str]:
    """Attributes of the core with this number, else fields of the config."""
    holders = (vars(core), vars(column.config) if column.config is not None else {})
    names = ([n for n, value in held.items() if type(value) is int and value == count] for held in holders)
    return next(filter(None, names), []) if count > 1 else []


def _alike(word: str, wanted: Mapping[str, int], wide: int) -> list[str]:
    """What else has the same number by chance, so that an attribute may mean it."""
    others = {"the width of a head is": wide}
    if word == "kv_heads":
        others["the queries that share a head are"] = wanted["heads"] // wanted["kv_heads"]
    return [what for what, number in others.items() if number == wanted[word]]


def _widths(
    column: Column, event: Attention, facts: LayerFacts, branch: BranchFacts, words: Words, core: Any
) -> Words:
    """Widths of a head of keys and values, where they differ and no row of its own shows them.

    Those of the rows of a fused matrix, which were numbers so far, get their names too.
    """
    graph, said = column.scene.graph, words.get("fused", {})
    key, value = (graph.nodes[at].shape[-1] for at in (event.key, event.value))
    if event.kind != "function" or set(said.get("order", ())) not in ({"k", "v"}, {"_", "v"}):
        return {}
    rows = said.get("widths")
    if (key == value and rows is None) or (rows is not None and isinstance(rows["_"], str)):
        return {}  # nothing to say, or said for a branch of the same kind before
    wanted = {"head_dim": key, "value_dim": value} | ({"_": rows["_"]} if rows else {})
    names = {word: _width_named(column, core, word, wide) for word, wide in wanted.items()}
    if None in names.values():
        if rows is not None:
            text = (
                f"no field says how wide a head of {said['path']} is: {rows['_']} rows and {rows['v']} of v"
            )
            column.notes.gap((*column.loc, branch.kind, "fused", "widths"), text)
        return {}
    if rows is not None:
        said["widths"] = {"_": names.pop("_"), "v": names["value_dim"]}
    return dict(names)


_WORDS = {"head_dim": ("qk_head", "head_dim"), "value_dim": ("v_head", "value"), "_": ("nope",)}
"""What the names of such fields speak of."""


def _width_named(column: Column, core: Any, word: str, wide: int) -> str | None:
    """A field of core or config that holds this width of a head, the likeliest name first."""
    names = [n for n, number in _fields(column, core) if "head_dim" in n and number == wide]
    return next((n for part in _WORDS[word] for n in names if part in n), next(iter(names), None))


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
