"""Their tensors: which a place must have, and what they are in the words of our units."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from adapterkit.errors import FileFormatError, Problem
from adapterkit.files.adapterhub.config import LoRAFile
from adapterkit.files.adapterhub.member import Units
from adapterkit.files.adapterhub.places import Place
from adapterkit.model.blueprint import Slot

Tensors = Mapping[str, torch.Tensor]


def shapes(place: Place, theirs: LoRAFile) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that they keep at a place (adapters 1.3.0, methods/lora.py)."""
    blocks, rank = len(place.blocks), theirs.r
    d_in, rows = place.d_in, blocks * place.length
    found: dict[str, tuple[int, ...]] = {}
    match theirs.kind:
        case "ia3":
            found["lora_B"] = (rows, 1)
        case "lora" | "dora":
            found |= {"lora_A": (blocks * rank, d_in), "lora_B": (rows, rank)}
        case "vera" | "dvora":
            found |= {"vera_D": (rank, rank), "vera_B": (rows, rows)}
        case "mtl_lora":
            up = theirs.n_up_projection
            found |= {"lora_A": (rank, d_in), "lora_B": (up, rows, rank)}
            found |= {"task_specific.values": (rank,), "weights": (up,)}
    if theirs.use_dora:
        found["m.weight"] = (rows, 1)
    if theirs.use_gating:
        found |= {"gate.weight": (blocks, d_in), "gate.bias": (blocks,)}
    return found


def refusals(place: Place, theirs: LoRAFile) -> Iterator[Problem]:
    """What cannot be reproduced at a place."""
    if theirs.kind not in ("lora", "ia3") and (place.fused or (theirs.use_dora and place.host.transposed)):
        # there they crash, or ignore a part of the adapter
        message = f"AdapterHub does not compute {theirs.kind} at a matrix that is fused or transposed"
        yield Problem("unsupported-slot", message, place.host.address)
    if theirs.use_gating and place.whole:
        message = f"the file has {len(place.blocks)} gates here, each for a third of the rows that is no role"
        yield Problem("gated-blocks", message, place.host.address)


def units(place: Place, theirs: LoRAFile, given: Tensors) -> Units:
    """What the tensors of a place are here; VeRA's d belongs to the matrices of the file, see `shared`."""
    host = place.host.address
    match theirs.kind:
        case "ia3":
            found = _scales(place, theirs, given["lora_B"].flatten())
        case "lora" | "dora":
            found = _products(place, given["lora_A"], given["lora_B"])
        case "vera" | "dvora":
            found = {host: {name[-1].lower(): _diagonal(place.host, name, given[name]) for name in _VERA}}
        case "mtl_lora":
            found = {host: {ours: given[name] for name, ours in _MTL_LORA.items()}}
    if theirs.use_dora:
        found[host]["m"] = given["m.weight"].flatten()
    if theirs.use_gating:
        for name in ("gate.weight", "gate.bias"):
            for slot, part in zip(place.slots, given[name].chunk(len(place.blocks)), strict=True):
                found[slot.address][name] = part
    return found


_VERA = ("vera_D", "vera_B")
_MTL_LORA = {"lora_A": "A", "lora_B": "B", "task_specific.values": "L", "weights": "w"}


def _products(place: Place, a: torch.Tensor, b: torch.Tensor) -> Units:
    """A and B of each role; or of the whole module, where B (rows, n * R) is zero outside the blocks."""
    count, rank = len(place.blocks), b.shape[1]
    parts = b.chunk(count)
    if not place.whole:
        return {
            s.address: {"A": a, "B": b} for s, a, b in zip(place.slots, a.chunk(count), parts, strict=True)
        }
    whole = b.new_zeros(place.d_out, count * rank)
    for number, (rows, part) in enumerate(zip(place.stretches, parts, strict=True)):
        whole[rows, number * rank : (number + 1) * rank] = part
    return {place.host.address: {"A": a, "B": whole}}


def _scales(place: Place, theirs: LoRAFile, vector: torch.Tensor) -> Units:
    """The vectors of (IA)^3. In a fused module alpha scales the rows that have no vector, too."""
    parts = vector.chunk(len(place.blocks))
    if place.whole:
        whole = vector.new_ones(place.d_out)
        for rows, part in zip(place.stretches, parts, strict=True):
            whole[rows] = part
        return {place.host.address: {"scale": whole}}
    scaled = () if theirs.use_gating or theirs.alpha == 1 else place.others
    found = {slot.address: {"scale": part} for slot, part in zip(place.slots, parts, strict=True)}
    return found | {slot.address: {"scale": vector.new_ones(place.length)} for slot in scaled}


def _diagonal(slot: Slot, name: str, matrix: torch.Tensor) -> torch.Tensor:
    """The diagonal of a matrix that VeRA has as a vector.

    Raises: FileFormatError: `adapters` trains the whole matrix, and this one has other entries, too.
    """
    vector = matrix.diagonal()
    if not torch.equal(matrix, torch.diag(vector)):
        message = f"{name} is not diagonal; VeRA has a vector there, which cannot hold the other entries"
        raise FileFormatError(Problem("full-vera", message, slot.address))
    return vector.clone()
