"""The two halves of a gated MLP: which one the activation acts on."""

from __future__ import annotations

from dataclasses import dataclass

from adapterkit.author.graph import ACTIVATIONS, Graph
from adapterkit.author.layers import BranchFacts

_PARTS = frozenset(
    "getitem chunk split narrow unbind tensor_split select split_with_sizes index_select".split()
)


@dataclass(frozen=True)
class Halves:
    """The product in a gated MLP."""

    gate: int
    """The operand with the activation."""
    up: int
    gates: tuple[str, ...]
    """Paths of the projections behind it."""
    ups: tuple[str, ...]


def halves(graph: Graph, facts: BranchFacts) -> Halves | None:
    """The two halves of a gated MLP, None if nothing is multiplied with something of another origin."""
    if facts.projection is None:
        return None
    queue = [v for v in graph.nodes[facts.projection.node].inputs if v not in graph.matrices]
    seen = set(queue)
    for at in queue:
        if graph.is_heavy(at):
            continue
        operands = [v for v in dict.fromkeys(graph.nodes[at].inputs) if _roots(graph, v)]
        if graph.nodes[at].op == "mul" and len(operands) == 2:
            left, right = operands
            acts = [_is_activated(graph, v) for v in operands]
            if not _roots(graph, left) & _roots(graph, right) and acts[0] != acts[1]:
                gate, up = (left, right) if acts[0] else (right, left)
                return Halves(gate, up, _paths(graph, gate), _paths(graph, up))
        more = [before for before in graph.nodes[at].inputs if before not in seen]
        seen.update(more)
        queue += more
    return None


def feeding(graph: Graph, facts: BranchFacts) -> tuple[str, ...]:
    """Paths of the projections that feed the last one."""
    if facts.projection is None:
        return ()
    return _unique(
        path
        for v in graph.nodes[facts.projection.node].inputs
        if v not in graph.matrices
        for path in _paths(graph, v)
    )


def _roots(graph: Graph, value: int) -> frozenset[int]:
    """The nearest projections behind a value, or parts of their output."""

    def stop(at: int) -> bool:
        node = graph.nodes[at]
        is_part = node.op in _PARTS and bool(node.inputs) and node.shape != graph.nodes[node.inputs[0]].shape
        return graph.is_heavy(at) or is_part

    return frozenset(at for at in graph.back(value, stop) if stop(at))


def _paths(graph: Graph, value: int) -> tuple[str, ...]:
    return _unique(one.path for one in graph.sources(value) if one.call is not None)


def _unique(paths: object) -> tuple[str, ...]:
    return tuple(dict.fromkeys(paths))  # type: ignore[call-overload]


def _is_activated(graph: Graph, value: int) -> bool:
    """Whether an activation lies between a value and the projections behind it."""
    between = graph.closure([value], graph.is_heavy)
    return any(graph.nodes[at].op in ACTIVATIONS for at in between if not graph.is_heavy(at))
