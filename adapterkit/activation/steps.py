"""The steps of a setup at each place, from its leaves to its root."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from adapterkit import fusing
from adapterkit.activation.places import AROUND, ROW_WISE, Place, Steps, alike, asked, kind_of, one_by_one
from adapterkit.adapter import Adapter
from adapterkit.composition import (
    Average,
    BatchSplit,
    Block,
    Fuse,
    Parallel,
    Setup,
    Split,
    Stack,
    blocks,
    copies,
    names,
)
from adapterkit.errors import CompositionError, NotAttachedError, Problem
from adapterkit.inject.lanes import INDEX
from adapterkit.meaning import refuse_no_first, refuse_undefined, refuse_uneven
from adapterkit.methods.base import Unit
from adapterkit.methods.fusion import FusionConfig
from adapterkit.methods.prompt import Prompt
from adapterkit.model.blueprint import Blueprint, Slot
from adapterkit.model.cores import apart
from adapterkit.runtime import Lanes, Step


class Compiler:
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
                    found.setdefault(Place(core.path, AROUND, 0), ())
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
        kind, numbers = kind_of(block)
        if isinstance(block, Average):
            kept = [index for index, share in enumerate(numbers) if share]
            children, numbers = [children[i] for i in kept], tuple(numbers[i] for i in kept)
        elif isinstance(block, BatchSplit | Split):
            kept = [index for index, size in enumerate(numbers) if size]
            children, numbers = [children[i] for i in kept], tuple(numbers[i] for i in kept)
        found: Steps = {}
        places = dict.fromkeys(place for child in children for place in child)
        number = 0
        if kind in ROW_WISE and any(place.acts_on == AROUND for place in places):
            number = self.blocks = self.blocks + 1
        for place in places:
            own = tuple(child.get(place, ()) for child in children)
            if place.acts_on == AROUND:
                step = self._lane(place, kind, own, numbers)._replace(block=number)
                found[place] = (step,) if number else tuple(inner for lane in own for inner in lane)
                continue
            if not always and kind not in INDEX and alike(kind, own, numbers):
                found[place] = own[0]  # all lanes do the same
                continue
            acting = self._within(place, (Lanes(kind, own),))
            if kind in ROW_WISE:
                acting = [(unit, slot) for unit, slot in acting if slot.path not in self.apart]
            refuse_undefined(block, acting)
            if place.acts_on == "held":
                lengths = [self._positions(place, lane) for lane in own]
                refuse_uneven(self._prompts(place, (Lanes(kind, own),)), lengths)
            found[place] = tuple(
                self._lane(place, kind, lane, numbers)._replace(block=number)
                for lane in one_by_one(kind, own)
            )
        return found

    def _lane(
        self, place: Place, kind: str, own: tuple[tuple[Step, ...], ...], numbers: tuple[float, ...]
    ) -> Lanes:
        units = [unit for unit, _ in self._within(place, (Lanes(kind, own),))]
        reads = [key for unit in units for key in unit.per_example]
        reads += asked(step for lane in own for step in lane)
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

    # -- helpers

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
