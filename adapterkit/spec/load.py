"""Parsed text -> Interface: `like` is followed, words are checked, every problem has its place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from adapterkit.errors import Problem, SpecError, did_you_mean, listing
from adapterkit.spec.schema import Interface
from adapterkit.spec.text import Document, Loc, Mark

Find = Callable[[str], Document | None]
"""Name of an interface -> its document, None if there is none."""


def _at(mark: Mark | None) -> dict[str, Any]:
    return {"file": mark.file, "line": mark.line, "column": mark.column} if mark else {}


def _dotted(loc: Loc) -> str:
    return ".".join(str(part) for part in loc)


def _merge(base: Document, over: Document) -> Document:
    """`over` on top of `base`: maps merge, lists, alternatives and plain values are replaced, null removes."""
    marks: dict[Loc, Mark] = {}
    keys: dict[Loc, Mark] = {}

    def take(source: Document, old: Loc, new: Loc, value: Any) -> Any:
        """Copy a whole value together with its places."""
        for table, target in ((source.marks, marks), (source.keys, keys)):
            if old in table:
                target[new] = table[old]
        if isinstance(value, dict):
            return {key: take(source, (*old, key), (*new, key), item) for key, item in value.items()}
        if isinstance(value, list):
            return [take(source, (*old, i), (*new, i), item) for i, item in enumerate(value)]
        return value

    def join(low: dict[str, Any], high: dict[str, Any], loc: Loc) -> dict[str, Any]:
        if loc in over.marks:
            marks[loc] = over.marks[loc]
        if loc in over.keys:
            keys[loc] = over.keys[loc]
        result = {}
        for key in (*low, *(key for key in high if key not in low)):
            here = (*loc, key)
            if key not in high:
                result[key] = take(base, here, here, low[key])
            elif high[key] is None and low.get(key) is not None:
                continue
            elif _mergeable(low.get(key), high[key]):
                result[key] = join(low[key], high[key], here)
            else:
                result[key] = take(over, here, here, high[key])
        return result

    return Document(join(base.data, over.data, ()), marks, keys)


def _mergeable(low: Any, high: Any) -> bool:
    return isinstance(low, dict) and isinstance(high, dict) and not {"any_of", "path"} & (low.keys() | high.keys())


def _subtree(document: Document, loc: Loc, value: Any, new: Loc) -> Document:
    """A document that holds `value` of `document` alone, moved to `new`."""
    data: Any = value
    for part in reversed(new):
        data = {part: data}
    size = len(loc)
    move = lambda table: {(*new, *k[size:]): m for k, m in table.items() if k[:size] == loc}  # noqa: E731
    return Document(data, move(document.marks), move(document.keys))


def _follow_like(document: Document, find: Find, seen: tuple[str, ...] = ()) -> Document:
    """Put the interface named by `like` under this one, to any depth; cycles are refused."""
    name = document.data.get("like")
    if name is None:
        return document
    place = _at(document.mark(("like",)))
    if not isinstance(name, str):
        raise SpecError(Problem("wrong-type", "'like' takes the name of one interface", "like", **place))
    if name in seen:
        circle = " -> ".join((*seen[seen.index(name) :], name))
        raise SpecError(Problem("like-cycle", f"'like' goes in a circle: {circle}", "like", **place))
    parent = find(name)
    if parent is None:
        raise SpecError(Problem("unknown-interface", f"there is no interface {name!r}", "like", **place))
    parent = _follow_like(parent, find, (*seen, name))
    only = document.data.get("only")
    # identity of the parent is not inherited
    kept = {key: value for key, value in parent.data.items() if key not in ("model_type", "source", "like", "only")}
    if isinstance(only, list) and isinstance(kept.get("stacks"), dict):
        for stack in only:
            if stack not in kept["stacks"]:
                problem = Problem(
                    "unknown-stack",
                    f"'only' names {stack!r}, which is no stack of {name!r}",
                    "only",
                    f"stacks there: {listing(kept['stacks'])}",
                    did_you_mean(str(stack), kept["stacks"]),
                    **_at(document.mark(("only",))),
                )
                raise SpecError(problem)
        kept["stacks"] = {stack: value for stack, value in kept["stacks"].items() if stack in only}
    return _merge(Document(kept, parent.marks, parent.keys), document)


def _copy_siblings(document: Document) -> Document:
    """Stacks with `like: sibling` take the sibling's words under their own."""
    stacks = document.data.get("stacks")
    if not isinstance(stacks, dict):
        return document
    for name in stacks:
        chain = [name]
        while isinstance(stack := document.data["stacks"].get(chain[-1]), dict) and stack.get("like") is not None:
            sibling = stack["like"]
            place = _at(document.mark(("stacks", chain[-1], "like")))
            address = _dotted(("stacks", chain[-1], "like"))
            if sibling in chain:
                circle = " -> ".join([*chain, sibling])
                raise SpecError(Problem("like-cycle", f"'like' goes in a circle: {circle}", address, **place))
            if sibling not in stacks:
                hint = did_you_mean(str(sibling), stacks)
                message = f"there is no stack {sibling!r} in this file"
                raise SpecError(Problem("unknown-stack", message, address, f"stacks: {listing(stacks)}", hint, **place))
            chain.append(sibling)
        for low, high in zip(reversed(chain[1:]), reversed(chain[:-1]), strict=True):
            # a sibling that was completed before has no 'like' any more, so nothing is done twice
            base = _subtree(document, ("stacks", low), document.data["stacks"][low], ("stacks", high))
            own = {key: value for key, value in document.data["stacks"][high].items() if key != "like"}
            over = _subtree(document, ("stacks", high), own, ("stacks", high))
            joined = _merge(base, over)
            data = {**document.data, "stacks": {**document.data["stacks"], high: joined.data["stacks"][high]}}
            outside = lambda k, high=high: k[:2] != ("stacks", high)  # noqa: E731
            marks = {k: m for k, m in document.marks.items() if outside(k)} | joined.marks
            keys = {k: m for k, m in document.keys.items() if outside(k)} | joined.keys
            document = Document(data, marks, keys)
    return document


