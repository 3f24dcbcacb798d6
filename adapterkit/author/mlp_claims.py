"""Claims about the matrices of an MLP: which is the half that the activation acts on."""

from __future__ import annotations

from dataclasses import dataclass

from adapterkit.author.graph import ACTIVATIONS, Graph
from adapterkit.author.layers import BranchFacts
from adapterkit.author.seen import BranchSeen

_PARTS = frozenset(
    "getitem chunk split narrow unbind tensor_split select split_with_sizes index_select".split()
)


@dataclass(frozen=True)
class Halves:
    """The product in a gated MLP."""

    product: int
    gate: int
    """The operand with the activation."""
    up: int
    gate_roots: frozenset[int]
    """The projections behind it, or the stretches of one."""
    up_roots: frozenset[int]


def roots(graph: Graph, value: int) -> frozenset[int]:
    """The nearest projections behind a value, or parts of their output."""

    def stop(at: int) -> bool:
        node = graph.nodes[at]
        is_part = node.op in _PARTS and bool(node.inputs) and node.shape != graph.nodes[node.inputs[0]].shape
        return graph.is_heavy(at) or is_part

    return frozenset(at for at in graph.back(value, stop) if stop(at))


def halves(graph: Graph, facts: BranchFacts) -> Halves | None:
    """The two halves of a gated MLP, None if nothing is multiplied with something of another origin."""
    if facts.projection is None:
        return None
    queue = [v for v in graph.nodes[facts.projection.node].inputs if v not in graph.matrices]
    seen = set(queue)
    for at in queue:
        node = graph.nodes[at]
        if graph.is_heavy(at):
            continue
        operands = [v for v in dict.fromkeys(node.inputs) if roots(graph, v)]
        if node.op == "mul" and len(operands) == 2:
            left, right = (roots(graph, v) for v in operands)
            if not left & right:
                acts = [_is_activated(graph, v) for v in operands]
                if acts[0] != acts[1]:
                    gate, up = (0, 1) if acts[0] else (1, 0)
                    both = (left, right)
                    return Halves(at, operands[gate], operands[up], both[gate], both[up])
        for before in node.inputs:
            if before not in seen:
                seen.add(before)
                queue.append(before)
    return None


def _is_activated(graph: Graph, value: int) -> bool:
    """Whether an activation lies between a value and the projections behind it."""
    between = graph.closure([value], graph.is_heavy)
    return any(graph.nodes[at].op in ACTIVATIONS for at in between if not graph.is_heavy(at))


def judge(branch: BranchSeen) -> None:
    """Gate and up are what they are said to be, and nothing else feeds the last matrix."""
    block, graph = branch.block, branch.seen.graph
    said = {role: block.slots[role] for role in ("gate", "up") if role in block.slots}
    found = halves(graph, branch.facts)
    if found is None:
        ends = branch.facts.projection
        feeds = () if ends is None else graph.nodes[ends.node].inputs
        made = {one.path for v in feeds if v not in graph.matrices for one in graph.sources(v)}
        observed = {"up": made}
    else:
        observed = {
            "gate": {graph.projections[v].path for r in found.gate_roots for v in _heavy(graph, r)},
            "up": {graph.projections[v].path for r in found.up_roots for v in _heavy(graph, r)},
        }
    what = {
        "gate": "feeds the half that the activation acts on",
        "up": "feeds the half without activation" if "gate" in said else "is the first matrix",
    }
    for role, slot in said.items():
        word = "fused.path" if slot.rows is not None else role
        seen = observed.get(role, set())
        names = ", ".join(sorted(map(branch.rel, seen))) or "nothing is gated: there is no such half"
        text = f"{word}: {branch.rel(slot.path)} {what[role]}"
        aspect = role if slot.rows is not None else ""
        branch.judge(slot.path in seen, word, text, names, aspect=aspect)
    for other, seen in observed.items():
        if other not in said and branch.facts.projection is not None and block.path("down") is not None:
            names = ", ".join(sorted(map(branch.rel, seen)))
            if names:
                branch.judge(False, other, f"{other}: what {what[other]} is named", f"{names} {what[other]}")


def _heavy(graph: Graph, root: int) -> list[int]:
    """The projections at or behind a root."""
    return [v for v in graph.back(root, graph.is_heavy) if v in graph.projections]
