"""Their tensors: which a place must have, and what they are in the words of our units."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from adapterkit.errors import FileFormatError, Problem
from adapterkit.files.adapterhub.config import LoRAFile
from adapterkit.files.adapterhub.places import Place
from adapterkit.model.blueprint import Slot

Tensors = Mapping[str, torch.Tensor]


def shapes(place: Place, theirs: LoRAFile) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that they keep at a place (adapters 1.3.0, methods/lora.py)."""
    blocks, rank = len(place.blocks), theirs.r
    d_in = (place.host.shape or (0, 0))[1]
    rows = blocks * place.length
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
        # they crash, or ignore a part of the adapter without saying so
        message = f"AdapterHub does not compute {theirs.kind} at fused or transposed matrices such as {place.host.path}"
        yield Problem("unsupported-slot", message, place.host.address)
    if theirs.use_gating and place.by_blocks:
        message = f"the file has {len(place.blocks)} gates at {place.host.path}, each for a third of rows that is no role"
        yield Problem("gated-blocks", message, place.host.address)


def units(place: Place, theirs: LoRAFile, given: Tensors) -> dict[str, torch.Tensor]:
    """Our tensors at a place by '<address>.<parameter>'; VeRA's d is as in the file."""
    count = len(place.blocks)
    match theirs.kind:
        case "ia3":
            return _scales(place, theirs, given)
        case "lora" | "dora":
            found = _blockwise(place, given["lora_A"], given["lora_B"])
            if theirs.use_gating:
                for slot, weight, bias in zip(
                    place.slots,
                    given["gate.weight"].chunk(count),
                    given["gate.bias"].chunk(count),
                    strict=True,
                ):
                    found |= {f"{slot.address}.gate.weight": weight, f"{slot.address}.gate.bias": bias}
        case "vera" | "dvora":
            d, b = (_diagonal(place.host, name, given[name]) for name in ("vera_D", "vera_B"))
            found = _at(place.host, d=d, b=b)
        case "mtl_lora":
            own = {
                "A": given["lora_A"],
                "B": given["lora_B"],
                "L": given["task_specific.values"],
                "w": given["weights"],
            }
            found = _at(place.host, **own)
    return found | (_at(place.host, m=given["m.weight"].flatten()) if theirs.use_dora else {})


def _at(slot: Slot, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"{slot.address}.{name}": tensor for name, tensor in tensors.items()}


def _blockwise(place: Place, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
    """A and B of each role; or of the whole module, where B (rows, n * R) is zero outside the blocks."""
    count = len(place.blocks)
    parts = list(zip(place.blocks, a.chunk(count), b.chunk(count), strict=True))
    if not place.by_blocks:
        return {
            k: v
            for slot, (_, a, b) in zip(place.slots, parts, strict=True)
            for k, v in _at(slot, A=a, B=b).items()
        }
    rank = b.shape[1]
    whole = b.new_zeros((place.host.shape or (0, 0))[0], count * rank)
    for i, (block, _, part) in enumerate(parts):
        whole[block * place.length : (block + 1) * place.length, i * rank : (i + 1) * rank] = part
    return _at(place.host, A=a, B=whole)


def _scales(place: Place, theirs: LoRAFile, given: Tensors) -> dict[str, torch.Tensor]:
    """The vectors of (IA)^3. In a fused module alpha scales the rows that have no vector, too."""
    count = len(place.blocks)
    parts = given["lora_B"].flatten().chunk(count)
    if place.by_blocks:
        whole = parts[0].new_ones((place.host.shape or (0, 0))[0])
        for block, part in zip(place.blocks, parts, strict=True):
            whole[block * place.length : (block + 1) * place.length] = part
        return _at(place.host, scale=whole)
    found = {f"{slot.address}.scale": part for slot, part in zip(place.slots, parts, strict=True)}
    if theirs.use_gating:
        gates = zip(
            place.slots, given["gate.weight"].chunk(count), given["gate.bias"].chunk(count), strict=True
        )
        for slot, weight, bias in gates:
            found |= {f"{slot.address}.gate.weight": weight, f"{slot.address}.gate.bias": bias}
    elif theirs.alpha != 1:
        found |= {f"{slot.address}.scale": parts[0].new_ones(place.length) for slot in place.others}
    return found


def _diagonal(slot: Slot, name: str, matrix: torch.Tensor) -> torch.Tensor:
    """The diagonal of a matrix that VeRA has as a vector.

    Raises: FileFormatError: `adapters` trains the whole matrix, and this one has other entries, too.
    """
    vector = matrix.diagonal()
    if not torch.equal(matrix, torch.diag(vector)):
        message = (
            f"{name} is no diagonal matrix; VeRA has a vector there, so that the file cannot be reproduced"
        )
        raise FileFormatError(Problem("full-vera", message, slot.address))
    return vector.clone()