_CODES = {
    "extra_forbidden": "unknown-word",
    "missing": "missing-word",
    "literal_error": "wrong-value",
    "none_required": "reserved-word",
}


def _words_at(loc: Loc) -> list[str]:
    """Words the schema knows in the map at `loc`."""
    model: Any = Interface
    for part in loc:
        if isinstance(part, int):
            continue
        field = getattr(model, "model_fields", {}).get(part)
        model = _model_in(field.annotation) if field is not None else model
        if model is None:
            return []
    return list(getattr(model, "model_fields", {}))


def _model_in(annotation: Any) -> Any:
    """The model class inside an annotation such as `dict[Name, Stack] | None`."""
    if hasattr(annotation, "model_fields"):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _model_in(argument)
        if found is not None:
            return found
    return None


def _problem(error: Mapping[str, Any], document: Document) -> Problem:
    """One pydantic error as a problem with its place."""
    # our errors name their code themselves; loc parts that pydantic adds (no data there) are cut
    loc: Loc = tuple(part for part in error["loc"] if part != "[key]")
    kind = error["type"]
    code = _CODES.get(kind) or (kind.replace("_", "-") if "text" in error.get("ctx", {}) else "wrong-type")
    message, expected, hint = error["msg"], "", ""
    if code == "unknown-word":
        words = _words_at(loc[:-1])
        message = f"{str(loc[-1])!r} is not a word of the language here"
        expected, hint = f"words here: {listing(words, 24)}", did_you_mean(str(loc[-1]), words)
    elif kind == "missing":
        message = f"{str(loc[-1])!r} is missing"
    elif code == "wrong-value":
        message, expected = f"{error['input']!r} is not a value of {str(loc[-1])!r}", error["msg"].replace("Input", "it")
    elif code == "reserved-word":
        message = f"{str(loc[-1])!r} is reserved for a later version of the language"
    elif code == "wrong-type":
        shown = repr(error["input"])
        message, expected = f"{shown[:80]} has the wrong type", error["msg"].replace("Input should be", "expected")
    place = _at(document.mark(loc, key=code in ("unknown-word", "reserved-word") or error["loc"][-1:] == ("[key]",)))
    return Problem(code, message, _dotted(loc), expected, hint, **place)


def build(document: Document, find: Find, name: str = "") -> Interface:
    """The interface that `document` describes. `find` looks up what `like` names; `name` is its own, for cycles.

    Raises: SpecError with all problems of the file.
    """
    version = document.data.get("adapterkit")
    if isinstance(version, int) and not isinstance(version, bool) and version > 1:
        message = f"written in version {version} of the language; this adapterkit reads version 1"
        place = _at(document.mark(("adapterkit",)))
        raise SpecError(Problem("newer-language", message, "adapterkit", hint="update adapterkit", **place))
    whole = _copy_siblings(_follow_like(document, find, (name,) if name else ()))
    try:
        interface = Interface.model_validate(whole.data)
    except ValidationError as error:
        raise SpecError(_problem(item, whole) for item in error.errors(include_url=False)) from None
    interface._document = whole
    return interface
