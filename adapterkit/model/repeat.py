"""Layers that are made alike: what was found in one is found again in the others, here and in later models.

What binding finds in a layer is decided by the interface, by the classes and names of its modules, and by
what was asked of the config and of the modules. The first two are the key under which it is remembered, the
last is asked again.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import nn

from adapterkit.model.bind import bind_layer
from adapterkit.model.blueprint import Slot
from adapterkit.model.scope import Draft, Here
from adapterkit.model.walk import child
from adapterkit.spec.schema import Stack

_TABLES = ("sizes", "head_dims", "scales", "without")
_ANYONE = nn.Identity()
"""In a slot that is remembered, which must not keep a model alive."""


def outline(module: nn.Module) -> tuple[tuple[Any, ...], list[nn.Module]]:
    """The classes and names of a module and of all below it, and these modules in the same order.

    One that has two places is a number at the second: which of them it is.
    """
    form: list[Any] = []
    modules: list[nn.Module] = []
    met: dict[int, int] = {}

    def walk(module: nn.Module) -> None:
        number = met.setdefault(id(module), len(modules))
        if number < len(modules):
            form.append(number)
            return
        modules.append(module)
        form.append(type(module))
        for name, below in module._modules.items():
            form.append(name)
            if below is None:
                form.append(None)
            else:
                walk(below)
        form.append(())  # the end of its children

    walk(module)
    return tuple(form), modules


class Pattern:
    """What binding has found in one layer, without the layer."""

    def __init__(self, stack: Stack, here: Here, found: Draft, modules: list[nn.Module]) -> None:
        self.stack = stack
        """The key has its id, which is its own only as long as it is there."""
        numbers = {id(module): number for number, module in enumerate(modules)}
        below, inside = len(here.path) + 1, len(here.address)

        def entries(slots: dict[str, Slot]) -> list[tuple[int, str, str, Slot]]:
            return [
                (numbers[id(s.module)], s.path[below:], s.address[inside:], s.moved(module=_ANYONE))
                for s in slots.values()
            ]

        self.slots, self.places = entries(found.slots), entries(found.places)
        self.asked = [
            (None if at is None else numbers[id(child(here.root, at[below:] or "."))], question, name, answer)
            for (at, question, name), answer in here.asked.items()
        ]
        tables = [
            (table, key, (_ANYONE, value[1]) if _is_attribute(table, value) else value)
            for table in _TABLES
            for key, value in getattr(found, table).items()
        ]
        start = f"{here.address}."
        self.facts = [(t, key[inside:], value) for t, key, value in tables if key.startswith(start)]
        self.common = Draft(presence=found.presence, kernels=found.kernels, eager=found.eager)
        for table, key, value in tables:
            if not key.startswith(start):
                getattr(self.common, table)[key] = value

    def fits(self, here: Here, modules: list[nn.Module], *, anew: bool) -> bool:
        """Whether binding would find the same. Args: anew: the config has not been asked yet."""
        for number, question, name, answer in self.asked:
            if anew or number is not None:
                found = question(here.config if number is None else modules[number], name)
                if found != answer or type(found) is not type(answer):  # 1 is no True
                    return False
        return True

    def bind(self, here: Here, modules: list[nn.Module]) -> None:
        """Bind a layer in the same way."""
        draft = here.draft
        for entries, into in ((self.slots, draft.slots), (self.places, draft.places)):
            for number, below, inside, slot in entries:
                address = here.address + inside
                into[address] = slot.moved(
                    address=address,
                    stack=here.stack,
                    layer=here.layer,
                    module=modules[number],
                    path=f"{here.path}.{below}" if below else here.path,
                )
        for table, inside, value in self.facts:
            own = (here.root, value[1]) if _is_attribute(table, value) else value
            getattr(draft, table)[here.address + inside] = own


_known: dict[Hashable, Pattern] = {}
"""The newest pattern for each stack of an interface, kind of layer and outline."""


class Layers:
    """Binds the layers of one stack, each as one that is made alike if there was one."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.met: set[Pattern] = set()
        """Patterns of layers of this model, under its config."""

    def bind(self, here: Here, kind: str | None) -> None:
        """Bind one layer; `here.root` is the layer."""
        form, modules = outline(here.root)
        key = id(self.stack), kind, form
        pattern = _known.get(key)
        if pattern is not None and pattern.stack is self.stack:
            anew = pattern not in self.met
            if pattern.fits(here, modules, anew=anew):
                if anew:
                    here.draft.absorb(pattern.common)
                    self.met.add(pattern)
                pattern.bind(here, modules)
                return
        own = here.moved(draft=Draft(), asked={})
        bind_layer(own, self.stack, kind)
        here.draft.absorb(own.draft)
        if not own.draft.problems:
            if len(_known) >= 256:
                _known.clear()
            _known[key] = pattern = Pattern(self.stack, own, own.draft, modules)
            self.met.add(pattern)


def _is_attribute(table: str, value: Any) -> bool:
    """Whether a fact is a factor that is read from a layer."""
    return table == "scales" and isinstance(value, tuple)
