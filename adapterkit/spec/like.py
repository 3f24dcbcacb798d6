"""`like`: one interface, or one stack, as a copy of another with changes on top."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapterkit.errors import Problem, SpecError, did_you_mean, listing
from adapterkit.spec.text import Document, Loc, Mark

Find = Callable[[str, str], Document]
"""Name of an interface and the file that names it -> the document of that name. Raises SpecError."""

_OWN = ("model_type", "source", "like", "only", "tiny")
"""Words that say which interface this is; they are not copied."""


def expand(document: Document, find: Find) -> tuple[Document, list[Problem]]:
    """The document with everything that it copies written out, and what is wrong with its `like`s."""
    problems: list[Problem] = []
    whole = _copy_siblings(_follow(document, find, (document,), problems), problems)
    return whole, problems


def _follow(document: Document, find: Find, chain: tuple[Document, ...], problems: list[Problem]) -> Document:
    """Put the interface that `like` names under this one, to any depth."""
    problems += document.problems
    name = document.data.get("like")
    if not isinstance(name, str):
        return document  # absent, or of a wrong type, which the schema says
    try:
        parent = find(name, document.file)
    except SpecError as error:
        here = document.problem(("like",), "", "")
        problems += [
            found
            if found.file
            else replace(found, address="like", file=here.file, line=here.line, column=here.column)
            for found in error.problems
        ]
        return document
    if any(parent.file == seen.file for seen in chain):
        names = [Path(seen.file).stem for seen in (*chain, parent)]
        circle = " -> ".join(names[names.index(names[-1]) :])
        # said where the one who asked can see it, not where the circle closes
        problems.append(chain[0].problem(("like",), "like-cycle", f"'like' goes in a circle: {circle}"))
        return document
    parent = _follow(parent, find, (*chain, parent), problems)
    kept = {key: value for key, value in parent.data.items() if key not in _OWN}
    only, stacks = document.data.get("only"), kept.get("stacks")
    if isinstance(only, list) and isinstance(stacks, dict):
        # a stack that is kept may copy one that is not
        parent = _copy_siblings(parent, problems)
        stacks = parent.data["stacks"]
        for i, stack in enumerate(only):
            if isinstance(stack, str) and stack not in stacks:
                message = f"'only' names {stack!r}, which is no stack of {name!r}"
                hint = did_you_mean(stack, stacks)
                expected = f"stacks there: {listing(stacks)}"
                problems.append(document.problem(("only", i), "unknown-stack", message, expected, hint))
        kept["stacks"] = {stack: value for stack, value in stacks.items() if stack in only}
    return _merge(replace(parent, data=kept), document)


def _copy_siblings(document: Document, problems: list[Problem]) -> Document:
    """Stacks with `like: sibling` take the sibling's words under their own."""
    stacks = document.data.get("stacks")
    if not isinstance(stacks, dict):
        return document
    for name in stacks:
        chain = _chain(document, name, problems)
        for low, high in zip(reversed(chain[1:]), reversed(chain[:-1]), strict=True):
            document = _copy_stack(document, low, high)
    return document


def _chain(document: Document, name: str, problems: list[Problem]) -> list[str]:
    """The stack, the sibling it copies, the one that this one copies, and so on."""
    stacks = document.data["stacks"]
    chain = [name]
    while isinstance(stack := stacks[chain[-1]], dict) and isinstance(sibling := stack.get("like"), str):
        loc = ("stacks", chain[-1], "like")
        if sibling in chain:
            circle = " -> ".join([*chain[chain.index(sibling) :], sibling])
            problems.append(document.problem(loc, "like-cycle", f"'like' goes in a circle: {circle}"))
            return chain[:1]
        if sibling not in stacks:
            message, hint = f"there is no stack {sibling!r} in this file", did_you_mean(sibling, stacks)
            problems.append(
                document.problem(loc, "unknown-stack", message, f"stacks: {listing(stacks)}", hint)
            )
            return chain
        chain.append(sibling)
    return chain


def _copy_stack(document: Document, low: str, high: str) -> Document:
    """The document with stack `low` written out under the words of stack `high`, whose `like` is done."""
    stacks, here = document.data["stacks"], ("stacks", high)
    if not isinstance(stacks[low], dict):
        return document
    own = {key: value for key, value in stacks[high].items() if key != "like"}
    base = _only(document, ("stacks", low), stacks[low], here)
    joined = _merge(base, _only(document, here, own, here))
    data = {**document.data, "stacks": {**stacks, high: joined.data["stacks"][high]}}
    return replace(document, data=data, marks=document.marks | joined.marks, keys=document.keys | joined.keys)


def _only(document: Document, loc: Loc, value: Any, new: Loc) -> Document:
    """A document that holds `value`, which stands at `loc`, alone; moved to `new`."""
    data: Any = value
    for part in reversed(new):
        data = {part: data}
    size = len(loc)

    def moved(table: dict[Loc, Mark]) -> dict[Loc, Mark]:
        return {(*new, *at[size:]): mark for at, mark in table.items() if at[:size] == loc}

    return Document(data, moved(document.marks), moved(document.keys), document.file)


def _merge(base: Document, over: Document) -> Document:
    """`over` on top of `base`: maps merge; lists, alternatives and values are replaced; null removes."""
    gone: set[Loc] = set()  # what `over` replaces or removes

    def join(low: dict[str, Any], high: dict[str, Any], loc: Loc) -> dict[str, Any]:
        result = dict(low)
        for key, value in high.items():
            here = (*loc, key)
            if key == "embeddings" and loc[:-1] == ("stacks",) and isinstance(low.get(key), str):
                low = {**low, key: {"table": low[key], "out": low[key]}}  # what the short form stands for
            if value is None and low.get(key) is not None:
                gone.add(here)
                del result[key]
            elif _mergeable(low.get(key), value):
                result[key] = join(low[key], value, here)
            else:
                gone.add(here)
                result[key] = value
        return result

    def left(table: dict[Loc, Mark], own: dict[Loc, Mark]) -> dict[Loc, Mark]:
        """Places in `base` of what is left of it, and those in `over`."""
        dropped, kept = set(gone), {}
        for at, mark in table.items():  # what holds a value stands before it; of a list, only in its marks
            if at in dropped or at[:-1] in dropped or at[:-2] in dropped:
                dropped.add(at)
            else:
                kept[at] = mark
        return kept | own

    data = join(base.data, over.data, ())
    return Document(data, left(base.marks, over.marks), left(base.keys, over.keys), over.file)


def _mergeable(low: Any, high: Any) -> bool:
    return (
        isinstance(low, dict)
        and isinstance(high, dict)
        and not {"any_of", "path"} & (low.keys() | high.keys())
    )
