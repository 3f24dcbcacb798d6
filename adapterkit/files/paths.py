"""Under which module paths files made elsewhere, or with other versions of transformers, know a slot."""

from __future__ import annotations

from collections.abc import Iterator

from adapterkit.model.blueprint import Blueprint, Slot
from adapterkit.model.walk import join
from adapterkit.spec.paths import Path
from adapterkit.spec.schema import Stack, Sublayer


def known_paths(blueprint: Blueprint, slot: Slot) -> tuple[str, ...]:
    """Every path that the interface gives the host of a slot: this model's first, then `any_of` and `was`."""
    info = blueprint.stacks[slot.stack]
    stack = info.interface.stacks[slot.stack.rpartition("/")[2]]
    if slot.layer is None:
        said = stack.extra[slot.role]
        spelled = [
            join(root, name) for root in _roots(stack, info.path) for name in (*said.names(), *said.was)
        ]
        return tuple(dict.fromkeys((slot.path, *spelled)))
    layer = blueprint.places[f"{slot.stack}.{slot.layer}.layer"].path
    rests = list(_rests(stack, slot, slot.path.removeprefix(f"{layer}.")))
    names = layer_paths(blueprint, slot.stack, slot.layer)
    return tuple(dict.fromkeys([slot.path, *(f"{name}.{rest}" for name in names for rest in rests)]))


def layer_paths(blueprint: Blueprint, stack: str, index: int) -> tuple[str, ...]:
    """Every path that the interface gives a layer: this model's first."""
    info = blueprint.stacks[stack]
    said = info.interface.stacks[stack.rpartition("/")[2]]
    layer = blueprint.places[f"{stack}.{index}.layer"].path
    lists = [name for name in (*said.layers.names(), *said.layers.was) if "*" not in name]
    # a pattern over nested lists numbers its layers in its own way, so that only the model's own path is sure
    names = [f"{name}.{index}" for name in lists] or [_below(layer, info.path)]
    found = [join(root, name) for root in _roots(said, info.path) for name in names]
    return tuple(dict.fromkeys([layer, *found]))


def stack_paths(blueprint: Blueprint, stack: str) -> tuple[str, ...]:
    """Every path that the interface gives the root of a stack: this model's first."""
    info = blueprint.stacks[stack]
    said = info.interface.stacks[stack.rpartition("/")[2]]
    return tuple(dict.fromkeys(_roots(said, info.path)))


def _below(path: str, root: str) -> str:
    return path.removeprefix(f"{root}.") if root else path


def _roots(stack: Stack, path: str) -> list[str]:
    """Paths that the root of a stack may have, where here it has `path`."""
    names = [name for name in (*stack.at.names(), *stack.at.was) if name != "."] if stack.at else []
    here = next((name for name in names if path == name or path.endswith(f".{name}")), "")
    base = path.removesuffix(here).removesuffix(".") if here else path
    return [path, *(join(base, name) for name in (*(stack.at.names() if stack.at else ()), *names))]


def _rests(stack: Stack, slot: Slot, real: str) -> Iterator[str]:
    """Paths that the host of a slot may have below its layer, where here it has `real`."""
    layers = [stack, *(stack.kinds.of.values() if stack.kinds else ())]
    sublayers = [getattr(layer, slot.sublayer or "", None) for layer in layers]
    options = [
        option
        for sublayer in sublayers
        if sublayer is not None
        for option in (sublayer.any_of or (sublayer,))
    ]
    said = [(option.when, path) for option in options for path in _said(option, slot)]
    # an alternative under another condition is another structure, not another version of this one
    here = [when for when, path in said if real in path.names()]
    for when, path in said:
        if when in here:
            yield from (*path.names(), *path.was)


def _said(option: Sublayer, slot: Slot) -> Iterator[Path]:
    """What one alternative of a sublayer says of the host of a slot."""
    named = getattr(option, slot.role, None) or option.extra.get(slot.role)
    if isinstance(named, Path):
        yield named
    if option.fused is not None and slot.role in ("fused", *option.fused.order):
        yield option.fused.path
