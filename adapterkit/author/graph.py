"""What one forward pass did, as data: values, the operations that made them, the module calls around them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

INPUT, WEIGHT, CONSTANT, IDENTITY, OPAQUE = "input", "weight", "constant", "identity", "opaque"

CONTRACTIONS = frozenset(
    "linear matmul bmm mm mv baddbmm addmm addbmm addmv einsum tensordot inner bilinear conv1d conv2d conv3d"
    " conv_transpose1d conv_transpose2d conv_transpose3d embedding embedding_bag grouped_mm"
    " multi_head_attention_forward scaled_mm".split()
)
"""Operations that sum products over an axis."""
ATTENTION = frozenset({"scaled_dot_product_attention", "attention", "multi_head_attention_forward"})
"""Operations that are attention as a whole."""
ADDITIONS = frozenset({"add", "sub", "addcmul", "index_add", "scatter_add"})
NORMS = frozenset(
    "layer_norm rms_norm group_norm batch_norm rsqrt sqrt var std var_mean normalize norm".split()
)
ACTIVATIONS = frozenset(
    "gelu silu relu relu6 tanh sigmoid softplus mish elu selu celu leaky_relu hardswish hardsigmoid"
    " hardtanh logsigmoid erf threshold prelu square".split()
)
MOVES = frozenset(
    "view reshape transpose permute t get unsqueeze squeeze expand expand_as contiguous clone flatten"
    " unflatten getitem narrow chunk split unbind select to type type_as float half bfloat16 double detach"
    " identity swapaxes moveaxis movedim repeat repeat_interleave view_as reshape_as as_strided alias roll"
    " flip split_with_sizes tensor_split index_select gather pad".split()
)
"""Operations after which the numbers are the same ones, elsewhere or in another type."""


@dataclass(frozen=True, slots=True)
class Node:
    """A value of the forward pass: one tensor as one operation left it."""

    index: int
    op: str
    """Name of the operation without underscores; or input, weight, constant, identity, opaque."""
    inputs: tuple[int, ...]
    """The values that it was made of, in the order of the arguments."""
    call: int
    """The innermost module call that ran, -1 outside."""
    shape: tuple[int, ...]
    floating: bool
    name: str = ""
    """Of a weight, its parameter; of an input, its argument."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a module."""

    index: int
    path: str
    """The first path of the module in the model; '' is the model itself."""
    kind: str
    """Name of its class."""
    parent: int
    start: int
    end: int
    """Values made while it ran: start <= index < end."""
    arguments: tuple[tuple[str, int], ...]
    """Argument -> value, for every tensor that it was given."""
    outputs: tuple[int, ...]
    is_leaf: bool
    """The module has no children."""
    weights: frozenset[str] = field(repr=False)
    """Parameters that the module holds itself."""

    @property
    def given(self) -> int | None:
        """The first value that it was called with."""
        return self.arguments[0][1] if self.arguments else None

    @property
    def gives(self) -> int | None:
        """The first value that it returned."""
        return self.outputs[0] if self.outputs else None

    def argument(self, name: str) -> int | None:
        return next((value for word, value in self.arguments if word == name), None)


@dataclass(frozen=True)
class Projection:
    """A use of a matrix of parameters in the forward pass."""

    node: int
    path: str
    """The module that holds the matrix."""
    weight: str
    call: int | None
    """The call of that module, None if its weight was used without calling it."""


