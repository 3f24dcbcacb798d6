"""Which axis holds the examples: of two recordings one has an example less, and the axis is shorter there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch

from adapterkit.author.graph import Graph
from adapterkit.spec.terms import Batch

Shape = tuple[int, ...]


def examples(inputs: Iterable[torch.Tensor]) -> int:
    """B: the first axis of most inputs, or of the first: the patches of all images may lie in one axis."""
    found = Counter(tensor.shape[0] for tensor in inputs if tensor.ndim)
    return max(found, key=lambda rows: found[rows], default=1)


def axis_of(pairs: Iterable[tuple[Shape, Shape]]) -> Batch | None:
    """The axis that is shorter in every second shape; 'none' if it is no one axis, None without a pair."""
    axes = {
        next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), None)
        for before, after in pairs
    }
    if not axes:
        return None
    if axes - {0, 1} or len(axes) > 1:
        return "none"
    return "second" if axes == {1} else "first"


def arguments(whole: Graph, less: Graph, paths: Iterable[str]) -> dict[str, Batch]:
    """Arguments that the modules at `paths` are called with -> the axis of the examples in each."""
    pairs: dict[str, list[tuple[Shape, Shape]]] = {}
    for path in paths:
        for call, other in zip(whole.calls_of(path), less.calls_of(path), strict=False):
            after = dict(other.arguments)
            for name, value in call.arguments:
                if name in after and whole.nodes[value].shape:
                    shapes = whole.nodes[value].shape, less.nodes[after[name]].shape
                    pairs.setdefault(name, []).append(shapes)
    found = {name: axis_of(shapes) for name, shapes in pairs.items()}
    return {name: axis for name, axis in found.items() if axis is not None}
