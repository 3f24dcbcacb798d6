"""Every error code that adapterkit can raise, read from its source.

A code is what a call gives to a parameter named `code`: of `Problem`, and of any function that hands its own
on. It is a literal, or a name whose literals can be seen in the same file; a function that chooses one is
named `code`. `python -m tests.docs.codes` lists code and places.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "adapterkit"
SHAPE = re.compile(r"^[a-z0-9]+(-[a-z0-9]+)*$")
Function = ast.FunctionDef | ast.AsyncFunctionDef


def positions(tree: ast.Module) -> dict[str, int]:
    """Name of a function of this file that takes a code -> the place of that parameter, without self."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, Function):
            given = [argument for argument in node.args.args if argument.arg not in ("self", "cls")]
            for place, argument in enumerate(given):
                if argument.arg == "code" and ast.unparse(argument.annotation or argument) == "str":
                    found[node.name] = place
    return found


def passed(call: ast.Call, position: int) -> ast.expr | None:
    """What a call gives to the parameter `code`."""
    for keyword in call.keywords:
        if keyword.arg == "code":
            return keyword.value
    return call.args[position] if len(call.args) > position else None


def literals(value: ast.AST, tree: ast.Module, seen: frozenset[str] = frozenset()) -> Iterator[str]:
    """The texts that an expression may be."""
    match value:
        case ast.Constant(value=str(text)) if SHAPE.match(text):
            yield text
        case ast.IfExp(body=body, orelse=other):
            yield from literals(body, tree, seen)
            yield from literals(other, tree, seen)
        case ast.BoolOp(values=values) | ast.Tuple(elts=values) | ast.List(elts=values):
            for item in values:
                yield from literals(item, tree, seen)
        case ast.Dict(values=values):
            for item in values:
                yield from literals(item, tree, seen)
        case ast.Call(func=ast.Attribute(value=ast.Name() as table, attr="get"), args=args):
            for item in (table, *args[1:]):
                yield from literals(item, tree, seen)
        case ast.Subscript(value=ast.Name() as table):
            yield from literals(table, tree, seen)
        case ast.Name(id=name) if name not in seen:
            for bound in bindings(tree, name):
                yield from literals(bound, tree, seen | {name})


def bindings(tree: ast.Module, name: str) -> Iterator[ast.AST]:
    """Whatever is assigned to a name in a file: by '=', by 'for' over a literal, as one of several."""
    for node in ast.walk(tree):
        pairs: list[tuple[ast.AST, ast.AST]] = []
        if isinstance(node, ast.Assign):
            pairs = [(target, node.value) for target in node.targets]
        elif isinstance(node, ast.AnnAssign | ast.NamedExpr) and node.value is not None:
            pairs = [(node.target, node.value)]
        elif isinstance(node, ast.For) and isinstance(node.iter, ast.Tuple | ast.List):
            pairs = [(node.target, item) for item in node.iter.elts]
        for target, value in pairs:
            if isinstance(target, ast.Name) and target.id == name:
                yield value
            elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                for one, item in zip(target.elts, value.elts, strict=False):
                    if isinstance(one, ast.Name) and one.id == name:
                        yield item


def choosing(tree: ast.Module) -> set[int]:
    """Ids of the return statements of functions that choose a code, which are named so."""
    functions = (n for n in ast.walk(tree) if isinstance(n, Function) and n.name.strip("_") == "code")
    return {id(node) for function in functions for node in ast.walk(function) if isinstance(node, ast.Return)}


def collect(package: Path = PACKAGE) -> tuple[dict[str, list[str]], list[str]]:
    """(code -> places that raise it, places whose code cannot be told)."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(package.rglob("*.py"))}
    defined = {name: place for tree in trees.values() for name, place in positions(tree).items()}
    everywhere = {name: place for name, place in defined.items() if not name.startswith("_")} | {"Problem": 0}
    found: dict[str, list[str]] = defaultdict(list)
    unknown = []
    for path, tree in trees.items():
        takes = everywhere | positions(tree)  # two files may have functions of the same name
        for node in ast.walk(tree):
            place = f"{path.relative_to(package.parent)}:{getattr(node, 'lineno', 0)}"
            value = None
            if isinstance(node, ast.Call):
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                value = passed(node, takes[name]) if name in takes else None
            elif isinstance(node, ast.Return) and id(node) in choosing(tree):
                value = node.value
            if value is None or getattr(value, "value", None) == "":  # no problem, only its place
                continue
            codes = set(literals(value, tree))
            for code in codes:
                found[code].append(place)
            handed_on = "code" in (getattr(value, "id", ""), getattr(value, "attr", ""))
            if not codes and not handed_on:
                unknown.append(place)
    return dict(sorted(found.items())), unknown


if __name__ == "__main__":
    for known, places in collect()[0].items():
        print(f"{known:24} {', '.join(places)}")
