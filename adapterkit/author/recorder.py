"""Recording one forward pass: every operation on tensors and every call of a module.

The model runs in eval mode, so that nothing is drawn at random and no layer is skipped. What then only passes
something through (a dropout, an identity) still makes a value of its own: an alias of the tensor.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from adapterkit.author.graph import CONSTANT, IDENTITY, INPUT, OPAQUE, WEIGHT, Call, Graph, Node

Edit = Callable[[torch.Tensor], torch.Tensor]
Enter = Callable[[tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]

_PLAIN = {
    "radd": "add",
    "iadd": "add",
    "rsub": "sub",
    "isub": "sub",
    "subtract": "sub",
    "rmul": "mul",
    "imul": "mul",
    "multiply": "mul",
    "truediv": "div",
    "rtruediv": "div",
    "itruediv": "div",
    "true_divide": "div",
    "rmatmul": "matmul",
    "alpha_dropout": "dropout",
    "dropout1d": "dropout",
    "dropout2d": "dropout",
    "feature_dropout": "dropout",
    "log_softmax": "softmax",
}
"""Other names of the same operation."""
_SHAPES_ONLY = ("_like",)
_FACTORIES = frozenset({"new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"})
"""What they are given shows a size and no numbers."""
_ATTENTION = ("query", "key", "value", "attn_mask")


class Recorder(TorchFunctionMode):
    """Records what happens in this thread while it is entered.

    Args:
        model: whose calls are recorded.
        edits: changes of a module's first output on the way, by module.
        enter: changes of what a module is called with, by module.
        methods: a method of a module whose calls are recorded too, by module.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        edits: Mapping[nn.Module, Edit] | None = None,
        enter: Mapping[nn.Module, Enter] | None = None,
        methods: Mapping[nn.Module, str] | None = None,
    ) -> None:
        super().__init__()
        self.edits, self.enter, self.methods = edits or {}, enter or {}, methods or {}
        self.thread = threading.get_ident()
        self.nodes: list[Node] = []
        self.tensors: list[torch.Tensor] = []
        """The tensor of each value. It is held, so that no other tensor takes its id."""
        self.known: dict[int, int] = {}
        self.calls: list[dict[str, Any]] = []
        self.open: list[int] = []
        self.watched: list[tuple[str, tuple[tuple[str, int], ...], int, int]] = []
        self.spare: list[torch.Tensor] = []
        """Tensors that an edit replaced."""
        self.paused = False
        self.paths: dict[int, str] = {}
        self.every: dict[str, str] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            self.every[path] = self.paths.setdefault(id(module), path)
        self.weights = {id(tensor): name for name, tensor in model.named_parameters()}
        self.owners: dict[str, str] = {}
        self.held: dict[int, frozenset[str]] = {}
        for module in model.modules():
            names = [self.weights[id(p)] for p in module._parameters.values() if p is not None]
            self.held[id(module)] = frozenset(names)
            for name in names:
                self.owners.setdefault(name, self.paths[id(module)])

    # -- values

    def _new(self, op: str, inputs: tuple[int, ...], tensor: torch.Tensor, name: str = "") -> int:
        index = len(self.nodes)
        call = self.open[-1] if self.open else -1
        shape, floating = tuple(tensor.shape), tensor.is_floating_point()
        self.nodes.append(Node(index, op, inputs, call, shape, floating, name))
        self.tensors.append(tensor)
        self.known[id(tensor)] = index
        return index

    def value(self, tensor: torch.Tensor, op: str = CONSTANT, name: str = "") -> int:
        """The value that a tensor holds now; what is not known yet is a parameter, or begins here."""
        found = self.known.get(id(tensor))
        if found is None:
            weight = self.weights.get(id(tensor))
            found = self._new(op if weight is None else WEIGHT, (), tensor, weight or name)
        return found

    # -- operations

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        given = list(tensors((args, kwargs)))
        before = [_version(tensor) for tensor in given]
        out = func(*args, **kwargs)
        made = list(tensors(out))
        op = IDENTITY if _is_by_one(_name(func), args) else _name(func)
        if op == "scaled_dot_product_attention":
            named = {**dict(zip(_ATTENTION, args, strict=False)), **kwargs}
            given, before = [named[w] for w in _ATTENTION if isinstance(named.get(w), torch.Tensor)], []
        changed = [t for t, old in zip(given, before, strict=False) if old is not None and _version(t) != old]
        if not made and not changed:
            return out
        sizes_only = op.endswith(_SHAPES_ONLY) or op in _FACTORIES
        inputs = () if sizes_only else tuple(self.value(tensor) for tensor in given)
        for tensor in changed:
            self._changed(op, inputs, tensor)
        if op == "dropout" and made and not changed and made[0] is given[0]:
            made = [_alias(given[0])]
            out = made[0]
        for tensor in made:
            if not any(tensor is other for other in given):
                self._new(op, inputs, tensor)
        return out

    def _changed(self, op: str, inputs: tuple[int, ...], tensor: torch.Tensor) -> None:
        """A tensor was written into: it and what it is a view of hold new values."""
        index = self._new(op, inputs, tensor)
        base = tensor._base
        if base is not None and id(base) in self.known:
            self._new(op, (self.known[id(base)], index), base)

    # -- calls

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self.thread or self.paused:
            return None
        changed = None
        if module in self.enter:
            with self._pause():
                args, kwargs = changed = self.enter[module](args, kwargs)
        op = CONSTANT if self.open else INPUT
        found = [
            (name, self.value(tensor, op, name)) for name, tensor in _named(_arguments(module, args, kwargs))
        ]
        call = {
            "path": self.paths.get(id(module), ""),
            "kind": type(module).__name__,
            "parent": self.open[-1] if self.open else -1,
            "start": len(self.nodes),
            "arguments": tuple(found),
            "is_leaf": next(module.children(), None) is None,
            "weights": self.held.get(id(module), frozenset()),
        }
        self.open.append(len(self.calls))
        self.calls.append(call)
        return changed

    def _after(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
        if threading.get_ident() != self.thread or self.paused:
            return None
        call = self.calls[self.open[-1]]
        result = out
        if call["is_leaf"] and isinstance(out, torch.Tensor):
            same = self.known.get(id(out))
            if same is not None and any(value == same for _, value in call["arguments"]):
                with self._pause():
                    result = _alias(out)
                self._new(IDENTITY, (same,), result)
        if module in self.edits:
            first = next(tensors(result))
            with self._pause():
                changed = self.edits[module](first)
            # the same place in the graph, other numbers
            index = self.value(first)
            self.known[id(changed)], self.tensors[index] = index, changed
            self.spare.append(first)
            result = _replaced(result, first, changed)
        outputs = []
        for tensor in tensors(result):
            if id(tensor) not in self.known and id(tensor) not in self.weights:
                # made where operations are not seen
                inside = tuple(dict.fromkeys(value for _, value in call["arguments"]))
                own = tuple(self.value(p) for p in module._parameters.values() if p is not None)
                self._new(OPAQUE, inside + own, tensor)
            outputs.append(self.value(tensor))
        call["outputs"], call["end"] = tuple(outputs), len(self.nodes)
        self.open.pop()
        return None if result is out else result

    @contextmanager
    def _pause(self) -> Iterator[None]:
        self.paused = True
        try:
            yield
        finally:
            self.paused = False

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Record what runs inside. The model is left as it was."""
        with ExitStack() as stack:
            for module in list(model.modules()):
                stack.callback(module.register_forward_pre_hook(self._before, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(self._after, with_kwargs=True).remove)
            for module, name in self.methods.items():
                module.__dict__[name] = self._watched(module, name)
                stack.callback(module.__dict__.pop, name)
            stack.enter_context(self)
            yield

    def _watched(self, module: nn.Module, name: str) -> Callable[..., Any]:
        """A method that is recorded as a call with its arguments; what it calls belongs to the module."""
        original = getattr(type(module), name)
        parameters = list(inspect.signature(original).parameters)[1:]

        def method(*args: Any, **kwargs: Any) -> Any:
            given = {**dict(zip(parameters, args, strict=False)), **kwargs}
            found = tuple((key, self.value(tensor)) for key, tensor in _named(given))
            parent, start = (self.open[-1] if self.open else -1), len(self.nodes)
            out = original(module, *args, **kwargs)
            self.watched.append((f"{self.paths[id(module)]}:{name}", found, parent, start))
            return out

        return method

    def graph(self, out: Any) -> Graph:
        """The recording as data. Raises: nothing; a call that an exception ended is left out."""
        calls = [
            Call(index, **{**{"outputs": (), "end": len(self.nodes)}, **call})
            for index, call in enumerate(self.calls)
        ]
        results = tuple(
            (name, self.known[id(tensor)]) for name, tensor in _named({"": out}) if id(tensor) in self.known
        )
        return Graph(tuple(self.nodes), tuple(calls), results, self.owners, self.every)


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested tuples, lists, maps."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors(item)


def _named(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The same with the way to each."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, Mapping | tuple | list):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            yield from _named(item, f"{name}.{key}" if name else str(key))


def _arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call by name, in the order of the call."""
    try:
        names = list(inspect.signature(type(module).forward).parameters)[1:]
    except (TypeError, ValueError):
        names = []
    names += [str(i) for i in range(len(names), len(args))]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _replaced(value: Any, old: torch.Tensor, new: torch.Tensor) -> Any:
    """A result with another first tensor."""
    if value is old:
        return new
    if isinstance(value, Mapping):
        changed = {key: new if item is old else item for key, item in value.items()}
        return type(value)(changed) if type(value) is dict else type(value)(**changed)
    if isinstance(value, tuple | list):
        items = [new if item is old else item for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(tensor.shape)


def _version(tensor: torch.Tensor) -> int | None:
    try:
        return tensor._version
    except (RuntimeError, AttributeError):  # tensors of inference mode and of vmap count no versions
        return None


def _is_by_one(op: str, args: tuple[Any, ...]) -> bool:
    """Whether a product or quotient leaves its tensor as it is."""
    factors = args[1:] if op == "div" else args if op == "mul" else ()
    return any(isinstance(value, int | float) and value == 1 for value in factors)


def _name(func: Any) -> str:
    name = str(getattr(func, "__name__", type(func).__name__)).strip("_")
    return _PLAIN.get(name, name)
