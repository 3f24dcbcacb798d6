"""The residual stream through one call of a layer: what is added to it, where each branch begins and ends."""

from __future__ import annotations

from dataclasses import dataclass, replace

from adapterkit.author.attention import Attention, within
from adapterkit.author.graph import ADDITIONS, MOVES, Call, Graph, Projection

STREAM, BRANCH, OTHER = "stream", "branch", "other"


@dataclass(frozen=True)
class Step:
    """A module call between the projection of a branch and the residual add, or around the add."""

    call: Call
    is_norm: bool


@dataclass(frozen=True)
class BranchFacts:
    """One thing that is added to the stream."""

    kind: str
    """attention, cross_attention or mlp."""
    add: int
    """The sum."""
    stream: int
    """What the branch is added to."""
    operand: int
    """What is added: the branch with all that follows its projection."""
    term: int
    """The same without the other branch of a parallel block, if both were added to each other first."""
    events: tuple[Attention, ...]
    """Attention that the branch computes."""
    source: int
    """The value of the stream that the branch was made of, before its norm."""
    before: Call | None
    """The norm between that and the first projections."""
    entered: tuple[int, ...]
    """What the first projections (or the block of experts) read."""
    first: tuple[Projection, ...]
    """Projections that read it."""
    projection: Projection | None
    """The last projection, None if several ways come together."""
    end: int
    """What the projection gives; all that follows is one way to the add."""
    outs: tuple[Call, ...]
    """Calls whose first output is that value, inner ones first."""
    steps: tuple[Step, ...]
    """Module calls between that and the add, in order."""
    operations: tuple[str, ...]
    """Operations in between that no module makes, such as a functional dropout or a scale."""
    after_residual: Call | None
    """The norm whose output goes on in place of the sum."""


@dataclass(frozen=True)
class LayerFacts:
    """One call of a layer."""

    call: Call
    given: int
    """The stream before it."""
    gives: int | None
    """The stream behind it, None if what it returns is none."""
    branches: tuple[BranchFacts, ...]

    @property
    def is_parallel(self) -> bool:
        """Attention and MLP read the same value of the stream."""
        sources = {branch.kind: branch.source for branch in self.branches}
        return "mlp" in sources and sources.get("attention") == sources["mlp"]


def layer_facts(graph: Graph, attentions: tuple[Attention, ...], call: Call) -> LayerFacts:
    """Follow the stream through one call of a layer."""
    given = next((value for _, value in call.arguments if graph.nodes[value].floating), None)
    if given is None:
        return LayerFacts(call, -1, None, ())
    kinds, adds = _classify(graph, call, given)
    stream = {value for value, kind in kinds.items() if kind == STREAM}
    events = tuple(within(attentions, call))
    branches = []
    for add, base, operand in adds:
        for end in _terms(graph, kinds, events, operand):
            branches.append(_branch(graph, call, stream, kinds, events, (add, base, operand, end)))
    gives = next((v for v in call.outputs if v in stream and v != given), None)
    continued = [branch.stream for branch in branches] + ([gives] if gives is not None else [])
    found = tuple(_with_norm_behind(graph, branch, continued) for branch in branches)
    return LayerFacts(call, given, gives, found)


def _classify(graph: Graph, call: Call, given: int) -> tuple[dict[int, str], list[tuple[int, int, int]]]:
    """What is stream, what is branch; and the adds of a branch to the stream: (sum, stream, branch)."""
    kinds, adds = {given: STREAM}, []
    for node in graph.nodes[call.start : call.end]:
        operands = [(value, kinds.get(value, OTHER)) for value in node.inputs]
        seen = {kind for _, kind in operands}
        if node.index == given or seen <= {OTHER}:
            continue
        if graph.is_heavy(node.index) or seen == {BRANCH} or seen == {BRANCH, OTHER}:
            kinds[node.index] = BRANCH
        elif BRANCH not in seen:
            kinds[node.index] = STREAM
        elif node.op in ADDITIONS:
            kinds[node.index] = STREAM
            base = next(value for value, kind in operands if kind == STREAM)
            added = next(value for value, kind in operands if kind == BRANCH)
            adds.append((node.index, base, added))
        else:
            kinds[node.index] = BRANCH
    return kinds, adds


