"""What an interface means on a model: facts that depend neither on its wording nor on its names of stacks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from adapterkit.methods.flow import entry_place
from adapterkit.model.blueprint import Blueprint, Slot, StackInfo

_KNOWN = frozenset({"q", "k", "v", "o", "gate", "up", "down", "fused"})

Facts = dict[tuple[str, ...], Any]


@dataclass(frozen=True)
class Difference:
    """One fact that two interfaces of a model do not share."""

    where: str
    one: Any
    other: Any

    def __str__(self) -> str:
        return f"{self.where}: {self.one} | {self.other}"


def facts(blueprint: Blueprint) -> Facts:
    """Every fact: a layer is known by its path, a stack by that of its first layer."""
    found: Facts = {}
    for slot in blueprint.slots.values():
        found[_key(blueprint, slot)] = (slot.path, slot.rows, slot.batch)
    for place in blueprint.places.values():
        if place.layer is not None:
            found[_key(blueprint, place)] = place.path
    for info in blueprint.stacks.values():
        found |= _stack(blueprint, info)
    for head in blueprint.heads:
        found["head", head.path] = True
    return found


def compare(one: Blueprint, other: Blueprint) -> tuple[int, int, list[Difference]]:
    """(facts that are equal, all facts, those that differ)."""
    left, right = facts(one), facts(other)
    keys = dict.fromkeys((*left, *right))
    differing = [key for key in keys if left.get(key) != right.get(key)]
    found = [Difference(".".join(key), left.get(key), right.get(key)) for key in differing]
    return len(keys) - len(differing), len(keys), found


def summary(found: list[Difference]) -> list[str]:
    """Differences with the layers put together."""
    lines = (re.sub(r"\.\d+(?=[.:',\s]|$)", ".*", str(one)) for one in found)
    return list(dict.fromkeys(lines))


def _key(blueprint: Blueprint, slot: Slot) -> tuple[str, ...]:
    """A slot by its layer, sublayer and role; one with a name of its own by its module."""
    role = slot.address.rpartition(".")[2] if slot.role in _KNOWN else ""
    if slot.layer is None:
        return (
            _first_layer(blueprint, slot.stack),
            slot.role if slot.shape is None else f"extra {slot.path}",
        )
    layer = blueprint.places[f"{slot.stack}.{slot.layer}.layer"].path
    inside = slot.address.removeprefix(f"{slot.stack}.{slot.layer}.")
    if slot.shape is not None and not role:
        return (layer, str(slot.sublayer), f"extra {slot.path}")
    return (layer, inside)


def _first_layer(blueprint: Blueprint, stack: str) -> str:
    return blueprint.places[f"{stack}.0.layer"].path


def _stack(blueprint: Blueprint, info: StackInfo) -> Facts:
    """What holds for a stack as a whole."""
    address = info.address
    first = _first_layer(blueprint, address)
    found: Facts = {
        (first, "layers"): info.num_layers,
        (first, "parallel"): info.parallel,
        (first, "entry"): entry_place(blueprint, address).path,
        (first, "exit"): _exit(blueprint, info),
    }
    for word in ("embeddings.table", "embeddings.out", "final_norm", "pooler", "position_bias"):
        place = blueprint.places.get(f"{address}.{word}")
        if place is not None:
            found[first, word] = place.path
    for word, value in info.inputs.model_dump().items():
        found[first, f"inputs.{word}"] = value
    if info.reads is not None:
        read = address.rpartition("/")[0]
        read = f"{read}/{info.reads.stack}" if read else info.reads.stack
        found[first, "reads"] = (
            _first_layer(blueprint, read) if read in blueprint.stacks else read,
            info.reads.states,
            info.reads.mask,
        )
    for sublayer, sizes in info.sizes.items():
        if "." not in sublayer:
            found[first, f"{sublayer}.sizes"] = sizes
    return found


def _exit(blueprint: Blueprint, info: StackInfo) -> str:
    for word in ("exit", "final_norm"):
        place = blueprint.places.get(f"{info.address}.{word}")
        if place is not None:
            return place.path
    return blueprint.places[f"{info.address}.{info.num_layers - 1}.layer"].path
