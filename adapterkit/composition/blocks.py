"""The blocks of a setup: immutable, hashable, and printed the way they are written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields
from math import isfinite
from operator import index
from typing import Any

from adapterkit.errors import CompositionError, Problem


def illegal(code: str, message: str, expected: str = "") -> CompositionError:
    """The error of a setup."""
    return CompositionError(Problem(code, message, expected=expected))


@dataclass(frozen=True, init=False, repr=False)
class Block:
    """Several adapters, or blocks of them, that act together.

    Raises: CompositionError: no child, or one that is neither a name nor a block.
    """

    children: tuple[Setup, ...]

    def __init__(self, *children: Setup) -> None:
        self._set("children", children)
        word = type(self).__name__
        if not children:
            raise illegal("bad-setup", f"{word} needs at least one adapter")
        for child in children:
            if not isinstance(child, str | Block):
                message = f"a child of {word} is the name of an adapter or a block, not {child!r}"
                raise illegal("bad-setup", message)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def options(self) -> dict[str, Any]:
        """What was said besides the children."""
        found = {field.name: getattr(self, field.name) for field in fields(self)[1:]}
        defaults = {field.name: field.default for field in fields(self)[1:] if field.default is not MISSING}
        return {
            name: value for name, value in found.items() if name not in defaults or value != defaults[name]
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain data: {"block": ..., "children": [...], option: ...}, a child that is a name as it is."""
        children = [child.to_dict() if isinstance(child, Block) else child for child in self.children]
        options = {k: list(v) if isinstance(v, tuple) else v for k, v in self.options().items()}
        return {"block": type(self).__name__, "children": children, **options}

    @staticmethod
    def from_dict(data: Any) -> Setup:
        """Undo `to_dict`.

        Raises: CompositionError: it holds something else.
        """
        from adapterkit.composition import text  # which has the table of all blocks

        return text.from_dict(data)

    def __repr__(self) -> str:
        given = [repr(child) for child in self.children]
        for name, value in self.options().items():
            given.append(f"{name}={list(value) if isinstance(value, tuple) else value!r}")
        return f"{type(self).__name__}({', '.join(given)})"


Setup = str | Block
"""The name of an adapter, or a block of several."""


@dataclass(frozen=True, init=False, repr=False)
class Stack(Block):
    """One after another: each acts on what the one before has left.

    LoRA and its relatives add their updates of one and the same input; a bottleneck reads what the one before
    gives, with the same residual stream; prefixes and prompts are all there.
    """

    @property
    def is_flat(self) -> bool:
        """Whether its children are names."""
        return all(isinstance(child, str) for child in self.children)


@dataclass(frozen=True, init=False, repr=False)
class Fuse(Block):
    """Attend over the outputs of several adapters (AdapterFusion, Pfeiffer et al. 2021, arXiv:2005.00247).

    A child may be a Stack: its last adapter is fused, and acts on what those before it leave. The weights
    that attend are made by `kit.fuse(...)` and have a name, 'a+b' if none was given.
    Raises: CompositionError: fewer than two children, another block in one, or an adapter fused twice.
    """

    name: str

    def __init__(self, *children: Setup, name: str | None = None) -> None:
        super().__init__(*children)
        for child in children:
            if isinstance(child, Block) and not (isinstance(child, Stack) and child.is_flat):
                message = f"{type(child).__name__} cannot be fused: it may be another adapter at every token"
                expected = "the children of Fuse are names of adapters, or Stacks of names"
                raise illegal("bad-nesting", message, expected)
        if len(children) < 2 or len(set(self.fused)) < len(children):
            given = ", ".join(map(repr, children)) or "none"
            raise illegal("bad-setup", f"Fuse needs two or more different adapters, not {given}")
        if not isinstance(name, str | None):
            raise illegal("bad-setup", f"the name of a fusion is a text, not {name!r}")
        self._set("name", name or "+".join(self.fused))

    @property
    def fused(self) -> tuple[str, ...]:
        """The adapters whose outputs are attended over."""
        return tuple(str(c.children[-1] if isinstance(c, Block) else c) for c in self.children)

    def options(self) -> dict[str, Any]:
        return {} if self.name == "+".join(self.fused) else {"name": self.name}


