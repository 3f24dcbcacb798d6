"""Claims about a model as a whole: columns of layers are described, heads are heads, kernels are called."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from adapterkit.author.claims import Book
from adapterkit.author.graph import Call, Graph
from adapterkit.author.observe import Observation
from adapterkit.author.scene import Scene
from adapterkit.author.seen import Seen, blocks
from adapterkit.errors import listing
from adapterkit.model.blueprint import Blueprint
from adapterkit.model.embeddings import unembed_slots
from adapterkit.spec.schema import Interface
from adapterkit.spec.text import Loc


def described(blueprint: Blueprint, observation: Observation, book: Book) -> None:
    """Every column of layers with attention belongs to a stack that is said."""
    interface, graph = blueprint.interface, observation.graph
    layers = {
        graph.paths.get(place.path, place.path)
        for address, place in blueprint.places.items()
        if address.endswith(".layer")
    }
    loc: Loc = ("stacks",) if interface.stacks else ("parts",)
    text = "every column of layers that runs is described"
    for stack in observation.stacks:
        outside = [
            one.call.path
            for one in stack.layers
            if not any(
                one.call.path == path or one.call.path.startswith(f"{path}.")
                for path in (*layers, *blueprint.apart)
            )
        ]
        # a layer may hold a column of its own kind, such as two that share a list
        around = [p for p in outside if not any(path.startswith(f"{p}.") for path in layers)]
        book.judge(
            not around, interface, loc, text, f"{stack.path} runs too: {len(around)} layers with attention"
        )


def defaults(stacks: Sequence[Seen]) -> None:
    """Roles mean the stack that reads the tokens, not one whose states become tokens among its own."""
    for one in stacks:
        ran, loc = one.calls(), _default_loc(one)
        if not ran or one.info.inputs.ids is not None:
            continue
        for other in stacks:
            first = other.calls()[:1]
            if other is one or not first or other.place("embeddings.table") is None:
                continue
            entering = [call.given for call in first if call.given is not None]
            if ran[-1].gives in one.graph.closure(entering):
                text = f"by_default: what {one.info.address} gives are tokens of {other.info.address}"
                observed, hint = "roles reach it without its address", "say 'by_default: false'"
                interface = one.blueprint.interface
                one.book.judge(
                    not one.info.by_default, interface, loc, text, observed, hint, one.info.address
                )


def _default_loc(seen: Seen) -> Loc:
    """Where the interface of the model says it, of a stack or of the part that it lies in."""
    part, slash, _ = seen.info.address.partition("/")
    return ("parts", part, "by_default") if slash else (*seen.loc, "by_default")


def kernels(seen: Seen, scene: Scene) -> None:
    """A method that is said to compute attention is called with what it is said to be called with."""
    named: dict[nn.Module, str] = {}
    for index, layer, calls in seen.layers():
        for block in blocks(seen, index, layer):
            kernel = seen.info.kernels.get(block.word)
            if kernel is not None and calls:
                loc = (*block.loc, "kernel")
                core = block.places["core"].module
                if not callable(getattr(type(core), kernel.method, None)):
                    text = f"kernel.method: {kernel.method} computes attention"
                    seen.refute((*loc, "method"), text, f"{type(core).__name__} has no such method")
                    continue
                named[core] = kernel.method
    if not named:
        return
    found = scene.observe(methods=named)
    for index, layer, calls in seen.layers():
        for block in blocks(seen, index, layer):
            kernel = seen.info.kernels.get(block.word)
            place = block.places.get("core")
            if kernel is None or place is None or place.module not in named or not calls:
                continue
            path = f"{found.graph.paths.get(place.path, place.path)}:{kernel.method}"
            called = [arguments for name, arguments in found.watched if name == path]
            text = f"kernel.method: {kernel.method} computes attention"
            loc = (*block.loc, "kernel")
            if not seen.judge(bool(called), (*loc, "method"), text, "it is not called"):
                continue
            event = next(e for e in found.attentions if e.core.path == place.path)
            names = [name for name, _ in called[0]]
            given = dict(called[0])
            graph = found.graph
            for position, word in enumerate(kernel.args):
                if word not in ("q", "k", "v") or position >= len(names):
                    continue
                said = graph.sources(given[names[position]])
                right = getattr(event, word)
                text = f"kernel.args: argument {position + 1} of {kernel.method} is {word}"
                observed = f"it is made by {', '.join(one.path for one in said) or 'nothing'}"
                same = {one.path for one in said} == {one.path for one in right}
                seen.judge(same, (*loc, "args"), text, observed, aspect=word)


def heads(blueprint: Blueprint, observation: Observation, book: Book) -> None:
    """Heads read what the stacks give and lead to no layer; what leads to the vocabulary is no head."""
    interface, graph = blueprint.interface, observation.graph
    output = _output(blueprint)
    reaches = _behind(graph, output, blueprint)
    first = [graph.calls_of(blueprint.places[f"{stack}.0.layer"].path) for stack in blueprint.stacks]
    entering = [call.given for calls in first for call in calls[:1] if call.given is not None]
    into_layers = graph.closure(entering)
    loc: Loc = ("heads",)
    for head in blueprint.heads:
        calls = graph.calls_of(head.path)
        gives = {call.gives for call in calls if call.gives is not None}
        if gives & reaches:
            text = "unembed.through: modules on the way to the vocabulary are named"
            book.refute(interface, _unembed_loc(interface), text, f"{head.path} lies on it too")
        text = "heads read the stacks, and no stack reads a head"
        book.judge(
            not gives & into_layers, interface, loc, text, f"{head.path} leads to a layer", aspect=head.path
        )
    through(blueprint, observation, book)


def _unembed_loc(interface: Interface) -> Loc:
    for name, stack in interface.stacks.items():
        if stack.unembed is not None:
            return ("stacks", name, "unembed", "through")
    return ("stacks", next(iter(interface.stacks), ""), "unembed")


def through(blueprint: Blueprint, observation: Observation, book: Book) -> None:
    """Modules that are said to lie on the way to the vocabulary do."""
    graph, output = observation.graph, _output(blueprint)
    for address, info in blueprint.stacks.items():
        name = address.rpartition("/")[2]
        said = info.interface.stacks[name].unembed
        if said is None or "/" in address:
            continue
        for index, path in enumerate(said.through):
            for option in path.names():
                loc: Loc = ("stacks", name, "unembed", "through", index)
                text = f"unembed.through: {option} lies on the way to the vocabulary"
                calls = graph.calls_of(option)
                if output is None or option not in graph.paths:
                    book.unseen(info.interface, loc, text)
                elif calls:
                    behind = _behind(graph, output, blueprint)
                    holds_it = output.startswith(f"{option}.")
                    right = holds_it or any(call.gives in behind for call in calls)
                    book.judge(right, info.interface, loc, text, f"{output} is not made of what it gives")
                else:
                    book.unseen(info.interface, loc, text)


def _output(blueprint: Blueprint) -> str | None:
    """Path of the output embeddings, as the interface or the model tells it."""
    return next((slot.path for slot in unembed_slots(blueprint).values()), None)


def _behind(graph: Graph, path: str | None, blueprint: Blueprint) -> frozenset[int]:
    """What the vocabulary is made of, as far back as the last layer."""
    calls: tuple[Call, ...] = graph.calls_of(path) if path is not None else ()
    begins = [call.given for call in calls if call.given is not None]
    # the matrix of the embeddings may give the vocabulary without a call
    tables = {f"{p.path}.weight" for a, p in blueprint.places.items() if a.endswith(".embeddings.table")}
    begins += [
        value
        for node, use in graph.projections.items()
        if use.weight in tables and graph.nodes[node].op != "embedding"
        for value in graph.nodes[node].inputs
        if value not in graph.matrices
    ]
    layers = [place.path for address, place in blueprint.places.items() if address.endswith(".layer")]
    ends = {call.gives for layer in layers for call in graph.calls_of(layer)}
    return graph.closure(begins, lambda v: v in ends)


def types(blueprint: Blueprint, book: Book) -> None:
    """The model type is that of the model, and the source is where its class is written."""
    interface = blueprint.interface
    config = getattr(blueprint.model, "config", None)
    actual = getattr(config, "model_type", None)
    if interface.model_type and actual:
        text = f"model_type: {', '.join(interface.model_type)}"
        inner = getattr(getattr(config, "get_text_config", lambda: config)(), "model_type", None)
        book.judge(
            bool({actual, inner} & set(interface.model_type)),
            interface,
            ("model_type",),
            text,
            f"it is {actual!r}",
        )
    module = type(blueprint.model).__module__
    if interface.source and module.startswith("transformers."):
        text = f"source: {listing(interface.source)}"
        file = module.replace(".", "/") + ".py"
        book.judge(file in interface.source, interface, ("source",), text, f"it is {file}")
