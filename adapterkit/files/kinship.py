"""Whether a file of adapterkit was made for the family of models that it is loaded into.

Addresses and shapes of one family may fit another by chance: their numbers would mean nothing there. A family
is what one interface describes. Where names of interfaces differ, types of models decide: files may be older
than an interface that is divided, and a user may describe a known type anew. What says nothing of itself, as
an interface by hand for a model without a type does, is compared by addresses and shapes alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from adapterkit.errors import FileFormatError, Problem, ResolveError, SpecError, listing
from adapterkit.model.blueprint import Blueprint
from adapterkit.model.resolve import locate
from adapterkit.spec import registry
from adapterkit.spec.schema import Interface

CUSTOM = "custom"
"""What an interface is called that has no name."""


def type_of(model: nn.Module) -> str | None:
    """The type of a model, or of the one that it wraps; None if it has none."""
    try:
        inner, _ = locate(model)
    except ResolveError:
        return None
    config: Any = inner.config
    return str(config.model_type) or None


def describe(blueprint: Blueprint) -> dict[str, Any]:
    """What a file says of the family: its interface, the type of the model, and the interfaces of parts."""
    said: dict[str, Any] = {
        "name": blueprint.interface_name,
        "hash": registry.digest(blueprint.interface),
        "model_type": type_of(blueprint.model),
    }
    parts = {
        part: {"name": registry.name_of(spec) or CUSTOM, "model_type": list(spec.model_type or ())}
        for part, spec in _parts(blueprint).items()
    }
    return {**said, "parts": parts} if parts else said


def check(facts: Mapping[str, Any], addresses: Iterable[str], blueprint: Blueprint, file: str) -> None:
    """Refuse a file that was made for another family. Those of other libraries say nothing of interfaces.

    Args: facts: the config of the file. addresses: of what it adapts.
    Raises: FileFormatError.
    """
    said = facts.get("interface")
    if facts.get("format") != "adapterkit" or said is None:
        return
    base = facts.get("base_model") or {}
    if not isinstance(said, Mapping) or not isinstance(base, Mapping):
        raise FileFormatError(Problem("bad-file", "'interface' or 'base_model' is no map", file=file))
    own = _words(type_of(blueprint.model))
    problems = _differences("", said, _words(base.get("model_type")), blueprint.interface, own, file)
    parts, theirs = _parts(blueprint), said.get("parts")
    for part in sorted({address.rpartition("/")[0] for address in addresses} & parts.keys()):
        other = theirs.get(part) if isinstance(theirs, Mapping) else None
        if isinstance(other, Mapping):
            problems += _differences(part, other, set(), parts[part], set(), file)
    if problems:
        raise FileFormatError(problems)


def check_travelled(data: Mapping[str, Any], model: nn.Module, file: str) -> None:
    """Refuse an interface that came with a file, for types of models of which this one is none.

    Raises: FileFormatError.
    """
    said, base, here = data["interface"], data.get("base_model"), type_of(model)
    theirs = _types(said) | _words(base.get("model_type") if isinstance(base, Mapping) else None)
    if here is not None and theirs and here not in theirs:
        raise FileFormatError(_problem("", said, theirs, {here}, file))


def _parts(blueprint: Blueprint) -> dict[str, Interface]:
    """Parts of a model made of models, by the start of their addresses."""
    stacks = blueprint.stacks.items()
    return {address.rpartition("/")[0]: info.interface for address, info in stacks if "/" in address}


def _words(said: Any) -> set[str]:
    """A word, or the words of a list."""
    return {word for word in (said if isinstance(said, list) else [said]) if isinstance(word, str)}


def _types(said: Mapping[str, Any]) -> set[str]:
    """Types of models that the interface of a file is for, as far as it says so or is known here."""
    types, spec = _words(said.get("model_type")), said.get("spec")
    if isinstance(spec, Mapping):
        return types | _words(spec.get("model_type"))
    try:
        return types | set(registry.by_name(str(said.get("name"))).model_type or ())
    except SpecError:
        return types


def _differences(
    part: str, said: Mapping[str, Any], known: set[str], spec: Interface, own: set[str], file: str
) -> list[Problem]:
    """The problem where the interface of a file, and all types that it is for, are others than here.

    Args: known: types of the model that the file was made for. own: types of this model.
    """
    name = registry.name_of(spec)
    theirs, ours = known | _types(said), own | set(spec.model_type or ())
    if said.get("name") == name or not theirs or not ours or theirs & ours:
        return []
    return [_problem(part, said, theirs, {name} if name else ours, file)]


def _problem(part: str, said: Mapping[str, Any], theirs: set[str], here: set[str], file: str) -> Problem:
    named = said.get("name", CUSTOM) != CUSTOM
    made = f"the interface {said['name']!r}" if named else f"models of type {listing(sorted(theirs))}"
    message = f"made for {made}; here it is {listing(sorted(here))}"
    expected = "a model of that family, or interface=... by hand for one of it under another type"
    return Problem("other-model", message, part, expected, file=file)
