"""Setups -> programs: which units each site runs, in which order and on which part of the batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from adapterkit import fusing
from adapterkit.adapter import Adapter
from adapterkit.composition import (
    Average,
    BatchSplit,
    Block,
    Fuse,
    MultiTask,
    Parallel,
    Route,
    Setup,
    Split,
    Stack,
    check,
    copies,
    examples,
    names,
)
from adapterkit.composition.rules import blocks, first, parts
from adapterkit.errors import CompositionError, NotAttachedError, Problem
from adapterkit.inject import entry, lanes
from adapterkit.meaning import refuse_no_first, refuse_undefined, refuse_uneven
from adapterkit.methods.base import Unit
from adapterkit.methods.fusion import FusionConfig
from adapterkit.methods.prompt import Prompt
from adapterkit.methods.targets import Layers, chosen_layers
from adapterkit.model.blueprint import Blueprint, Slot
from adapterkit.model.cores import apart, whole_arguments
from adapterkit.runtime import Around, Batch, Lanes, Program, Programs, Step


class Place(NamedTuple):
    """Where and when a unit acts: steps at one place run together."""

    path: str
    acts_on: str
    phase: int


Steps = dict[Place, tuple[Step, ...]]
Heads = dict[Place, Step]
_FIELDS = {"entry": "entry", "input": "inputs", "kernel": "kernel", "held": "held", "output": "outputs"}
_HEAD = "instead"
_AROUND = "around"
_ROW_WISE = ("rows", "tasks", "route")
"""Kinds of lanes that give each its examples, in the order in which one may lie in another around a core."""


def programs(
    setup: Setup | None,
    adapters: Mapping[str, Adapter],
    blueprint: Blueprint,
    entries: Iterable[str],
    skip_layers: Layers = (),
) -> Programs:
    """What each site does under a setup.

    Raises: CompositionError: it is no setup, or has no meaning for these adapters. NotAttachedError: an
        adapter is not there. PlanError: a layer to be skipped does not exist.
    """
    check(setup)
    if setup is None:
        return {}
    kept = chosen_layers(blueprint, None, skip_layers) if skip_layers else None
    compiler = _Compiler(adapters, blueprint, kept, first(setup))
    steps = compiler.steps(setup)
    compiler.refuse_scattered(steps)
    for place, keys in compiler.helpers(setup).items():
        steps[place] = (*steps.get(place, ()), *keys)
    fields: dict[str, dict[str, Any]] = {path: {"before": entry.KEY} for path in entries}
    for place, step in compiler.heads(setup).items():
        fields[place.path] = {"instead": step, "composed": isinstance(step, Lanes)}
    for place in sorted(steps, key=lambda place: place.phase):
        own = steps[place]
        composed = any(isinstance(step, Lanes) for step in own)
        if place.acts_on == _AROUND and not composed:
            continue
        program = fields.setdefault(place.path, {})
        if composed:
            program["composed"] = True
        if place.acts_on == _AROUND:
            program["around"] = compiler.around(place, own)
        else:
            field = _FIELDS[place.acts_on]
            program[field] = (*program.get(field, ()), *own)
    for program in fields.values():
        if program.keys() == {"composed", "outputs"}:
            program["lone"] = _is_lone(program["outputs"])
    for path, key in compiler.joining():
        if fields.get(path) == {"outputs": (key,)}:
            fields[path]["joined"] = True
    batch = _batch(setup, adapters, blueprint)
    if batch is not None:
        fields.setdefault(entry.Top.key, {})["batch"] = batch
    return {path: Program(**program) for path, program in fields.items()}


def _is_lone(outputs: tuple[Step, ...]) -> bool:
    """Whether outputs are lanes alone that cut the batch, and all act at once."""
    match outputs:
        case (Lanes(kind="rows" | "route" | "tasks", block=0),):
            return True
    return False


def _batch(setup: Setup, adapters: Mapping[str, Adapter], blueprint: Blueprint) -> Batch | None:
    """What a setup asks of the batch, None if nothing."""
    found = {type(block): len(block.children) for block in blocks(setup)}
    if not found.keys() & {Parallel, BatchSplit, Route, MultiTask}:
        return None
    slots = (slot for name in names(setup) for slot in adapters[name].plan.slots)
    met = [blueprint.stacks.get(stack) for stack in {slot.stack for slot in slots}]
    images = any(info is None or info.inputs.ids is None for info in met)
    return Batch(copies(setup), examples(setup), found.get(Route, 0), found.get(MultiTask, 0), images)


class _Compiler:
    """Steps of a setup, from its leaves to its root."""

    def __init__(
        self,
        adapters: Mapping[str, Adapter],
        blueprint: Blueprint,
        kept: set[tuple[str, int]] | None,
        first: str | None,
    ) -> None:
        self.adapters = adapters
        self.blueprint = blueprint
        self.kept = kept
        self.first = first
        """Name of the adapter that acts first, on everything."""
        self.units: dict[tuple[str, str], tuple[Unit, Slot]] = {}
        """(path, key) of every unit that was met -> the unit and its slot."""
        self.apart: set[str] = set()
        """Paths of modules that are called for one lane at a time."""
        self.blocks = 0
        """How many blocks have lanes that run one at a time around some cores."""

    # -- units

    def steps(self, setup: Setup) -> Steps:
        """The steps of a setup at each place, without helpers."""
        if isinstance(setup, str):
            return self._adapter(setup)
        if isinstance(setup, Fuse):
            return self._fusion(setup)
        children = [self.steps(child) for child in setup.children]
        if isinstance(setup, Stack):
            width = copies(setup)
            for index, child in enumerate(setup.children):
                if width > 1 and any(isinstance(block, BatchSplit) for block in blocks(child)):
                    if copies(child) == 1:  # groups of each copy of the batch, not of all together
                        twin = Parallel(*[child] * width)
                        children[index] = self._lanes(twin, [children[index]] * width, always=True)
            return self._stacked(children)
        return self._lanes(setup, children)

    def _adapter(self, name: str) -> Steps:
        """Units of one adapter outside the layers that are skipped."""
        adapter = self.adapters[name]
        if isinstance(adapter.config, FusionConfig):
            children = ", ".join(map(repr, adapter.config.children))
            message = f"{name!r} is a fusion and does nothing alone"
            raise CompositionError(Problem("bad-setup", message, expected=f"Fuse({children})"))
        return self._own(adapter)

    def _own(self, adapter: Adapter) -> Steps:
        found: Steps = {}
        for slot in adapter.plan.slots:
            if self.kept is None or slot.layer is None or (slot.stack, slot.layer) in self.kept:
                unit = adapter.units[slot.address]
                if unit.first_only and adapter.name != self.first:
                    refuse_no_first(self.first, slot)
                    continue
                path, key = adapter.injection.by_address[slot.address]
                core = apart(self.blueprint, slot)
                if core is not None:
                    self.apart.add(slot.path)
                    found.setdefault(Place(core.path, _AROUND, 0), ())
                self.units[path, key] = unit, slot
                place = Place(path, unit.acts_on, unit.phase)
                found[place] = (*found.get(place, ()), key)
        return found

    def _fusion(self, setup: Fuse) -> Steps:
        """The fusion's units in place of those of its children.

        Raises: NotAttachedError: the fusion has no weights. CompositionError: those are of other adapters.
        """
        if setup.name not in self.adapters:
            given = ", ".join(map(repr, setup.children))
            message = f"there are no weights for {setup!r}"
            raise NotAttachedError(Problem("no-fusion", message, expected=f"kit.fuse({given}) first"))
        fusion = self.adapters[setup.name]
        config = fusion.config
        if not isinstance(config, FusionConfig) or config.children != setup.fused:
            message = f"{setup.name!r} does not hold the weights of {setup!r}"
            raise CompositionError(Problem("no-fusion", message))
        for name in names(setup):
            if name != setup.name:
                self._own(self.adapters[name])  # so that all units are known
        found = self._own(fusion)
        if setup.fused == setup.children:
            return found
        chains = fusing.members(setup, self.adapters)
        return {
            place: tuple(
                self._fused(place, chains[self.units[place.path, str(k)][1].address], k) for k in keys
            )
            for place, keys in found.items()
        }

    def _fused(self, place: Place, chains: tuple[tuple[str, ...], ...], key: Step) -> Lanes:
        return self._lane(place, "fuse", chains, ())._replace(by=str(key))

    def _stacked(self, children: Sequence[Steps]) -> Steps:
        found: Steps = {}
        for child in children:
            for place, steps in child.items():
                before = found.get(place, ())
                found[place] = (*steps, *before) if self._undoes(place, steps) else (*before, *steps)
        return found

    def _prompts(self, place: Place, steps: Iterable[Step]) -> list[tuple[Prompt, Slot]]:
        return [(u, slot) for u, slot in self._within(place, steps) if isinstance(u, Prompt)]

    def _positions(self, place: Place, steps: Iterable[Step]) -> int:
        """How many positions prompts take; the lanes of a block take the same number."""
        total = 0
        for step in steps:
            if isinstance(step, Lanes):
                total += self._positions(place, step.lanes[0])
            else:
                total += sum(len(prompt.embeds) for prompt, _ in self._prompts(place, (step,)))
        return total

    def _undoes(self, place: Place, steps: Sequence[Step]) -> bool:
        return any(unit.undoes for unit, _ in self._within(place, steps))

    def _within(self, place: Place, steps: Iterable[Step]) -> Iterable[tuple[Unit, Slot]]:
        for step in steps:
            if isinstance(step, Lanes):
                for lane in (*step.lanes, (step.by,) if step.by else ()):
                    yield from self._within(place, lane)
            else:
                yield self.units[place.path, step]

    # -- blocks

    def _lanes(self, block: Block, children: Sequence[Steps], always: bool = False) -> Steps:
        kind, numbers = _kind(block)
        if isinstance(block, Average):
            kept = [index for index, share in enumerate(numbers) if share]
            children, numbers = [children[i] for i in kept], tuple(numbers[i] for i in kept)
        elif isinstance(block, BatchSplit | Split):
            kept = [index for index, size in enumerate(numbers) if size]
            children, numbers = [children[i] for i in kept], tuple(numbers[i] for i in kept)
        found: Steps = {}
        places = dict.fromkeys(place for child in children for place in child)
        number = 0
        if kind in _ROW_WISE and any(place.acts_on == _AROUND for place in places):
            number = self.blocks = self.blocks + 1
        for place in places:
            own = tuple(child.get(place, ()) for child in children)
            if place.acts_on == _AROUND:
                step = self._lane(place, kind, own, numbers)._replace(block=number)
                found[place] = (step,) if number else tuple(inner for lane in own for inner in lane)
                continue
            if not always and kind not in lanes.INDEX and _alike(kind, own, numbers):
                found[place] = own[0]  # all lanes do the same
                continue
            acting = self._within(place, (Lanes(kind, own),))
            if kind in _ROW_WISE:
                acting = [(unit, slot) for unit, slot in acting if slot.path not in self.apart]
            refuse_undefined(block, acting)
            if place.acts_on == "held":
                lengths = [self._positions(place, lane) for lane in own]
                refuse_uneven(self._prompts(place, (Lanes(kind, own),)), lengths)
            found[place] = tuple(
                self._lane(place, kind, lane, numbers)._replace(block=number) for lane in _apart(kind, own)
            )
        return found

    def around(self, place: Place, steps: tuple[Step, ...]) -> Around:
        """The blocks around a core, one within the other.

        Raises: CompositionError: several of them cut the batch into groups.
        """
        inside = [
            (unit, slot)
            for (path, _), (unit, slot) in self.units.items()
            if f"{path}.".startswith(f"{place.path}.")
        ]
        # the rows as well: a block inside, none of whose units is called in parts, asks for them all the same
        reads = (
            *dict.fromkeys(key for unit, _ in inside for key in unit.per_example),
            *lanes.INDEX.values(),
        )
        found = sorted(
            (step for step in steps if isinstance(step, Lanes)), key=lambda step: _ROW_WISE.index(step.kind)
        )
        if sum(step.kind == "rows" for step in found) > 1:
            message = (
                f"{place.path} is called for one lane at a time, but two blocks of a Stack cut the batch"
            )
            expected = "one block with Stacks in it, or adapters without this slot"
            raise CompositionError(Problem("no-batch-axis", message, inside[0][1].address, expected))
        whole: Lanes | None = None
        for step in reversed(found):
            whole = _within_lanes(step, whole, reads)
        assert whole is not None
        return Around(whole, whole_arguments(self.blueprint, inside[0][1].stack))

    def _lane(
        self, place: Place, kind: str, own: tuple[tuple[Step, ...], ...], numbers: tuple[float, ...]
    ) -> Lanes:
        units = [unit for unit, _ in self._within(place, (Lanes(kind, own),))]
        inner = [step for lane in own for step in lane if isinstance(step, Lanes)]
        reads = [key for unit in units for key in unit.per_example]
        reads += [key for step in inner for key in (*step.reads, lanes.INDEX.get(step.kind)) if key]
        leaves = [unit.leaves for unit in units if unit.leaves]
        return Lanes(kind, own, numbers, tuple(dict.fromkeys(reads)), tuple(dict.fromkeys(leaves)))

    def joining(self) -> Iterable[tuple[str, str]]:
        """(path, key) of units that can compute their host as well, if they are alone there."""
        return ((path, key) for (path, key), (unit, _) in self.units.items() if unit.joins)

    def refuse_scattered(self, steps: Steps) -> None:
        """Refuse prompts of one stack that are kept at different modules.

        Raises: CompositionError.
        """
        held = (place for place in steps if place.acts_on == "held")
        refuse_uneven([found for place in held for found in self._prompts(place, steps[place])])

    # -- helpers and heads

    def helpers(self, setup: Setup) -> Steps:
        """What the units need elsewhere, once for all adapters."""
        found: dict[Place, dict[str, None]] = {}
        for name in names(setup):
            adapter = self.adapters[name]
            idle = [a for a, unit in adapter.units.items() if unit.first_only and name != self.first]
            without = {address.rpartition(":")[2] for address in idle}
            for helper in adapter.injection.helpers:
                if helper.of in without:
                    continue
                place = Place(helper.place.path, helper.acts_on, helper.phase)
                found.setdefault(place, {})[helper.key] = None
        return {place: tuple(keys) for place, keys in found.items()}

    def heads(self, setup: Setup) -> Heads:
        """Heads and poolers of the adapter that acts last, or of every lane its own."""
        sizes, found = [], []
        for size, part in parts(setup):
            sizes.append(size)
            found.append(self._heads(part, {}))
        return found[0] if len(found) == 1 else _beside("rows", found, tuple(sizes))

    def _heads(self, setup: Setup, before: Heads) -> Heads:
        """The same of a part of the batch. Where Route takes none, those of what acts before it stay."""
        if isinstance(setup, str):
            adapter = self.adapters[setup]
            placed = [adapter.injection.by_address[address] for address in (*adapter.heads, *adapter.poolers)]
            return {Place(path, _HEAD, 0): key for path, key in placed}
        if isinstance(setup, Stack):
            for child in setup.children:
                before = self._heads(child, before)
            return before
        if isinstance(setup, Fuse):
            return self._heads(setup.children[-1], before)
        if isinstance(setup, Split):
            acting = [c for c, size in zip(setup.children, setup.splits, strict=True) if size]
            return self._heads(acting[-1], before)
        kind, numbers = _kind(setup)
        children = [self._heads(child, before) for child in setup.children]
        if isinstance(setup, Average):
            children, numbers = _shared_out(children, numbers, before)
            if len(children) == 1:
                return children[0]
        return _beside(kind, children, numbers, before if kind == "route" else {})


def _beside(kind: str, own: Sequence[Heads], numbers: tuple[float, ...], rest: Heads | None = None) -> Heads:
    """Heads of every lane.

    Args: rest: those of examples that take no lane.
    """
    found: Heads = {}
    rest = rest or {}
    for place in dict.fromkeys(place for heads in (*own, rest) for place in heads):
        *sides, none = (((heads[place],) if place in heads else ()) for heads in (*own, rest))
        inner = [step for side in (*sides, none) for step in side if isinstance(step, Lanes)]
        reads = [key for step in inner for key in (*step.reads, lanes.INDEX.get(step.kind)) if key]
        found[place] = Lanes(kind, tuple(sides), numbers, tuple(dict.fromkeys(reads)), none=none)
    return found


def _within_lanes(step: Lanes, inner: Lanes | None, reads: tuple[str, ...]) -> Lanes:
    """A block around a core with another one in each of its lanes."""
    own = []
    for lane in step.lanes:
        nested = [s for s in lane if isinstance(s, Lanes)]
        last = _within_lanes(nested[0], inner, reads) if nested else inner
        own.append(() if last is None else (last,))
    more = () if inner is None else (*inner.reads, lanes.INDEX.get(inner.kind, ""))
    read = dict.fromkeys(key for key in (*step.reads, *reads, *more) if key)
    return step._replace(lanes=tuple(own), reads=tuple(read))


def _kind(block: Block) -> tuple[str, tuple[float, ...]]:
    """How the lanes of a block take their parts, and how much each."""
    match block:
        case Parallel():
            return "rows", tuple(map(copies, block.children))
        case BatchSplit():
            return "rows", block.batch_sizes
        case Split():
            return "split", block.splits
        case Average():
            return "average", block.shares
        case MultiTask():
            return "tasks", ()
    return "route", ()


def _alike(kind: str, own: Sequence[tuple[Step, ...]], numbers: Sequence[float]) -> bool:
    """Whether all lanes make the same of their parts as one would make of the whole."""
    if kind == "average":
        return len(own) == 1 and numbers[0] == 1
    if kind == "split":
        return len(own) == 1
    return all(lane == own[0] for lane in own)


def _apart(kind: str, own: tuple[tuple[Step, ...], ...]) -> list[tuple[tuple[Step, ...], ...]]:
    """Lanes with as many units each, as one block for the first of each, one for the second, and so on.

    Blocks of one unit each may run in one go. A mean is taken of all that the lanes do, so it stays one.
    """
    counts = {len(lane) for lane in own if lane}
    if kind == "average" or len(counts) != 1 or any(isinstance(step, Lanes) for lane in own for step in lane):
        return [own]
    return [tuple(lane[i : i + 1] for lane in own) for i in range(counts.pop())]


def _shared_out(
    heads: Sequence[Heads], shares: Sequence[float], before: Heads
) -> tuple[list[Heads], tuple[float, ...]]:
    """Heads of which a mean is taken, with their shares; what is missing to 1 is that of the one before."""
    pairs = [(own, share) for own, share in zip(heads, shares, strict=True) if share]
    rest = 1.0 - sum(shares)
    pairs += [(before, rest)] if abs(rest) > 1e-9 else []
    return [own for own, _ in pairs], tuple(share for _, share in pairs)
