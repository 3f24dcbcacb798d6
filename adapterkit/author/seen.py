"""One stack of a model as it was described, beside what it did: where claims and observations meet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from adapterkit.author.claims import Book
from adapterkit.author.graph import Call, Graph, Projection
from adapterkit.author.layers import BranchFacts
from adapterkit.author.observe import Observation
from adapterkit.methods.flow import entry_place
from adapterkit.model.blueprint import Blueprint, Slot, StackInfo
from adapterkit.spec.schema import Interface, Stack, Sublayer
from adapterkit.spec.text import Loc
from adapterkit.spec.vocabulary import SUBLAYERS


@dataclass(frozen=True)
class Seen:
    """A stack of a blueprint in one observation."""

    blueprint: Blueprint
    info: StackInfo
    observation: Observation
    book: Book

    @property
    def graph(self) -> Graph:
        return self.observation.graph

    @property
    def interface(self) -> Interface:
        return self.info.interface

    @property
    def name(self) -> str:
        """The stack in its interface, without the part that it lies in."""
        return self.info.address.rpartition("/")[2]

    @property
    def said(self) -> Stack:
        return self.interface.stacks[self.name]

    @property
    def loc(self) -> Loc:
        return ("stacks", self.name)

    def module(self, path: str) -> nn.Module:
        return self.blueprint.model.get_submodule(path)

    def place(self, word: str) -> Slot | None:
        """A named place of the stack outside its layers."""
        return self.blueprint.places.get(f"{self.info.address}.{word}")

    @property
    def entry(self) -> Call | None:
        """The first call that runs the stack."""
        calls = self.graph.calls_of(entry_place(self.blueprint, self.info.address).path)
        return calls[0] if calls else None

    def layers(self) -> list[tuple[int, Slot, tuple[Call, ...]]]:
        """Number, place and calls of every layer."""
        found = []
        for index in range(self.info.num_layers):
            place = self.blueprint.places[f"{self.info.address}.{index}.layer"]
            found.append((index, place, self.graph.calls_of(place.path)))
        return found

    def calls(self) -> list[Call]:
        """Calls of layers, in order of time."""
        return sorted({call for _, _, calls in self.layers() for call in calls}, key=lambda call: call.index)

    # -- claims

    def judge(
        self, truth: bool, loc: Loc, text: str, observed: str, hint: str = "", aspect: str = ""
    ) -> bool:
        return self.book.judge(truth, self.interface, loc, text, observed, hint, aspect)

    def refute(self, loc: Loc, text: str, observed: str, hint: str = "", aspect: str = "") -> None:
        self.book.refute(self.interface, loc, text, observed, hint, aspect)

    def unseen(self, loc: Loc, text: str, aspect: str = "") -> None:
        self.book.unseen(self.interface, loc, text, aspect)


@dataclass(frozen=True)
class Block:
    """A sublayer of one layer as the interface says it."""

    word: str
    loc: Loc
    said: Sublayer | None
    slots: dict[str, Slot]
    """Roles and extra modules by name."""
    places: dict[str, Slot]
    """Named places: core, tail, norm.before and so on."""
    lacks: Mapping[str, str] = field(default_factory=dict)
    """What the interface says that the sublayer does without, and why."""

    def path(self, word: str) -> str | None:
        found = self.slots.get(word) or self.places.get(word)
        return found.path if found is not None else None

    def at(self, word: str) -> Loc:
        """Where a word of the block stands, or would stand."""
        return (*self.loc, *word.split("."))


def blocks(seen: Seen, index: int, layer: Slot) -> Iterator[Block]:
    """What the interface says of one layer, sublayer by sublayer."""
    for word in SUBLAYERS:
        start = f"{seen.info.address}.{index}.{word}."
        slots = {a.removeprefix(start): s for a, s in seen.blueprint.slots.items() if a.startswith(start)}
        places = {a.removeprefix(start): s for a, s in seen.blueprint.places.items() if a.startswith(start)}
        if not slots and not places:
            continue
        bound = {
            (name, found.path.removeprefix(layer.path).strip("."))
            for name, found in (*slots.items(), *places.items())
        }
        loc, said = _chosen(seen, word, bound)
        # a layer that stands in a list several times is observed under its first path
        slots, places = ({name: _first(seen, one) for name, one in held.items()} for held in (slots, places))
        yield Block(word, loc, said, slots, places, seen.blueprint.without.get(start[:-1], {}))


def _first(seen: Seen, slot: Slot) -> Slot:
    path = seen.graph.paths.get(slot.path, slot.path)
    return slot if path == slot.path else slot.moved(path=path)


def _chosen(seen: Seen, word: str, bound: set[tuple[str, str]]) -> tuple[Loc, Sublayer | None]:
    """The block of the interface that was bound: of the stack or of a kind of layers, one of alternatives."""
    holders: list[tuple[Loc, object]] = [(seen.loc, seen.said)]
    if seen.said.kinds is not None:
        kinds = seen.said.kinds.of.items()
        holders += [((*seen.loc, "kinds", "of", kind), layer) for kind, layer in kinds]
    options: list[tuple[Loc, Sublayer]] = []
    for loc, holder in holders:
        said: Sublayer | None = getattr(holder, word)
        if said is not None and said.any_of:
            options += [((*loc, word, "any_of", i), option) for i, option in enumerate(said.any_of)]
        elif said is not None:
            options.append(((*loc, word), said))
    if not options:
        return (*seen.loc, word), None
    return max(options, key=lambda option: len(bound & set(_names(option[1]))))


def _names(said: Sublayer) -> Iterator[tuple[str, str]]:
    """(word, path) of everything that a sublayer names."""
    named = [(word, getattr(said, word, None)) for word in ("q", "k", "v", "o", "gate", "up", "down")]
    named += [*said.points, ("fused", said.fused.path if said.fused is not None else None)]
    yield from ((word, name) for word, path in named if path is not None for name in path.names())


@dataclass(frozen=True)
class BranchSeen:
    """A sublayer as it is said, beside one branch as it was observed."""

    seen: Seen
    block: Block
    facts: BranchFacts
    layer: Call

    def rel(self, path: str | None) -> str:
        """A path seen from the layer."""
        if path is None:
            return "nothing"
        return path.removeprefix(self.layer.path).strip(".") or "the layer itself"

    def rels(self, found: tuple[Projection, ...]) -> str:
        return ", ".join(dict.fromkeys(self.rel(one.path) for one in found)) or "nothing"

    def judge(
        self, truth: bool, word: str, text: str, observed: str, hint: str = "", aspect: str = ""
    ) -> bool:
        where = "" if truth else f" (layer {self.layer.path})"
        return self.seen.judge(truth, self.block.at(word), text, observed + where, hint, aspect)