def _way_back(graph: Graph, kinds: dict[int, str], value: int) -> list[int]:
    """From the operand of an add back to where its branch is one value, operand first."""
    way = [value]
    while True:
        at = way[-1]
        if graph.is_heavy(at):
            return way
        # one tensor that is used twice, as norms do, is one way
        before = _narrowest(graph, kinds, at)
        if before is None:
            return way
        way.append(before)


def _narrowest(graph: Graph, kinds: dict[int, str], value: int) -> int | None:
    """The one value of the branch that another is made of, past what a module does inside, or None."""
    # a norm written out uses its input several times: then the call says what came in
    for call in graph.returned(value):
        given = call.given
        if call.is_leaf and given is not None and given != value and kinds.get(given) == BRANCH:
            if not any(graph.is_heavy(v) for v in range(call.start, call.end)):
                return given
    inputs = {v for v in graph.nodes[value].inputs if kinds.get(v) == BRANCH}
    return inputs.pop() if len(inputs) == 1 else None


def _terms(graph: Graph, kinds: dict[int, str], events: tuple[Attention, ...], operand: int) -> list[int]:
    """The operand, or the two branches of a parallel block that were added to each other first."""
    end = _way_back(graph, kinds, operand)[-1]
    node = graph.nodes[end]
    if node.op not in ADDITIONS or graph.is_heavy(end):
        return [operand]
    parts = [value for value in node.inputs if kinds.get(value) == BRANCH]
    if len(parts) != 2:
        return [operand]
    outs = {event.out for event in events}
    attend = [bool(outs & graph.closure([part], lambda v: kinds.get(v) != BRANCH)) for part in parts]
    if attend[0] == attend[1]:
        return [operand]
    return [term for part in parts for term in _terms(graph, kinds, events, part)]


def _branch(
    graph: Graph,
    call: Call,
    stream: set[int],
    kinds: dict[int, str],
    events: tuple[Attention, ...],
    add: tuple[int, int, int, int],
) -> BranchFacts:
    total, base, operand, start = add
    way = _way_back(graph, kinds, start)
    end = way[-1]
    inside = graph.closure([start], lambda v: kinds.get(v) != BRANCH)
    own = tuple(event for event in events if event.out in inside)
    entered = sorted(v for v in inside if v in stream)
    first = tuple(
        graph.projections[v]
        for v in sorted(inside)
        if v in graph.projections and any(value in stream for value in _operands(graph, v))
    )
    before, source = _norm_before(graph, call, stream, entered, base)
    projection = _projection(graph, end)
    if projection is not None and projection.call is not None:
        end = graph.calls[projection.call].gives or end
    outs = _outs(graph, call, way, end)
    steps = _steps(graph, call, way, end, kinds)
    covered = {v for step in steps for v in range(step.call.start, step.call.end)}
    between = way[: way.index(end)] if end in way else way[:-1]
    operations = tuple(
        graph.nodes[v].op for v in reversed(between) if v not in covered and graph.nodes[v].op not in MOVES
    )
    kind = "mlp"
    if own:
        reads = graph.closure((own[-1].key,), lambda v: v in stream)
        own_keys = any(v in stream for v in reads) or _of_another_layer(call, own[-1])
        kind = "attention" if own_keys else "cross_attention"
    return BranchFacts(
        kind=kind,
        add=total,
        stream=base,
        operand=operand,
        term=start,
        events=own,
        source=source,
        before=before,
        entered=tuple(entered),
        first=first,
        projection=projection,
        end=end,
        outs=outs,
        steps=steps,
        operations=operations,
        after_residual=None,
    )


def _of_another_layer(layer: Call, event: Attention) -> bool:
    """Whether the keys are those of another layer of the same list, which made them of the same stream."""
    above = layer.path.rpartition(".")[0]
    return bool(event.k) and all(
        one.path.startswith(f"{above}.") and not one.path.startswith(f"{layer.path}.") for one in event.k
    )


