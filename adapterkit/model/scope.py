"""Where resolving stands: the model or part at hand, what was found in it, what does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from torch import nn

from adapterkit.errors import Problem, did_you_mean, listing
from adapterkit.model.blueprint import Scale, Slot
from adapterkit.model.walk import child, join, missing
from adapterkit.spec.paths import Path
from adapterkit.spec.schema import Interface
from adapterkit.spec.text import Loc

MISSING = object()
"""What a config says that has no such field."""
Question = Callable[[Any, str], Any]
"""What may be asked of a module, or of the config, under a name; the answer decides what is bound."""
ITSELF = Path(path=".")
"""What names the module at hand."""


@dataclass(frozen=True)
class Found:
    """A module that a path of the spec named."""

    module: nn.Module
    path: str
    said: Path


@dataclass
class Draft:
    """What is gathered for one stack; thrown away if an alternative does not fit."""

    slots: dict[str, Slot] = field(default_factory=dict)
    places: dict[str, Slot] = field(default_factory=dict)
    problems: dict[tuple[Loc, str], Callable[[], Problem]] = field(default_factory=dict)
    """Made only when shown: an alternative that does not fit is no error, and finding hints takes time."""
    presence: dict[tuple[Loc, str], set[bool]] = field(default_factory=dict)
    """Optional thing -> whether it was there, over all layers."""
    kernels: dict[str, Any] = field(default_factory=dict)
    eager: dict[str, str | None] = field(default_factory=dict)
    sizes: dict[str, tuple[int | None, int | None]] = field(default_factory=dict)
    head_dims: dict[str, tuple[int | None, int | None]] = field(default_factory=dict)
    scales: dict[str, Scale] = field(default_factory=dict)
    without: dict[str, Mapping[str, str]] = field(default_factory=dict)

    def absorb(self, other: Draft) -> None:
        self.slots |= other.slots
        self.places |= other.places
        self.problems |= {key: p for key, p in other.problems.items() if key not in self.problems}
        for key, seen in other.presence.items():
            self.presence.setdefault(key, set()).update(seen)
        self.kernels |= other.kernels
        self.eager |= other.eager
        self.sizes |= other.sizes
        self.head_dims |= other.head_dims
        self.scales |= other.scales
        self.without |= other.without


class Scope:
    """One model with one interface: the whole model, or a part of it."""

    def __init__(
        self, interface: Interface, model: nn.Module, path: str, prefix: str, by_default: bool
    ) -> None:
        self.interface = interface
        self.model = model
        self.path = path
        self.prefix = prefix
        self.by_default = by_default
        self.config = getattr(model, "config", None)
        self.base, self.base_path = _base_of(model, path, interface.base)
        self.classes = {cls.__name__ for cls in chain(type(model).__mro__, type(self.base).__mro__)}

    def sub_config(self, name: str | None) -> Any:
        # a tower that stands alone has its own config as the model's config
        found = self.config
        for part in name.split(".") if name else ():
            found = getattr(found, part, None)
        return self.config if found is None else found


def _base_of(model: nn.Module, path: str, said: Path | None) -> tuple[nn.Module, str]:
    """The model without its head, and its path: what transformers calls `base_model`."""
    for name in said.names() if said is not None else ():
        found = child(model, name)
        if found is not None:
            return found, join(path, name)
    prefix = getattr(model, "base_model_prefix", None)
    inner = model._modules.get(prefix) if isinstance(prefix, str) and prefix else None
    return (inner, join(path, str(prefix))) if inner is not None else (model, path)


@dataclass(frozen=True)
class Here:
    """A place in the model and in the spec: paths are looked up below `root`, problems noted at `loc`."""

    scope: Scope
    draft: Draft
    root: nn.Module
    path: str
    config: Any
    loc: Loc
    stack: str = ""
    address: str = ""
    """The stack, or the layer, or the sublayer that is bound."""
    layer: int | None = None
    sublayer: str | None = None
    batch: str | None = None
    asked: dict[tuple[str | None, Question, str], Any] = field(default_factory=dict)
    """(path of a module, None: the config; question, name) -> the answer, for all that was asked."""

    def at(self, *words: str | int) -> Here:
        """The same place in the model, further down in the spec."""
        return self.moved(loc=(*self.loc, *words))

    def drafting(self, draft: Draft) -> Here:
        """The same place, gathering elsewhere."""
        return self.moved(draft=draft)

    def moved(self, **changes: Any) -> Here:
        """As `dataclasses.replace`, several times faster: every sublayer is a place of its own."""
        there = object.__new__(Here)
        there.__dict__.update(self.__dict__, **changes)
        return there

    def note(self, code: str, message: str, expected: str = "", hint: str = "", *, words: Loc = ()) -> None:
        self.note_lazily(code, lambda: (message, expected, hint), words=words)

    def note_lazily(self, code: str, facts: Callable[[], tuple[str, str, str]], *, words: Loc = ()) -> None:
        """Note a problem at `loc`, or at words below it; `facts` are (message, expected, hint)."""
        loc = (*self.loc, *words)
        # the same fact on every layer is one problem
        self.draft.problems.setdefault(
            (loc, code), lambda: _problem(self.scope.interface, loc, code, *facts())
        )

    def ask(self, module: nn.Module, path: str, question: Question, name: str = "") -> Any:
        """The answer of a module."""
        answer = self.asked[path, question, name] = question(module, name)
        return answer

    def setting(self, name: str) -> Any:
        """What the config has under a name; MISSING too if it differs from layer to layer."""
        answer = self.asked[None, setting, name] = setting(self.config, name)
        return answer

    def holds(self, when: Mapping[str, Any] | None) -> bool:
        """Whether every field of `when` has its value in the config."""
        for name, value in (when or {}).items():
            actual = self.setting(name)
            if actual is MISSING:
                known = sorted(key for key in getattr(self.config, "__dict__", ()) if not key.startswith("_"))
                fact, fields = f"the config has no field {name!r}", f"fields: {listing(known)}"
                self.note("unknown-config-field", fact, fields, did_you_mean(name, known), words=("when",))
                return False
            if actual != value or isinstance(actual, bool) != isinstance(value, bool):
                return False
        return True

    def unexpected(self, what: str, when: Mapping[str, Any] | None) -> None:
        if ((*self.loc, "when"), "unknown-config-field") in self.draft.problems:
            return  # what the config says is not known
        values = ", ".join(f"{key}: {json.dumps(value)}" for key, value in (when or {}).items())
        self.note("present", f"{what} exists although the config does not say {values}", words=("when",))

    def find(self, said: Path | None, *words: str | int) -> Found | None:
        """The module that a path of the spec names below `root`; problems are noted."""
        if said is None:
            return None
        if said.plain:
            module = child(self.root, said.plain)
            if module is not None:
                return Found(module, join(self.path, said.plain), said)
        return self.at(*words)._find(said)

    def _find(self, said: Path) -> Found | None:
        wanted = said.when is None or self.holds(said.when)
        options = said.any_of or (said,)
        found = []
        for option in options:
            if option is not said and option.when is not None and not self.holds(option.when):
                continue
            module = child(self.root, str(option.path))
            if module is not None:
                found.append(Found(module, join(self.path, str(option.path)), said))
        if said.optional is not None and wanted:
            self.draft.presence.setdefault((self.loc, str(self.loc[-1])), set()).add(bool(found))
        if not wanted:
            if found and said.otherwise is None:
                self.unexpected(repr(found[0].path), said.when)
            return None
        if len({id(f.module) for f in found}) > 1:
            self.note(
                "ambiguous",
                f"more than one alternative exists: {listing(f.path for f in found)}",
                "expected exactly one",
            )
            return None
        if not found and said.optional is None:
            self.note_lazily("path-not-found", lambda: _not_found(self.root, self.path, options))
        return found[0] if found else None


def setting(config: Any, name: str) -> Any:
    """What a config has under a name, else MISSING."""
    try:
        return getattr(config, name, MISSING)
    except RuntimeError:  # such a config refuses to give one value for all layers
        return MISSING


def _problem(
    interface: Interface, loc: Loc, code: str, message: str, expected: str = "", hint: str = ""
) -> Problem:
    mark = interface.mark(loc)
    place = {"file": mark.file, "line": mark.line, "column": mark.column} if mark else {}
    return Problem(code, message, ".".join(map(str, loc)), expected, hint, **place)  # type: ignore[arg-type]


def _not_found(root: nn.Module, at: str, options: Sequence[Path]) -> tuple[str, str, str]:
    """(fact, expected, hint) about a path that does not exist."""
    fact, expected, hint = missing(root, str(options[0].path), at)
    tried = f"none of {listing(repr(o.path) for o in options)} exists; " if len(options) > 1 else ""
    return tried + fact, expected, hint
