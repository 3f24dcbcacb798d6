"""Which slots a method adapts: roles, layers and addresses against what the model has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapterkit.errors import ConfigError, PlanError, Problem, did_you_mean, listing
from adapterkit.model.blueprint import Blueprint, Slot
from adapterkit.spec.vocabulary import SUBLAYERS

_OWNERS = {role: ("attention", "cross_attention") for role in ("q", "k", "v", "o")} | {
    role: ("mlp",) for role in ("gate", "up", "down")
}


@dataclass(frozen=True)
class Selection:
    """Slots in the order of the model, and what was asked for and is not there."""

    slots: tuple[Slot, ...]
    missing: tuple[Problem, ...] = ()

    @classmethod
    def of(cls, slots: list[Slot], problems: Sequence[Problem] = ()) -> Selection:
        """A selection; one without slots is a problem of its own."""
        if slots or problems:
            return cls(tuple(slots), tuple(problems))
        expected = "targets and layers that meet"
        return cls((), (Problem("nothing-selected", "no slot is left to adapt", expected=expected),))


Layers = tuple[int | str, ...]
"""Layers as users name them: numbers, where a model has one stack, or addresses."""


def unknown_stacks(wanted: Iterable[str], known: Sequence[str]) -> list[Problem]:
    """A problem for each stack that a method is asked to act on and that it cannot have here."""
    return [
        Problem(
            "unknown-stack",
            f"there is no stack {name!r} for this method",
            name,
            f"one of {listing(known)}",
            did_you_mean(name, known),
        )
        for name in wanted
        if name not in known
    ]


def select(
    blueprint: Blueprint, targets: tuple[str, ...] | str, layers: Layers | None, leave_out: Layers
) -> Selection:
    """The linear slots that are asked for.

    Raises: PlanError: a layer that does not exist, or a number where the model has several stacks.
    """
    kept = chosen_layers(blueprint, layers, leave_out)
    chosen: dict[str, Slot] = {}
    problems: list[Problem] = []
    everything, stacks = targets == "all", reached(blueprint, layers)
    for target in blueprint.roles(stacks) if everything else targets:
        slots, missing = _target(blueprint, target, stacks, kept, partial=everything)
        chosen |= {slot.address: slot for slot in slots}
        problems += missing
    return Selection.of([slot for slot in blueprint if slot.address in chosen], problems)


def select_branches(
    blueprint: Blueprint,
    found: Mapping[str, Slot],
    locations: tuple[str, ...],
    layers: Layers | None,
    leave_out: Layers,
) -> Selection:
    """The branches at `locations` ('attention', 'mlp', 'decoder.cross_attention', 'decoder.3.mlp')."""
    kept, stacks = chosen_layers(blueprint, layers, leave_out), reached(blueprint, layers)
    chosen: set[str] = set()
    problems: list[Problem] = []
    for location in locations:
        stack, _, sublayer = location.rpartition(".")
        matching = [
            slot
            for slot in found.values()
            if location == slot.address
            or (slot.sublayer == sublayer and (stack == slot.stack or (not stack and slot.stack in stacks)))
        ]
        if not matching:
            known = sorted({str(slot.sublayer) for slot in found.values()})
            why = blueprint.why_without("branch", sublayer)
            message = f"this model has no branch {location!r} ({blueprint.interface_name}){why}"
            expected = f"branches here: {listing(known)}"
            problems.append(
                Problem("no-such-branch", message, location, expected, did_you_mean(location, known))
            )
        chosen |= {slot.address for slot in matching if (slot.stack, slot.layer) in kept}
    return Selection.of([slot for slot in found.values() if slot.address in chosen], problems)


def reached(blueprint: Blueprint, layers: Layers | None) -> tuple[str, ...]:
    """Stacks that words without an address mean: the usual ones, and those that `layers` has addresses of."""
    named = {
        word for layer in layers or () if isinstance(layer, str) for word in (layer, layer.rpartition(".")[0])
    }
    return tuple(name for name, info in blueprint.stacks.items() if info.by_default or name in named)


def chosen_layers(blueprint: Blueprint, layers: Layers | None, leave_out: Layers) -> set[tuple[str, int]]:
    """(stack, layer) pairs that are adapted."""
    everything = {(name, i) for name, info in blueprint.stacks.items() for i in range(info.num_layers)}
    kept = everything if layers is None else {pair for word in layers for pair in _layer(blueprint, word)}
    return kept - {pair for word in leave_out for pair in _layer(blueprint, word)}


def layers_of(given: Any, option: str) -> Layers:
    """Layers as a user names them, once and for all: an iterator has them once, and a list may change.

    Raises: ConfigError: that names none.
    """
    found = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else (None,)
    plain = tuple(word.item() if hasattr(word, "item") else word for word in found)  # numbers of arrays
    if not all(isinstance(word, int | str) and not isinstance(word, bool) for word in plain):
        expected = "a list of numbers, or of addresses such as 'decoder.3'"
        raise ConfigError(Problem("bad-option", f"{given!r} names no layers", option, expected))
    return plain


def _layer(blueprint: Blueprint, word: int | str) -> set[tuple[str, int]]:
    stacks = {name: info for name, info in blueprint.stacks.items() if info.by_default}
    if isinstance(word, int):
        if len(stacks) != 1:
            example = f"{next(iter(stacks))}.{word}"
            message = f"layer {word} is not clear: the model has the stacks {listing(stacks)}"
            raise PlanError(Problem("ambiguous-layer", message, str(word), f"an address such as {example!r}"))
        name, info = next(iter(stacks.items()))
        return _layer(blueprint, f"{name}.{word + info.num_layers if -info.num_layers <= word < 0 else word}")
    name, _, number = word.rpartition(".")
    if word in blueprint.stacks:
        return {(word, i) for i in range(blueprint.stacks[word].num_layers)}
    if (
        name not in blueprint.stacks
        or not number.isdigit()
        or int(number) >= blueprint.stacks[name].num_layers
    ):
        known = [f"{n}.0 to {n}.{info.num_layers - 1}" for n, info in blueprint.stacks.items()]
        raise PlanError(
            Problem("no-such-layer", f"there is no layer {word!r}", word, f"layers: {listing(known)}")
        )
    return {(name, int(number))}


def _target(
    blueprint: Blueprint, target: str, stacks: Iterable[str], layers: set[tuple[str, int]], partial: bool
) -> tuple[list[Slot], list[Problem]]:
    """Slots of one target word, and the layers that should have it and have not.

    Args: stacks: those that it means where it has no address.
    """
    stack = next((name for name in blueprint.stacks if target == name or target.startswith(f"{name}.")), None)
    if stack is not None:
        rest = target[len(stack) + 1 :]
        if not rest or rest.split(".")[0].isdigit():
            return _addressed(blueprint, target, layers)
        if f"{stack}.{rest}" in blueprint.slots:  # an extra of the stack itself
            return [blueprint.slots[f"{stack}.{rest}"]], []
        return _by_role(blueprint, rest, [stack], layers, partial)
    return _by_role(blueprint, target, stacks, layers, partial)


def _addressed(
    blueprint: Blueprint, target: str, layers: set[tuple[str, int]]
) -> tuple[list[Slot], list[Problem]]:
    exact = blueprint.slots.get(target)
    if exact is not None:
        return [exact], []
    below = [s for s in blueprint if s.address.startswith(f"{target}.") and s.role != "fused"]
    below = [s for s in below if s.layer is None or (s.stack, s.layer) in layers]
    if below:
        return below, []
    hint = did_you_mean(target, blueprint.slots)
    return [], [
        Problem(
            "no-such-slot", f"there is no slot at {target!r}", target, "an address of `adapterkit show`", hint
        )
    ]


def _by_role(
    blueprint: Blueprint, target: str, stacks: Iterable[str], layers: set[tuple[str, int]], partial: bool
) -> tuple[list[Slot], list[Problem]]:
    sublayer, _, role = target.rpartition(".")
    stacks = list(stacks)
    matching = [
        slot
        for slot in blueprint
        if slot.role == role and slot.stack in stacks and (not sublayer or slot.sublayer == sublayer)
    ]
    found = [slot for slot in matching if slot.layer is None or (slot.stack, slot.layer) in layers]
    if not matching:
        known = blueprint.roles()
        why = blueprint.why_without(role, sublayer)
        message = f"this model has no {target!r} ({blueprint.interface_name}){why}"
        expected = f"targets here: {listing(known)}"
        return [], [Problem("no-such-role", message, target, expected, did_you_mean(target, known))]
    if partial:
        return found, []
    if role not in _OWNERS:
        return found, []  # an extra is there wherever the interface names it
    have = {slot.sublayer_address for slot in found}
    owners = (sublayer,) if sublayer in SUBLAYERS else _OWNERS[role]
    expected_at = {
        slot.sublayer_address
        for slot in blueprint
        if slot.stack in stacks
        and slot.sublayer in owners
        and (slot.stack, slot.layer) in layers
        # the interface tells why it has none
        and role not in blueprint.without.get(slot.sublayer_address, {})
    }
    lacking = sorted(expected_at - have)
    if not lacking:
        return found, []
    message = f"{target!r} is missing at {len(lacking)} of {len(expected_at)} places: {listing(lacking, 4)}"
    return found, [
        Problem(
            "partial", message, target, "a target that every layer has, or addresses of those that have it"
        )
    ]


def shared_embeddings(blueprint: Blueprint, slots: Iterable[Slot]) -> list[Problem]:
    """Embeddings that are also those of another stack: what acts at a module acts whenever it is called."""
    return [
        Problem(
            "shared-module",
            f"{slot.path} is the same module as {place.path}, the embeddings of {stack}",
            slot.address,
            "a module for each place, as after save_pretrained and from_pretrained",
        )
        for slot in slots
        if slot.role == "embeddings"
        for stack in blueprint.stacks
        if stack != slot.stack and (place := blueprint.places.get(f"{stack}.embeddings.out")) is not None
        if place.module is slot.module
    ]