def _outs(graph: Graph, layer: Call, way: list[int], end: int) -> tuple[Call, ...]:
    """Calls in a layer that make a branch and return it, from its projection on; inner ones first."""
    calls = [call for value in (end, *reversed(way)) for call in reversed(graph.returned(value))]
    return tuple(
        call
        for call in dict.fromkeys(calls)
        if graph.is_inside(call, layer)
        and call.index != layer.index
        and any(graph.is_heavy(value) for value in range(call.start, call.end))
    )


def _operands(graph: Graph, value: int) -> list[int]:
    """What a projection reads, before it was turned or cast inside the call of its module."""
    return [graph.same(v) for v in graph.nodes[value].inputs] + list(graph.nodes[value].inputs)


def _projection(graph: Graph, end: int) -> Projection | None:
    """The projection whose output a value is."""
    found = graph.projections.get(end)
    if found is not None:
        return found
    return graph.projections.get(graph.same(end))


def _norm_before(
    graph: Graph, call: Call, stream: set[int], entered: list[int], base: int
) -> tuple[Call | None, int]:
    """The norm between the stream and a branch, and the value of the stream before it."""
    for value in entered:
        at = value
        while at in stream:
            norm = next((c for c in graph.returned(at) if _is_norm_in(graph, c, call)), None)
            if norm is not None and norm.given is not None and at != base:
                # a norm whose output is the stream itself stands behind the add of another branch
                if graph.same(at) == graph.same(base) and not _is_identity(graph, norm):
                    return None, at
                return norm, norm.given
            if at == base:
                return None, at
            before = _unmoved(graph, at)
            if before not in stream:
                break
            at = before
    return None, entered[0] if entered else base


def _unmoved(graph: Graph, value: int) -> int:
    """What a value was before it was moved, or its padding made zero by a mask; -1: the value is new."""
    node = graph.nodes[value]
    if node.op in MOVES | {"dropout"}:
        return node.inputs[0]
    states = [one for one in node.inputs if graph.nodes[one].floating]
    return states[0] if node.op == "mul" and len(states) == 1 < len(node.inputs) else -1


def _is_norm_in(graph: Graph, norm: Call, layer: Call) -> bool:
    return (
        norm.is_leaf and graph.is_inside(norm, layer) and (graph.is_norm(norm) or _is_identity(graph, norm))
    )


def _is_identity(graph: Graph, call: Call) -> bool:
    return call.gives is not None and graph.nodes[call.gives].op == "identity"


def _steps(graph: Graph, layer: Call, way: list[int], end: int, kinds: dict[int, str]) -> tuple[Step, ...]:
    """Module calls that take the branch and give it on, from its projection to the add."""
    on_way = set(way) | {end}
    found = []
    for call in graph.calls[layer.index + 1 :]:
        if call.start >= layer.end:
            break
        if not call.is_leaf or not call.outputs or call.gives not in on_way or call.gives == end:
            continue
        if call.given is not None and kinds.get(call.given) == BRANCH and call.given >= min(end, way[-1]):
            found.append(Step(call, graph.is_norm(call)))
    return tuple(found)


def _is_alone(graph: Graph, norm: Call) -> bool:
    """Whether a norm is called with one thing: with two it is a gate between them."""
    return sum(graph.nodes[value].floating for _, value in norm.arguments) == 1


def _with_norm_behind(graph: Graph, branch: BranchFacts, continued: list[int]) -> BranchFacts:
    """With the norm of the sum, if the stream goes on behind it."""
    for value in continued:
        at: int | None = value
        while at is not None and at > branch.add:
            norm = next((c for c in graph.returned(at) if graph.is_norm(c) and _is_alone(graph, c)), None)
            if (
                norm is not None
                and norm.given is not None
                and graph.same(norm.given) == graph.same(branch.add)
            ):
                return replace(branch, after_residual=norm)
            node = graph.nodes[at]
            at = node.inputs[0] if node.op in MOVES | {"dropout"} and node.inputs else None
    return branch
