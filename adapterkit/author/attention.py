"""Where attention is computed: one function, or softmax between two products."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from adapterkit.author.graph import ADDITIONS, ATTENTION, Call, Graph, Projection

_PRODUCTS = frozenset({"matmul", "bmm", "baddbmm", "einsum"})


@dataclass(frozen=True)
class Attention:
    """One computation of attention. Shapes of the values: (B, H, T, E), or (B H, T, E)."""

    kind: str
    """function: scaled_dot_product_attention; products: softmax between two; whole: with its projections."""
    query: int
    key: int
    value: int
    out: int
    mask: int | None
    """What masks the scores, where it is an argument."""
    scores: tuple[int, int, int] | None
    """(H, Q, K), None where the heads have no axis of their own."""
    core: Call
    """The innermost call in which all of it happened."""
    q: tuple[Projection, ...]
    """The nearest projections behind the query, and so on."""
    k: tuple[Projection, ...]
    v: tuple[Projection, ...]
    o: tuple[Projection, ...]
    """The nearest projections that read the output."""


def attentions(graph: Graph) -> tuple[Attention, ...]:
    """Every computation of attention of a forward pass, in order."""
    found = []
    for node in graph.nodes:
        if node.op in ATTENTION and len(node.inputs) >= 3:
            kind = "whole" if node.op.startswith("multi") else "function"
            mask = node.inputs[3] if kind == "function" and len(node.inputs) > 3 else None
            query, key, value = node.inputs[:3]
            parts = (query, key, value, node.index)
        elif node.op == "softmax":
            products = _products(graph, node.index)
            if products is None:
                continue
            kind, mask, parts = "products", None, products
        else:
            continue
        query, key, value, out = parts
        inside = [graph.nodes[at].call for at in (node.index, out)]
        if kind == "products":
            inside.append(graph.nodes[_scores(graph, node.index)[0]].call)
        core = _innermost(graph, inside)
        if core is None:
            continue
        behind = (() if kind == "whole" else graph.sources(at) for at in (query, key, value))
        q, k, v = behind
        scores = _shape_of_scores(graph, kind, node.index, query, key)
        o = _readers(graph, out)
        found.append(Attention(kind, query, key, value, out, mask, scores, core, q, k, v, o))
    return tuple(found)


def _shape_of_scores(graph: Graph, kind: str, node: int, query: int, key: int) -> tuple[int, int, int] | None:
    q, k = graph.nodes[query].shape, graph.nodes[key].shape
    if kind == "products":
        shape = graph.nodes[_scores(graph, node)[0]].shape
        return (shape[1], shape[2], shape[3]) if len(shape) == 4 else None
    return (q[-3], q[-2], k[-2]) if kind == "function" and len(q) == 4 else None


def _scores(graph: Graph, softmax: int) -> list[int]:
    """The products of two things that the model was called with behind a softmax, nearest first."""
    before = graph.nodes[softmax].inputs[:1]
    stops = [
        at for value in before for at in graph.back(value, lambda v: graph.is_heavy(v) or graph.is_source(v))
    ]
    return [
        at
        for at in stops
        if graph.nodes[at].op in _PRODUCTS
        and at not in graph.projections
        and all(value in graph.fed for value in graph.nodes[at].inputs[-2:])
    ]


def _products(graph: Graph, softmax: int) -> tuple[int, int, int, int] | None:
    """Query, key, value and output around a softmax, None if it is no attention."""
    scores = _scores(graph, softmax)
    if not scores:
        return None
    query, key = graph.nodes[scores[0]].inputs[-2:]
    queue, seen = [softmax], {softmax}
    for at in queue:
        for user in graph.users[at]:
            node = graph.nodes[user]
            if user in seen or user in graph.projections:
                continue
            seen.add(user)
            if node.op in _PRODUCTS:
                left, right = node.inputs[-2:]
                return (query, key, right if left == at else left, user)
            if not graph.is_heavy(user):
                queue.append(user)
    return None


def _innermost(graph: Graph, calls: list[int]) -> Call | None:
    """The innermost call around all of these."""
    around = [list(graph.around(call)) for call in calls]
    return next((call for call in around[0] if all(call in others for others in around)), None)


def _readers(graph: Graph, out: int) -> tuple[Projection, ...]:
    """The nearest projections ahead of a value; what is added to something else is left to the stream."""
    found, own, queue = [], {out}, [out]
    for at in queue:
        for user in graph.users[at]:
            if user in own:
                continue
            if user in graph.projections:
                found.append(graph.projections[user])
            elif not graph.is_heavy(user) and not _joins(graph, user, own):
                own.add(user)
                queue.append(user)
    return tuple(found)


def _joins(graph: Graph, value: int, own: set[int]) -> bool:
    node = graph.nodes[value]
    return node.op in ADDITIONS and any(v in graph.fed and v not in own for v in node.inputs)


def within(found: tuple[Attention, ...], call: Call) -> Iterator[Attention]:
    """Those that happened during a call."""
    return (one for one in found if call.start <= one.out < call.end)
