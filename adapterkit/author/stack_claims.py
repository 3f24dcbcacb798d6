"""Claims about a stack as a whole: where the stream begins and ends, and what else is called there."""

from __future__ import annotations

from collections.abc import Iterable

from adapterkit.author.graph import INPUT, Call
from adapterkit.author.layers import LayerFacts
from adapterkit.author.seen import Seen
from adapterkit.author.stacks import StackFacts, column, light_ahead
from adapterkit.model import linear
from adapterkit.model.blueprint import Slot
from adapterkit.model.embeddings import unembed_slots


def stack(seen: Seen) -> None:
    """Every claim about a stack outside its layers."""
    ran = seen.calls()
    if not ran:
        return
    facts = tuple(seen.observation.layer(call) for call in ran)
    strangers = [call for other in _others(seen) for call in other.calls()]
    around = column(seen.graph, "", facts, strangers)
    _entry(seen, ran)
    _embeddings(seen, around)
    _widths(seen, around)
    _position_bias(seen, ran)
    _final_norm(seen, around)
    _exit(seen, around, ran)
    _pooler(seen, around)
    _reads(seen, facts)
    for name in seen.said.extra:
        slot = seen.blueprint.slots.get(f"{seen.info.address}.{name}")
        if slot is not None:
            text = f"extra.{name}: {slot.path} is called"
            seen.judge(bool(seen.graph.calls_of(slot.path)), (*seen.loc, "extra", name), text, "it is not")


def _entry(seen: Seen, ran: list[Call]) -> None:
    entry = seen.entry
    loc = (*seen.loc, "entry") if seen.said.entry else (*seen.loc, "at")
    path = entry.path if entry is not None else seen.info.path
    text = f"entry: a call of {path or 'the model'} runs the stack"
    inside = entry is not None and all(seen.graph.is_inside(call, entry) for call in ran)
    around = [call.path or "the model" for call in seen.graph.around(ran[0].parent)]
    seen.judge(inside, loc, text, f"its layers run in calls of {', '.join(around)}", aspect="entry")


def _embeddings(seen: Seen, around: StackFacts) -> None:
    table, out = seen.place("embeddings.table"), seen.place("embeddings.out")
    graph, loc = seen.graph, (*seen.loc, "embeddings")
    found = [one.path for one in around.tables]
    if table is not None:
        text = (
            f"embeddings.table: {table.path} is called with the ids, and the stream is made of what it gives"
        )
        observed = f"that is {', '.join(found)}" if found else "no table is called with ids before the stack"
        same = graph.paths.get(table.path, table.path)
        # embedded tokens may be given instead
        if not found and not graph.calls_of(table.path):
            seen.unseen((*loc, "table"), text)
        else:
            seen.judge(same in found, (*loc, "table"), text, observed)
    elif found and seen.info.inputs.ids is not None:
        text = "embeddings.table: the table that is called with the ids is named"
        seen.judge(False, (*loc, "table"), text, f"it is {found[0]}")
    last = _last_before(seen, around)
    if out is None:
        if last is not None:
            text = "embeddings.out: the last module before the stream enters the stack is named"
            seen.judge(False, (*loc, "out"), text, f"it is {last.path}")
        return
    text = f"embeddings.out: {out.path} is the last module before the stream enters the stack"
    calls = [call for call in graph.calls_of(out.path) if call.start < around.layers[0].call.start]
    twice = len(_in_entry(seen, graph.calls_of(out.path))) > 1
    gives = {call.gives for call in calls}
    right = last is not None and last.gives in gives and not twice
    observed = (
        "it is called more than once" if twice else f"that is {last.path}" if last else "none is called"
    )
    seen.judge(right, (*loc, "out"), text, observed)


def _widths(seen: Seen, around: StackFacts) -> None:
    """A linear map between the embeddings and the layers has a name."""
    known = {seen.graph.paths.get(slot.path, slot.path) for slot in seen.blueprint.slots.values()}
    out = seen.place("embeddings.out")
    if out is None:
        return
    after = max((call.end for call in seen.graph.calls_of(out.path)), default=0)
    text = "extra: a linear map between embeddings and layers is named"
    for call in around.arriving:
        own = not seen.info.path or _is_below(call.path, seen.info.path)
        if own and call.is_leaf and call.gives in seen.graph.projections and call.start >= after:
            is_linear = linear.shape(seen.module(call.path)) is not None
            if is_linear:
                seen.judge(call.path in known, (*seen.loc, "extra"), text, f"{call.path} is not")


def _position_bias(seen: Seen, ran: list[Call]) -> None:
    """A module with weights that gives attention a bias of fixed positions is named."""
    graph = seen.graph
    known = {
        graph.paths.get(place.path, place.path)
        for place in seen.blueprint.places.values()
        if place.role == "position_bias"
    }
    for event in seen.observation.attentions:
        layer = next((call for call in ran if call.start <= event.out < call.end), None)
        scores = event.scores
        if layer is None or scores is None:
            continue
        behind = graph.closure(
            [event.out], lambda v: v in graph.fed and graph.is_heavy(v) and v in graph.projections
        )
        for call in graph.calls:
            gives = call.gives
            if gives is None or gives in graph.fed or graph.nodes[gives].shape[-3:] != scores:
                continue
            if gives in behind and _has_weights(seen, call.path) and call.path not in known:
                text = "position_bias: a module that gives attention a bias of fixed positions is named"
                seen.refute(
                    (*seen.loc, "attention", "position_bias"), text, f"{call.path} does", aspect="named"
                )
                return


