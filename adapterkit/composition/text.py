"""Setups as text and as plain data, and back."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from adapterkit.composition.blocks import (
    Average,
    BatchSplit,
    Block,
    Fuse,
    MultiTask,
    Parallel,
    Route,
    Setup,
    Split,
    Stack,
    illegal,
)
from adapterkit.errors import CompositionError, Problem, did_you_mean, listing

BLOCKS: dict[str, Any] = {
    block.__name__: block for block in (Stack, Fuse, Parallel, Split, BatchSplit, Average, MultiTask, Route)
}


def read(setup: Setup | None) -> Setup | None:
    """A setup, which may be given as text."""
    return parse(setup) if isinstance(setup, str) else setup


def parse(text: str) -> Setup:
    """A setup as it is printed: `Stack("a", Average("b", "c", weights=[1, 3]))`; quotes may be left out.

    Raises: CompositionError: it is not written like that, or holds an unknown block or option.
    """
    if "(" not in text:
        return text
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise illegal("bad-setup", f"{text[:80]!r} is no setup: {error}", "Stack('a', 'b'), say") from error
    return _setup(tree)


def _setup(node: ast.expr) -> Setup:
    match node:
        case ast.Constant(value=str(name)):
            return name
        case ast.Name(id=name):
            return name
        case ast.Call(func=ast.Name(id=word), args=args, keywords=keywords):
            options = {str(keyword.arg): _value(keyword.value) for keyword in keywords}
            return _made(word, [_setup(child) for child in args], options)
    raise illegal("bad-setup", f"{ast.unparse(node)[:80]} is neither the name of an adapter nor a block")


def _value(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, MemoryError, RecursionError) as error:
        raise illegal("bad-setup", f"{ast.unparse(node)[:80]} is no value of an option") from error


def to_dict(setup: Setup) -> Any:
    """Plain data: a name as it is, a block as {"block": ..., "children": [...], option: ...}."""
    return setup.to_dict() if isinstance(setup, Block) else setup


def from_dict(data: Any) -> Setup:
    """Undo `to_dict`.

    Raises: CompositionError: it holds something else.
    """
    if isinstance(data, str):
        return data
    if not isinstance(data, Mapping) or not isinstance(data.get("children"), list | tuple):
        raise illegal(
            "bad-setup", f"{str(data)[:80]} is no setup", "a name, or a map with 'block' and 'children'"
        )
    options = {str(name): value for name, value in data.items() if name not in ("block", "children")}
    return _made(str(data.get("block")), [from_dict(child) for child in data["children"]], options)


def _made(word: str, children: list[Setup], options: dict[str, Any]) -> Setup:
    cls = BLOCKS.get(word)
    if cls is None:
        hint = did_you_mean(word, BLOCKS)
        problem = Problem("bad-setup", f"there is no block {word!r}", "", f"one of {listing(BLOCKS)}", hint)
        raise CompositionError(problem)
    known = {name for name in cls.__dataclass_fields__ if name != "children"}
    for name in options:
        if name not in known:
            raise illegal("bad-setup", f"{word} has no option {name!r}", f"options: {listing(sorted(known))}")
    for name in ("splits", "batch_sizes"):
        if name in known and name not in options:
            raise illegal("bad-setup", f"{word} needs {name}")
    made: Setup = cls(*children, **options)
    return made
