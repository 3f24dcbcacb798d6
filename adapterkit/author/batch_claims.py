"""Claims about the axis of the batch: in what modules are called with, and in arguments."""

from __future__ import annotations

from collections.abc import Mapping

from adapterkit.author.axes import arguments, axis_of
from adapterkit.author.masks import names_of
from adapterkit.author.observe import Observation
from adapterkit.author.scene import Scene
from adapterkit.author.seen import Seen, blocks
from adapterkit.model.blueprint import Slot
from adapterkit.spec.terms import Batch


def batch(seen: Seen, scene: Scene) -> None:
    """With one example less, the axis that is said to be the batch is shorter by one."""
    other = scene.shorter
    if other is None or len(other.graph.calls) != len(seen.graph.calls):
        return
    for index, place, _ in seen.layers():
        for block in blocks(seen, index, place):
            for name, slot in block.slots.items():
                if name != "fused" and slot.rows is not None:
                    continue
                _axis(seen, other, slot, block.at("fused.path" if name == "fused" else name))
        _axis(seen, other, place, (*seen.loc, "batch"))
    _arguments(seen, other)


def _axis(seen: Seen, other: Observation, slot: Slot, loc: tuple[str | int, ...]) -> None:
    pairs = []
    for call, less in zip(seen.graph.calls_of(slot.path), other.graph.calls_of(slot.path), strict=False):
        if call.given is None or less.given is None:
            return
        before, after = seen.graph.nodes[call.given].shape, other.graph.nodes[less.given].shape
        if slot.role == "layer" and len(before) > 3:
            return  # several streams at once
        pairs.append((before, after))
    observed = axis_of(pairs)
    if observed is None:
        return
    what = "a layer" if slot.role == "layer" else slot.path.rpartition(".")[2]
    text = f"batch: {slot.batch}, in what {what} is called with"
    if slot.batch == "none" and observed != "none":  # there may be configs under which it is none
        seen.unseen((*loc, "batch"), text)
    else:
        seen.judge(slot.batch == observed, (*loc, "batch"), text, f"it is {observed}")


def _arguments(seen: Seen, other: Observation) -> None:
    """In arguments of the entry and of attention the examples lie in the axis that is said, or the first.

    What attention is called with besides has to be named where a map inside treats all examples alike: its
    core is then called for some of them.
    """
    said, loc = seen.info.inputs.batch, (*seen.loc, "inputs", "batch")
    cores = {s.sublayer_address: s for a, s in _own(seen, seen.blueprint.places) if a.endswith(".core")}
    slots = [slot for _, slot in _own(seen, seen.blueprint.slots)]
    around = {
        core.path
        for slot in slots
        if slot.batch == "none" and (core := cores.get(slot.sublayer_address)) and core.batch == "first"
        if slot.path.startswith(f"{core.path}.")
    }
    entry = [seen.entry.path] if seen.entry is not None else []
    entered = arguments(seen.graph, other.graph, entry)
    inside = arguments(seen.graph, other.graph, [core.path for core in cores.values()])
    for name, axis in said.items():
        text, observed = f"inputs.batch: {axis}, in {name!r}", inside.get(name, entered.get(name))
        if observed is not None:
            seen.judge(axis == observed, (*loc, name), text, f"it is {observed}")
        elif not any(
            name in names_of(seen.module(path)) for path in (*entry, *[c.path for c in cores.values()])
        ):
            seen.refute((*loc, name), text, "neither the entry nor attention takes it")
        else:
            seen.unseen((*loc, name), text)
    needed: dict[str, Batch] = {
        n: a for n, a in arguments(seen.graph, other.graph, around).items() if a == "none"
    }
    if seen.said.batch in (None, "first"):
        needed |= {n: a for n, a in entered.items() if a == "second"}
    for name, axis in needed.items():
        if name not in said:
            text = "inputs.batch: arguments whose examples are not in the first axis are named"
            seen.refute(
                loc, text, f"{name!r} has them in {axis}", f"say 'batch: {{{name}: {axis}}}'", "named"
            )


def _own(seen: Seen, slots: Mapping[str, Slot]) -> list[tuple[str, Slot]]:
    return [(address, slot) for address, slot in slots.items() if slot.stack == seen.info.address]