def _in_entry(seen: Seen, calls: Iterable[Call]) -> list[Call]:
    entry, given = seen.entry, list(calls)
    inside = [call for call in given if entry is None or seen.graph.is_inside(call, entry)]
    return inside or given  # embeddings may be called before the stack is entered


def _last_before(seen: Seen, around: StackFacts) -> Call | None:
    """The last module whose output, of the shape of the stream, becomes it.

    What only changes the width (a linear map) and what is called more than once is no place of its own.
    """
    graph = seen.graph
    shape = graph.nodes[around.entering].shape
    said = seen.place("embeddings.table")
    named = graph.paths.get(said.path, said.path) if said is not None else None
    # a second table (of segments, say) is added to the stream as positions are
    tables = [one for one in around.tables if one.path == named] or around.tables
    if seen.info.inputs.ids is None and said is None:  # tables are of positions then
        tables = []
    content = {table.node for table in tables} or {
        node.index for node in graph.nodes if node.op == INPUT and node.floating
    }
    found, latest = None, -1
    for call in around.arriving:
        gives = call.gives
        # there may be several streams at once
        if gives is None or graph.nodes[gives].shape[-3:-1] != shape[-3:-1]:
            continue
        is_linear = gives in graph.projections and graph.nodes[gives].op in ("linear", "addmm")
        # positions and the like are added to the stream, they are not it
        if is_linear or not content & graph.closure([gives]):
            continue
        if len(_in_entry(seen, graph.calls_of(call.path))) == 1 and gives > latest:
            found, latest = call, gives
    return found


def _final_norm(seen: Seen, around: StackFacts) -> None:
    said, graph = seen.place("final_norm"), seen.graph
    if around.leaving is None:
        return
    shape = graph.nodes[around.leaving].shape
    heads = [graph.paths.get(head.path, head.path) for head in seen.blueprint.heads]
    norms = [
        call
        for call in around.following
        if call.given is not None
        and graph.same(call.given) == graph.same(around.leaving)
        and graph.nodes[call.given].shape == shape
        and call.is_leaf
        and (said is not None or not _is_outside(seen, call.path))
        and (said is not None or not any(call.path.startswith(f"{head}.") for head in heads))
        and (graph.is_norm(call) or (said is not None and call.path == said.path))
    ]
    found = norms[0].path if norms else None
    if said is not None:
        text = f"final_norm: {said.path} normalises what the last layer gives"
        observed = f"{found} does" if found else "nothing does"
        seen.judge(found == graph.paths.get(said.path, said.path), (*seen.loc, "final_norm"), text, observed)
    elif found is not None:
        text = "final_norm: there is no norm behind the last layer"
        seen.judge(False, (*seen.loc, "final_norm"), text, f"{found} is called there")


def _stream_end(seen: Seen, around: StackFacts) -> int | None:
    """The stream behind the last layer and its norm."""
    said = seen.place("final_norm")
    if said is not None and around.leaving is not None:
        for call in around.following:
            if call.path == seen.graph.paths.get(said.path, said.path):
                return call.gives
    return around.leaving


def _exit(seen: Seen, around: StackFacts, ran: list[Call]) -> None:
    said = seen.place("exit")
    place: Slot | None = said or seen.place("final_norm")
    path = place.path if place is not None else ran[-1].path
    calls = _in_entry(seen, seen.graph.calls_of(path))
    if said is None:  # the norm may also stand elsewhere, before the layers or behind pooling
        behind = [call for call in calls if call.start >= around.layers[-1].call.end]
        calls = behind[:1] or calls
    text = f"exit: {path or 'the model'} is the last module before pooling, and called once"
    loc = (*seen.loc, "exit")
    if len(calls) != 1:
        hint = "" if said else "name a module behind all layers: 'exit'"
        seen.judge(False, loc, text, f"it is called {len(calls)} times", hint)
        return
    end = _stream_end(seen, around)
    gives = calls[0].gives
    right = end is not None and gives is not None and seen.graph.same(gives) == seen.graph.same(end)
    seen.judge(right, loc, text, "what it gives is not the stream behind the last layer")


