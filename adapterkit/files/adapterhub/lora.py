"""The LoRA family: `<module>.loras.<name>.<parameter>`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from adapterkit.errors import FileFormatError, Problem
from adapterkit.files.adapterhub import tensors
from adapterkit.files.adapterhub.config import LoRAFile, validated
from adapterkit.files.adapterhub.keys import Host, Keyed
from adapterkit.files.adapterhub.member import Member, Part, Shapes, Units
from adapterkit.files.adapterhub.places import left_out, places
from adapterkit.files.adapterhub.shared import share
from adapterkit.model.blueprint import Blueprint


class LoRAMember(Member):
    """A config of LoRA, (IA)^3, VeRA, DoRA, DVoRA or MTL-LoRA."""

    def __init__(self, config: Mapping[str, Any], blueprint: Blueprint) -> None:
        self.theirs = validated(LoRAFile, config)
        self.blueprint = blueprint
        problems = list(self.theirs.refusals())
        if problems:
            raise FileFormatError(problems)
        self.shares = self.theirs.shares
        self.places = places(blueprint, self.theirs)

    def refusals(self) -> Iterator[Problem]:
        for place in self.places:
            yield from tensors.refusals(place, self.theirs)

    def wanted(self, given: Keyed) -> dict[Host, Shapes]:
        return {("lora", place.host.path): tensors.shapes(place, self.theirs) for place in self.places}

    def shared_wanted(self) -> Shapes:
        if not (self.shares and self.places):
            return {}
        first = self.places[0]
        return {"lora_A": (self.theirs.r, first.d_in), "lora_B": (first.d_out, self.theirs.r)}

    def parts(self, given: Keyed) -> Iterator[Part]:
        if not self.places:
            return
        found: Units = {}
        for place in self.places:
            found |= tensors.units(place, self.theirs, given.parts["lora", place.host.path])
        slots = [self.blueprint.slots[address] for address in found]
        theirs = self.theirs
        if theirs.shares:
            found, joined = share(found, self.places, given, theirs.r)
            theirs = theirs.model_copy(update={"r": joined * theirs.r, "alpha": joined * theirs.alpha})
        times = {place.host.address: len(place.blocks) for place in self.places if place.whole}
        config = theirs.method(slots, left_out(self.blueprint, theirs.leave_out), times)
        yield Part(config, found, found.pop("shared", {}))
