"""Layers that are made alike: what was found in one of them is found again in the others, and checked."""

from __future__ import annotations

from torch import nn

from adapterkit.model import linear
from adapterkit.model.blueprint import Slot
from adapterkit.model.scope import Draft, Here
from adapterkit.model.walk import child, plain


def alike(first: nn.Module, other: nn.Module, twins: dict[int, nn.Module]) -> bool:
    """Whether two modules have the same classes under the same names, all the way down.

    Args: twins: modules of the first -> their places in the other; one that has two names needs two there.
    """
    if type(first) is not type(other) or twins.setdefault(id(first), other) is not other:
        return False
    own, theirs = first._modules, other._modules
    if own.keys() != theirs.keys():
        return False
    for name, module in own.items():
        twin = theirs[name]
        if module is None or twin is None:
            if module is not twin:
                return False
        elif not alike(module, twin, twins):
            return False
    return True


class Pattern:
    """What binding has found in one layer."""

    def __init__(self, here: Here, found: Draft) -> None:
        self.layer = here.root
        self.found = found
        start = len(here.address)
        self.slots = [(self._below(here, slot), slot.address[start:], slot) for slot in found.slots.values()]
        self.places = [(self._below(here, p), p.address[start:], p) for p in found.places.values()]
        self.looked = [
            (path[len(here.path) + 1 :] or ".", name, value) for (path, name), value in found.looked.items()
        ]
        self.facts = [
            (table, at[start:], value)
            for table in ("sizes", "head_dims", "scales", "without")
            for at, value in getattr(found, table).items()
            if at.startswith(f"{here.address}.")
        ]

    def _below(self, here: Here, slot: Slot) -> str:
        return slot.path[len(here.path) + 1 :] or "."

    def again(self, here: Here) -> bool:
        """Bind another layer in the same way; False where it is not made alike, and nothing is bound then."""
        if not alike(self.layer, here.root, {}):
            return False
        for path, name, value in self.looked:
            core = child(here.root, path)
            if core is None or plain(core, name) != value:
                return False
        slots = [self._bound(here, *entry) for entry in self.slots]
        for slot in slots:
            # a role that lies in a fused host has the shape of its rows; the host is a slot as well
            if slot.rows is None and linear.shape(slot.module) != slot.shape:
                return False
        here.draft.slots |= {slot.address: slot for slot in slots}
        here.draft.places |= {p.address: p for p in (self._bound(here, *entry) for entry in self.places)}
        for table, rest, value in self.facts:
            own = (here.root, value[1]) if table == "scales" and isinstance(value, tuple) else value
            getattr(here.draft, table)[here.address + rest] = own
        return True

    def _bound(self, here: Here, below: str, rest: str, slot: Slot) -> Slot:
        module = here.root
        if below != ".":
            for part in below.split("."):
                module = module._modules[part]  # type: ignore[assignment]
        return slot.moved(
            address=here.address + rest,
            layer=here.layer,
            module=module,
            path=here.path if below == "." else f"{here.path}.{below}",
        )
