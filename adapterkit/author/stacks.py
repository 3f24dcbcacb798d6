"""Columns of layers as they ran: where the stream begins, which layers it goes through, what follows them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from adapterkit.author.attention import Attention
from adapterkit.author.graph import INPUT, Call, Graph, Projection
from adapterkit.author.layers import LayerFacts

_MEMBER = re.compile(r"^(?:(.*)\.)?(\d+)$")


@dataclass(frozen=True)
class StackFacts:
    """One column of layers."""

    path: str
    """The list of its layers; '*' over nested lists."""
    layers: tuple[LayerFacts, ...]
    """In the order of their calls; one that is used several times stands here several times."""
    entry: Call
    """The innermost call around all of them."""
    entering: int
    """The stream before the first layer."""
    leaving: int | None
    """The stream behind the last."""
    tables: tuple[Projection, ...]
    """Embeddings that are looked up with what the model was called with, and reach the stream."""
    arriving: tuple[Call, ...]
    """Modules that the stream comes out of before the first layer, in order; projections among them too."""
    following: tuple[Call, ...]
    """Modules behind the last layer that read the stream, in order, in the widest call of this column."""


def stacks(
    graph: Graph, attentions: tuple[Attention, ...], layer: Callable[[Call], LayerFacts]
) -> tuple[StackFacts, ...]:
    """Every column of layers: the nearest members of lists around attention that also have an MLP."""
    found: dict[int, LayerFacts] = {}
    for event in attentions:
        around = [call for call in graph.around(event.core.index) if _MEMBER.match(call.path)]
        facts = [(call, layer(call)) for call in around]
        whole = [one for one in facts if len({b.kind for b in one[1].branches}) > 1 and _has_mlp(one[1])]
        some = whole or [one for one in facts if one[1].branches]
        if some:
            found[some[0][0].index] = some[0][1]
    columns: dict[tuple[str, int], list[LayerFacts]] = {}
    for index in sorted(found):
        facts_ = found[index]
        pattern = _pattern(facts_.call.path, [found[i].call.path for i in found])
        columns.setdefault((pattern, facts_.call.parent), []).append(facts_)
    # nested lists have a parent for each inner list
    joined: dict[str, list[LayerFacts]] = {}
    for (pattern, _), members in columns.items():
        joined.setdefault(pattern, []).extend(members)
    return tuple(
        column(
            graph,
            path,
            tuple(members),
            [m.call for other, rest in joined.items() if other != path for m in rest],
        )
        for path, members in joined.items()
    )


def _has_mlp(facts: LayerFacts) -> bool:
    return any(branch.kind == "mlp" for branch in facts.branches)


def _pattern(path: str, paths: list[str]) -> str:
    """Path of the list that a layer is a member of; numbers further up that differ become '*'."""
    match = _MEMBER.match(path)
    above = match[1] or "" if match else path
    shape = re.sub(r"\b\d+\b", "*", above)
    alike = {p.rpartition(".")[0] for p in paths if re.sub(r"\b\d+\b", "*", p.rpartition(".")[0]) == shape}
    return shape if len(alike) > 1 else above


def column(
    graph: Graph, path: str, layers: tuple[LayerFacts, ...], others: Iterable[Call] = ()
) -> StackFacts:
    """What is before and behind these layers.

    Args: others: layers of other columns: what runs one of them as well does not belong to this column.
    """
    first, last = layers[0], layers[-1]
    around = [list(graph.around(facts.call.parent)) for facts in layers]
    entry = next(call for call in around[0] if all(call in others for others in around))
    entering, leaving = first.given, last.gives
    light = light_behind(graph, entering)
    looked_up = [graph.projections[v] for v in sorted(light) if _is_look_up(graph, v)]
    # with ids as they came, not with positions that were counted from them
    plain = [table for table in looked_up if graph.nodes[looked_up_with(graph, table.node)].op == INPUT]
    tables = tuple(plain or looked_up)
    arriving = [
        call
        for call in graph.calls[: first.call.index]
        if call.gives in light and call.end <= first.call.start
    ]
    arriving.sort(key=lambda call: (call.end, -call.index))
    strangers = list(others)
    own = [c for c in graph.around(entry.index) if not any(graph.is_inside(s, c) for s in strangers)]
    until = own[-1].end if own else entry.end
    following = []
    if leaving is not None:
        near = light_ahead(graph, leaving)
        following = [
            call
            for call in graph.calls[last.call.index + 1 :]
            if call.start >= last.call.end and call.start < until and call.given in near
        ]
    return StackFacts(path, layers, entry, entering, leaving, tables, tuple(arriving), tuple(following))


def _is_look_up(graph: Graph, value: int) -> bool:
    return graph.nodes[value].op == "embedding" and value in graph.projections and value in graph.fed


def looked_up_with(graph: Graph, look_up: int) -> int:
    """What an embedding is looked up with."""
    ids = next(v for v in graph.nodes[look_up].inputs if v not in graph.matrices)
    return graph.same(ids)


def light_behind(graph: Graph, value: int) -> frozenset[int]:
    """What a value is made of, itself included, as far as embeddings, convolutions and attention.

    Linear maps are gone through: some stacks have another width than their embeddings.
    """

    def ends(at: int) -> bool:
        return graph.is_heavy(at) and graph.nodes[at].op not in ("linear", "addmm")

    return graph.closure([value], ends)


def light_ahead(graph: Graph, value: int) -> frozenset[int]:
    """What is made of a value without a projection, itself included."""
    seen, queue = {value}, [value]
    for at in queue:
        for user in graph.users[at]:
            if user not in seen and not graph.is_heavy(user):
                seen.add(user)
                queue.append(user)
    return frozenset(seen)