@dataclass(frozen=True)
class Graph:
    """Values and module calls of one forward pass, in order of time."""

    nodes: tuple[Node, ...]
    calls: tuple[Call, ...]
    results: tuple[tuple[str, int], ...]
    """What the model returned, by name."""
    owners: dict[str, str] = field(repr=False)
    """Parameter -> path of the module that holds it."""
    paths: dict[str, str] = field(repr=False)
    """Every path of a module -> its first path."""

    @cached_property
    def users(self) -> tuple[tuple[int, ...], ...]:
        """Value -> values made of it."""
        found: list[list[int]] = [[] for _ in self.nodes]
        for node in self.nodes:
            for value in dict.fromkeys(node.inputs):
                found[value].append(node.index)
        return tuple(map(tuple, found))

    @cached_property
    def _by_path(self) -> dict[str, tuple[Call, ...]]:
        found: dict[str, list[Call]] = {}
        for call in self.calls:
            found.setdefault(call.path, []).append(call)
        return {path: tuple(calls) for path, calls in found.items()}

    def calls_of(self, path: str, within: Call | None = None) -> tuple[Call, ...]:
        """Calls of the module at `path`, in order; those during another call alone."""
        found = self._by_path.get(self.paths.get(path, path), ())
        return found if within is None else tuple(call for call in found if self.is_inside(call, within))

    def is_inside(self, call: Call, outer: Call) -> bool:
        """Whether a call ran during another one (or is it)."""
        at: int = call.index
        while at > outer.index:
            at = self.calls[at].parent
        return at == outer.index

    @cached_property
    def _returned(self) -> dict[int, tuple[Call, ...]]:
        found: dict[int, list[Call]] = {}
        for call in self.calls:
            if call.outputs:
                found.setdefault(call.outputs[0], []).append(call)
        return {value: tuple(calls) for value, calls in found.items()}

    def returned(self, value: int) -> tuple[Call, ...]:
        """Calls whose first output is this value, outer ones first."""
        return self._returned.get(value, ())

    @cached_property
    def matrices(self) -> dict[int, str]:
        """Value -> parameter of two or more axes that it is, perhaps turned or cast."""
        found: dict[int, str] = {}
        for node in self.nodes:
            if node.op == WEIGHT and len(node.shape) > 1:
                found[node.index] = node.name
            elif node.op in MOVES and node.inputs and node.inputs[0] in found:
                found[node.index] = found[node.inputs[0]]
        return found

    @cached_property
    def projections(self) -> dict[int, Projection]:
        """Value -> the projection that made it."""
        found = {}
        for node in self.nodes:
            name = next((self.matrices[v] for v in node.inputs if v in self.matrices), None)
            if name is None or not (node.op in CONTRACTIONS or node.op == OPAQUE):
                continue
            call = next((c for c in self.around(node.call) if name in c.weights), None)
            path = call.path if call is not None else self.owners[name]
            found[node.index] = Projection(node.index, path, name, None if call is None else call.index)
        return found

    def around(self, call: int) -> Iterator[Call]:
        """A call and those that it ran in, from inside out."""
        while call >= 0:
            yield self.calls[call]
            call = self.calls[call].parent

    def is_heavy(self, value: int) -> bool:
        """Whether a value is made by a sum of products: a projection, or a product of attention."""
        node = self.nodes[value]
        return (
            node.op in CONTRACTIONS
            or node.op in ATTENTION
            or value in self.projections
            or node.op == "softmax"
        )

    def is_source(self, value: int) -> bool:
        """Whether a value begins here: an input, a parameter, a constant."""
        return not self.nodes[value].inputs

    def back(self, value: int, stop: Callable[[int], bool]) -> tuple[int, ...]:
        """The nearest values behind `value` (itself included) at which to stop, nearest first."""
        found, seen, queue = [], {value}, [value]
        for at in queue:
            if stop(at):
                found.append(at)
                continue
            for before in self.nodes[at].inputs:
                if before not in seen:
                    seen.add(before)
                    queue.append(before)
        return tuple(found)

    def closure(
        self, values: Iterable[int], stop: Callable[[int], bool] = lambda value: False
    ) -> frozenset[int]:
        """Everything that values are made of, themselves included; what lies behind a stop is left out."""
        seen = set(values)
        queue = list(seen)
        for at in queue:
            if stop(at):
                continue
            for before in self.nodes[at].inputs:
                if before not in seen:
                    seen.add(before)
                    queue.append(before)
        return frozenset(seen)

    @cached_property
    def fed(self) -> frozenset[int]:
        """Values that depend on what the model was called with."""
        found: set[int] = set()
        for node in self.nodes:
            if node.op == INPUT or any(value in found for value in node.inputs):
                found.add(node.index)
        return frozenset(found)

    def sources(self, value: int) -> tuple[Projection, ...]:
        """The nearest projections behind a value (itself included) of what the model was called with."""
        found = self.back(value, lambda at: self.is_heavy(at) or self.is_source(at))
        return tuple(self.projections[at] for at in found if at in self.projections)

    def same(self, value: int) -> int:
        """The oldest value that holds the same numbers, perhaps elsewhere or in another type."""
        while self.nodes[value].op in MOVES | {"dropout"} and self.nodes[value].inputs:
            value = self.nodes[value].inputs[0]
        return value

    def is_norm(self, call: Call) -> bool:
        """Whether a call normalises what it is given: same shape, no projection, a norm inside."""
        given, gives = call.given, call.gives
        if given is None or gives is None or self.nodes[given].shape != self.nodes[gives].shape:
            return False
        inside = range(call.start, call.end)
        if any(at in self.projections for at in inside):
            return False
        ops = {self.nodes[at].op for at in inside}
        return bool(ops & NORMS) or {"pow", "mean"} <= ops  # a root may be written as a power