def _pooler(seen: Seen, around: StackFacts) -> None:
    """What reads the stream behind the stack inside the base is named, so that it is saved."""
    said, graph = seen.place("pooler"), seen.graph
    loc = (*seen.loc, "pooler")
    end = _stream_end(seen, around)
    if end is None:
        return
    near = light_ahead(graph, end)
    last = around.layers[-1].call
    named = [seen.place(word) for word in ("final_norm", "exit")]
    known = {graph.paths.get(place.path, place.path) for place in named if place is not None}
    heads = {graph.paths.get(head.path, head.path) for head in seen.blueprint.heads}
    beside = [place.path for other in _others(seen) for _, place, _ in other.layers()]
    root = seen.info.path
    readers: list[Call] = []
    for call in graph.calls:
        inside = not root or call.path.startswith(f"{root}.")
        if call.start < last.end or call.path in known or not inside or call.given not in near:
            continue
        if any(_is_below(call.path, other) for other in (*heads, *beside, *seen.blueprint.between)):
            continue
        if _is_output(seen, call.path):
            continue
        if any(_is_below(call.path, reader.path) for reader in readers):
            continue
        if _has_weights(seen, call.path) and not _runs_layers(seen, call):
            readers.append(call)
    found = [call.path for call in readers]
    if said is not None:
        path = graph.paths.get(said.path, said.path)
        text = f"pooler: {said.path} reads the stream behind the stack"
        calls = graph.calls_of(said.path)
        if not calls:
            seen.unseen(loc, text)
            return
        right = any(_is_below(reader, path) or _is_below(path, reader) for reader in found)
        if not _has_weights(seen, path):  # under another config it may have some
            right = any(call.given in near for call in calls)
        seen.judge(right, loc, text, f"{found[0]} does" if found else "nothing does")
    elif found:
        text = "pooler: no module with weights reads the stream behind the stack"
        seen.judge(False, loc, text, f"{found[0]} does")


def _is_below(path: str, above: str) -> bool:
    return path == above or path.startswith(f"{above}.")


def _is_outside(seen: Seen, path: str) -> bool:
    """Whether a module lies outside the stack's root, or in one that is said to belong to no stack."""
    root = seen.info.path
    if root and not _is_below(path, root):
        return True
    return any(path.startswith(f"{other}.") for other in seen.blueprint.between)


def _has_weights(seen: Seen, path: str) -> bool:
    return next(seen.blueprint.model.get_submodule(path).parameters(), None) is not None


def _is_output(seen: Seen, path: str) -> bool:
    """Whether a module is, or leads to, the output embeddings."""
    ends = {slot.path for slot in unembed_slots(seen.blueprint).values()}
    said = seen.said.unembed
    ways = {name for way in (said.through if said else ()) for name in way.names()}
    return any(_is_below(path, end) for end in ends | ways)


def _runs_layers(seen: Seen, call: Call) -> bool:
    """Whether a call runs layers of any stack."""
    layers = {
        seen.graph.paths.get(place.path, place.path)
        for address, place in seen.blueprint.places.items()
        if address.endswith(".layer")
    }
    return any(other.path in layers and seen.graph.is_inside(other, call) for other in seen.graph.calls)


def _reads(seen: Seen, facts: tuple[LayerFacts, ...]) -> None:
    """What cross-attention reads comes through the argument that is said, from the stack that is said."""
    graph, reads, entry = seen.graph, seen.info.reads, seen.entry
    events = [
        event
        for one in facts
        for branch in one.branches
        if branch.kind == "cross_attention"
        for event in branch.events
    ]
    loc = (*seen.loc, "reads")
    behind = graph.closure([value for event in events for value in (event.key, event.value)])
    made = [other.info.address for other in _others(seen) if _layer_outputs(other) & behind]
    if reads is None:
        if made:  # states that are given from outside are those of no stack
            text = "the stack reads no other stack"
            seen.judge(False, loc, text, f"its cross-attention reads {', '.join(made)}", "say 'reads'")
        return
    if not events or entry is None:
        seen.unseen((*loc, "states"), f"reads.states: cross-attention reads argument {reads.states!r}")
        return
    names = sorted({name for name, value in entry.arguments if value in behind and _is_states(seen, value)})
    if reads.states is None:
        text, right = "reads.states: cross-attention reads no argument of the entry", not names
    else:
        text = f"reads.states: cross-attention reads argument {reads.states!r} of the entry"
        given = entry.argument(reads.states)
        right = given in behind and given is not None and graph.nodes[given].floating
    seen.judge(right, (*loc, "states"), text, f"it reads {', '.join(names) or 'no argument of it'}")
    text = f"reads.stack: the states are those of {reads.stack!r}"
    named = [a for a in made if a == _sibling(seen, reads.stack) or a.startswith(f"{reads.stack}/")]
    if not made:  # states that are given from outside
        seen.unseen((*loc, "stack"), text)
    else:
        seen.judge(bool(named), (*loc, "stack"), text, f"they are those of {', '.join(made)}")


def _sibling(seen: Seen, name: str) -> str:
    part, slash, _ = seen.info.address.rpartition("/")
    return f"{part}{slash}{name}"


def _others(seen: Seen) -> list[Seen]:
    return [
        Seen(seen.blueprint, info, seen.observation, seen.book)
        for address, info in seen.blueprint.stacks.items()
        if address != seen.info.address
    ]


def _layer_outputs(seen: Seen) -> set[int]:
    return {call.gives for call in seen.calls() if call.gives is not None}


def _is_states(seen: Seen, value: int) -> bool:
    node = seen.graph.nodes[value]
    return node.floating and len(node.shape) == 3
