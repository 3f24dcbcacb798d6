"""What a model cannot have, by what was observed of its streams: `unsupported`, with the reason."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch

from adapterkit import api
from adapterkit.author.column import Column
from adapterkit.author.describe import Scene
from adapterkit.author.graph import MOVES, NORMS, Graph
from adapterkit.spec.schema import Interface

_MASK, _POSITIONS = "attention_mask", "position_ids"

_ONE_AXIS = {
    "prompt_tuning": "the tokens of all examples lie in one axis, in which a prompt has no place",
    "reft": "positions are counted in an example, and the stream has no axis of examples",
}
_GRID = {
    "prompt_tuning": "the stream is a grid, in which a prompt has no place",
    "reft": "positions are counted in a sequence, and the stream is a grid",
}


def unsupported(columns: Iterable[Column]) -> dict[str, str]:
    """Method -> why the model cannot have it. Stacks that are adapted only when addressed are left out."""
    usual = [column for column in columns if column.by_default]
    found: dict[str, str] = {}
    for column in usual:
        if column.batch == "none":
            found |= _ONE_AXIS
        elif len(column.scene.graph.nodes[column.facts.entering].shape) > 3:
            found |= _GRID
    if not any(column.out for column in usual):
        found["invertible"] = "the stream comes out of no module before the first layer"
    return found


def by_trial(scene: Scene, columns: list[Column], interface: Interface) -> dict[str, str]:
    """The same, where something was seen that is in the way of a method, and a trial shows that it is."""
    usual = [column for column in columns if column.by_default]
    found: dict[str, str] = {}
    asked = [column for column in usual if not column.reads]
    reason = next((why for column in asked if (why := _no_place(column, columns))), "")
    if reason and not _runs(scene, {"method": "prompt_tuning", "prompt_length": 3}, interface):
        found["prompt_tuning"] = reason
    prefix = {"method": "prefix_tuning", "prefix_length": 2}
    if any(map(_in_pieces, usual)) and not _runs(scene, prefix, interface):
        found["prefix_tuning"] = "attention is computed in pieces, which no key precedes"
    return found


def _runs(scene: Scene, config: Mapping[str, Any], interface: Interface) -> bool:
    """Whether a copy of the model runs with a method."""
    model = copy.deepcopy(scene.model)
    try:
        api.attach(model, config, interface=interface)
        with torch.no_grad():
            model(**copy.deepcopy(dict(scene.inputs)))
    except Exception:  # models raise anything on what does not fit
        return False
    return True


def _in_pieces(column: Column) -> bool:
    """Whether attention is to fewer keys at a time than the stream has tokens."""
    graph, length = column.scene.graph, _shape(column.scene.graph, column.facts.entering)[-2]
    branches = [b for layer in column.facts.layers for b in layer.branches if b.kind == "attention"]
    events = [event for branch in branches for event in branch.events]
    return any(
        event.scores[2] != length if event.scores else len(_shape(graph, event.query)) > 4 for event in events
    )


def _no_place(column: Column, every: list[Column]) -> str:
    """Why a prompt has no place in a stack of sequences; empty if nothing was seen that is in its way."""
    graph, given = column.scene.graph, column.given
    mask, positions = (
        str(column.inputs.get(w, usual)) for w, usual in (("mask", _MASK), ("positions", _POSITIONS))
    )
    if any(name.startswith(f"{mask}.") for name in given) or len(_shape(graph, given.get(mask))) > 2:
        return "masks of pairs of positions are given to the stack, ready made"
    tokens = _shape(graph, column.facts.entering)[1]
    pairs = [name for name, value in given.items() if _shape(graph, value)[-2:] == (tokens, tokens)]
    if pairs and tokens > 1 and column.inputs.get("ids", "") is not None:  # images may be as wide
        return "numbers for pairs of positions are given to the stack, ready made"
    if len(_shape(graph, given.get(positions))) > 2:
        return "positions of several axes are given to the stack, and a prompt has none there"
    looked_up = [table for table in _looked_up(column) if table not in graph.closure([column.facts.entering])]
    first, length = column.facts.layers[0].call, _shape(graph, column.facts.entering)[1]
    states = {one.facts.leaving for one in every if one is not column}
    beside = [(name.partition(".")[0], v) for name, v in first.arguments if v != first.given]
    beside = [(name, v) for name, v in beside if not states & graph.closure([v])]  # what is read of another
    for name, value in beside:
        # a vector for each example, of a class or a time, is none of a token
        if length in _shape(graph, value)[1:] and graph.closure([value]).intersection(looked_up):
            return f"{name} is looked up with ids beside the stream, and a prompt has none"
    if column.takes_embeddings:
        return ""
    if column.inputs.get("ids", "") is None and column.out and not column.is_exact:
        return "a number of each position is added behind the embeddings, and none of a prompt"
    queries = [
        _shape(graph, e.query) for layer in column.facts.layers for b in layer.branches for e in b.events
    ]
    if any(len(query) == 4 and query[0] != column.scene.batch for query in queries):
        return "attention is computed in pieces of the stream, in which a prompt has no place"
    if any(_is_grid(shape, length) for shape in _moved(graph, column)):
        return "the layers lay the stream out as a grid, in which a prompt has no place"
    passed = {graph.same(value) for value in given.values()}
    for name, value in beside:
        if graph.same(value) in passed:
            continue
        shape, is_mask = graph.nodes[value].shape, "mask" in name
        if is_mask and shape[-2:] == (length, length) and mask not in given:
            return f"{name} is made for pairs of positions before the first layer, and for none of a prompt"
        if not is_mask and graph.nodes[value].floating and {length, 2 * length - 1} & set(shape):
            return f"{name} is made for every position before the first layer, and for none of a prompt"
    return ""


def _moved(graph: Graph, column: Column) -> Iterator[tuple[int, ...]]:
    """Shapes that the stream takes in the layers, wherever it is the same numbers."""
    for layer in column.facts.layers:
        same = {layer.given}
        for node in graph.nodes[layer.call.start : layer.call.end]:
            if node.inputs and (node.inputs[0] in same) and node.op in MOVES | NORMS:
                same.add(node.index)
                yield node.shape


def _is_grid(shape: tuple[int, ...], length: int) -> bool:
    """Whether two neighbouring axes are the tokens."""
    return len(shape) > 3 and any(a * b == length and min(a, b) > 1 for a, b in pairwise(shape[1:]))


def _looked_up(column: Column) -> list[int]:
    """Values that were looked up with what the model was called with."""
    graph = column.scene.graph
    return [
        value for value in graph.projections if graph.nodes[value].op == "embedding" and value in graph.fed
    ]


def _shape(graph: Graph, value: int | None) -> tuple[int, ...]:
    return () if value is None else graph.nodes[value].shape