@dataclass(frozen=True, init=False, repr=False)
class Parallel(Block):
    """Every child on all examples: the batch is repeated once for each.

    Outputs are those of all examples for the first child, then for the second, and so on.
    """


@dataclass(frozen=True, init=False, repr=False)
class Split(Block):
    """The sequence cut into segments, one for each child.

    Args: splits: how many positions each child gets; one number: as many for each.
    """

    splits: tuple[int, ...]

    def __init__(self, *children: Setup, splits: int | Iterable[int]) -> None:
        super().__init__(*children)
        self._set("splits", _sizes(self, "splits", splits))


@dataclass(frozen=True, init=False, repr=False)
class BatchSplit(Block):
    """The batch cut into groups, one for each child.

    Args: batch_sizes: how many examples each child gets; one number: as many for each.
    """

    batch_sizes: tuple[int, ...]

    def __init__(self, *children: Setup, batch_sizes: int | Iterable[int]) -> None:
        super().__init__(*children)
        self._set("batch_sizes", _sizes(self, "batch_sizes", batch_sizes))


@dataclass(frozen=True, init=False, repr=False)
class Average(Block):
    """The weighted mean of what the children give, at every place where they act.

    Args: weights: one for each child, None: all the same. normalize: divide them by their sum. Without that,
        what is missing to a sum of 1 is the weight of the model without adapters, so that the changes add up.
    """

    weights: tuple[float, ...] | None = None
    normalize: bool = True

    def __init__(
        self, *children: Setup, weights: Iterable[float] | None = None, normalize: bool = True
    ) -> None:
        super().__init__(*children)
        if weights is not None:
            given = tuple(_listed(self, "weights", weights))
            if len(given) != len(children):
                raise illegal("bad-setup", f"{len(given)} weights for {len(children)} children of Average")
            for weight in given:
                # also one of numpy's, or a tensor of one number
                if isinstance(weight, bool) or not hasattr(weight, "__float__") or not isfinite(weight):
                    raise illegal("bad-setup", f"a weight of Average is a finite number, not {weight!r}")
            weights = tuple(float(weight) for weight in given)
            if normalize and not abs(sum(weights)) > 1e-12:
                raise illegal(
                    "bad-setup", "the weights of Average add up to zero", "normalize=False, or other weights"
                )
        if not isinstance(normalize, bool):
            raise illegal("bad-setup", f"normalize is true or false, not {normalize!r}")
        self._set("weights", weights)
        self._set("normalize", normalize)

    @property
    def shares(self) -> tuple[float, ...]:
        """The weights that are used."""
        weights = self.weights or (1.0,) * len(self.children)
        total = sum(weights) if self.normalize else 1.0
        return tuple(weight / total for weight in weights)


@dataclass(frozen=True, init=False, repr=False)
class MultiTask(Block):
    """One child for each example, by the task that it belongs to.

    Tasks come with the batch: `kit.using(..., task_ids=...)`, or as its column `task_ids`.
    """


@dataclass(frozen=True, init=False, repr=False)
class Route(Block):
    """One child or none for each example, by name.

    Rows come with the batch: `kit.using(..., rows=...)`, or as its column `adapter_rows`.
    """


def _listed(block: Block, option: str, value: Any) -> list[Any]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise illegal("bad-setup", f"{option} of {type(block).__name__} is a list, not {value!r}")
    return list(value)


def _sizes(block: Block, option: str, value: Any) -> tuple[int, ...]:
    number = len(block.children)
    sizes = [value] * number if _is_whole(value) else _listed(block, option, value)
    if len(sizes) != number:
        message = f"{len(sizes)} {option} for {number} children of {type(block).__name__}"
        raise illegal("bad-setup", message)
    for size in sizes:
        if not _is_whole(size) or size < 0:
            raise illegal(
                "bad-setup", f"{option} of {type(block).__name__} are whole numbers from 0 on, not {size!r}"
            )
    if not sum(sizes):
        raise illegal("bad-setup", f"{option} of {type(block).__name__} are all 0")
    return tuple(int(size) for size in sizes)


def _is_whole(value: Any) -> bool:
    """Whether it is a whole number, one of numpy's perhaps, or a tensor of one."""
    if isinstance(value, bool) or getattr(value, "ndim", False):
        return False
    try:
        index(value)
    except TypeError:
        return False
    return True
