"""Where an adapter of theirs stands: which modules it has parts at, and which slots those are here."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from adapterkit.errors import FileFormatError, Problem
from adapterkit.files.adapterhub.config import LoRAFile
from adapterkit.model.blueprint import Blueprint, Slot
from adapterkit.model.layouts import Rows
from adapterkit.spec.foreign import AdapterHub

MATRICES = ("q", "k", "v")


@dataclass(frozen=True)
class Place:
    """One module of theirs with its parts of the adapter.

    They cut a fused matrix into three equal blocks of rows, named q, k and v whatever lies there, and keep
    the parts for all blocks in one tensor.
    """

    host: Slot
    """The slot of the whole module."""
    slots: tuple[Slot, ...]
    """The adapted slots: one for each block; the host itself where the blocks are not the roles."""
    blocks: tuple[int, ...] = (0,)
    """Numbers of the adapted blocks."""
    length: int = 0
    """Rows of one block."""
    others: tuple[Slot, ...] = ()
    """Roles in the other blocks."""

    @property
    def d_in(self) -> int:
        """Columns of the module."""
        return (self.host.shape or (0, 0))[1]

    @property
    def d_out(self) -> int:
        """Rows of the module."""
        return (self.host.shape or (0, 0))[0]

    @property
    def fused(self) -> bool:
        """Whether the module holds q, k and v."""
        return self.length != self.d_out

    @property
    def whole(self) -> bool:
        """Whether the blocks are not the roles, so that the fused module is adapted as a whole."""
        return self.fused and self.slots == (self.host,)

    @property
    def stretches(self) -> list[slice]:
        """Rows of the adapted blocks in the module."""
        return [slice(block * self.length, (block + 1) * self.length) for block in self.blocks]


def hub_of(blueprint: Blueprint) -> AdapterHub:
    """What the interface of a model says about files of AdapterHub.

    Raises: FileFormatError: nothing, or that their numbers cannot be had here.
    """
    hub = blueprint.interface.adapterhub
    if hub is None:
        message = f"the interface {blueprint.interface_name!r} does not say how AdapterHub names this model"
        expected = "an 'adapterhub' block, which families that AdapterHub has not got do not have"
        raise FileFormatError(Problem("not-in-adapterhub", message, expected=expected))
    if hub.refused is not None:
        message = f"adapters of AdapterHub cannot be reproduced on {blueprint.interface_name}: {hub.refused}"
        raise FileFormatError(Problem("not-reproducible", message))
    config = getattr(blueprint.model, "config", None)
    for field, value in (hub.when or {}).items():
        if getattr(config, field, None) != value:
            message = (
                f"adapters of AdapterHub cannot be reproduced where {field} is {getattr(config, field, None)}"
            )
            raise FileFormatError(Problem("not-reproducible", message, field, f"a model where it is {value}"))
    return hub


def places(blueprint: Blueprint, theirs: LoRAFile) -> tuple[Place, ...]:
    """Every module that their config adapts in this model, in the order of the model."""
    adapted = [layer for layer in layers(blueprint) if layer.number not in theirs.leave_out]
    return tuple(
        place for layer in adapted for place in _in_layer(blueprint, layer.address, layer.hub, theirs)
    )


def left_out(blueprint: Blueprint, numbers: Collection[int]) -> tuple[str, ...]:
    """Addresses of the layers that their numbers leave out."""
    return tuple(layer.address for layer in layers(blueprint) if layer.number in numbers)


@dataclass(frozen=True)
class Layer:
    """One layer of the model as they know it."""

    address: str
    number: int
    hub: AdapterHub
    """What the interface that describes the layer says."""
    stack: str
    index: int


def layers(blueprint: Blueprint) -> Iterator[Layer]:
    """Every layer with the number they give it."""
    separate = hub_of(blueprint).numbering == "separate"
    number, part = 0, ""
    for address, info in blueprint.stacks.items():
        # a part of a model whose own interface says nothing is named by module paths alone
        hub = info.interface.adapterhub or AdapterHub()
        part, before = address.rpartition("/")[0], part
        if (separate and part != before) or hub.numbering == "separate":
            number = 0
        for index in range(info.num_layers):
            yield Layer(f"{address}.{index}", number + index, hub, address, index)
        number += info.num_layers


def _in_layer(blueprint: Blueprint, layer: str, hub: AdapterHub, theirs: LoRAFile) -> Iterator[Place]:
    for sublayer in ("attention", "cross_attention"):
        names = [
            f"{sublayer}.{role}" for role in MATRICES if role in theirs.attn_matrices and theirs.selfattn_lora
        ]
        slots = [blueprint.slots.get(f"{layer}.{name}") for name in names if name not in hub.ignored]
        yield from _attention(blueprint, [slot for slot in slots if slot is not None])
    for wanted, name in ((theirs.intermediate_lora, hub.intermediate), (theirs.output_lora, hub.output)):
        slot = blueprint.slots.get(f"{layer}.{name}")
        if wanted and slot is not None:
            yield _plain(slot)


def _attention(blueprint: Blueprint, slots: list[Slot]) -> Iterator[Place]:
    """Places of the adapted matrices of one attention: one each, or one for those in the same module."""
    for path in dict.fromkeys(slot.path for slot in slots):
        inside = tuple(slot for slot in slots if slot.path == path)
        yield _plain(inside[0]) if inside[0].rows is None else _fused(blueprint, inside)


def _plain(slot: Slot) -> Place:
    return Place(slot, (slot,), length=(slot.shape or (0, 0))[0])


def _fused(blueprint: Blueprint, inside: tuple[Slot, ...]) -> Place:
    """The place of a fused module, of which the roles `inside` are adapted."""
    prefix = inside[0].sublayer_address
    host = blueprint.slots[f"{prefix}.fused"]
    total = (host.shape or (0, 0))[0]
    length, rest = divmod(total, len(MATRICES))
    if rest:
        message = f"AdapterHub cuts the {total} rows of {host.path} into three blocks"
        raise FileFormatError(Problem("unsupported-slot", message, host.address))
    blocks = tuple(MATRICES.index(slot.role) for slot in inside)
    roles = {role: blueprint.slots.get(f"{prefix}.{role}") for role in MATRICES}
    for block, role in enumerate(MATRICES):
        slot = roles[role]
        if slot is None or slot.path != host.path or slot.rows != Rows(1, total, block * length, length):
            return Place(host, (host,), blocks, length)
    others = tuple(slot for slot in roles.values() if slot is not None and slot not in inside)
    return Place(host, inside, blocks, length, others)
