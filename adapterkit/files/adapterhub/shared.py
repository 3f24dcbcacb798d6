"""The frozen matrices of VeRA, which AdapterHub keeps once for each base model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from adapterkit.errors import FileFormatError, Problem
from adapterkit.files.adapterhub.keys import Keyed
from adapterkit.files.adapterhub.member import Units
from adapterkit.files.adapterhub.places import Place

Pair = tuple[torch.Tensor, torch.Tensor]


def share(units: Units, places: Sequence[Place], given: Keyed, rank: int) -> tuple[Units, int]:
    """Units, whose d (R,) is that of the file -> units, shared A and B, and the number of pairs joined there.

    A model made of models has a pair for each, VeRA one for all. So A (n * R, D_in) and B (D_out, n * R)
    hold all pairs, and the d (n * R,) of a unit is zero where other pairs lie: its sum gains exact zeros.

    Raises: FileFormatError: matrices are not in the file, or do not fit.
    """
    pairs: list[Pair] = []
    problems: list[Problem] = []
    found = dict(units)
    for place in places:
        address = place.host.address
        try:
            own = _pair(given, place, rank)
        except FileFormatError as error:
            problems += error.problems
            continue
        same = (i for i, pair in enumerate(pairs) if all(map(torch.equal, pair, own)))
        number = next(same, len(pairs))
        pairs += [own] if number == len(pairs) else []
        found[address] = {**units[address], "d": F.pad(units[address]["d"], (number * rank, 0))}
    if problems:
        raise FileFormatError(problems)
    whole = len(pairs) * rank
    for place in places:
        unit = found[place.host.address]
        unit["d"] = F.pad(unit["d"], (0, whole - unit["d"].shape[0]))
    d_in, d_out = max(a.shape[1] for a, _ in pairs), max(b.shape[0] for _, b in pairs)
    a = torch.cat([F.pad(a, (0, d_in - a.shape[1])) for a, _ in pairs])
    b = torch.cat([F.pad(b, (0, 0, 0, d_out - b.shape[0])) for _, b in pairs], dim=1)
    return {"shared": {"A": a, "B": b}, **found}, len(pairs)


def _pair(given: Keyed, place: Place, rank: int) -> Pair:
    """The matrices of the base model that a module lies in."""
    base, shared = given.base_of(("lora", place.host.path)), given.shared
    if base is None or shared[base].keys() != {"lora_A", "lora_B"}:
        message = (
            "the file lacks VeRA's shared matrices, which AdapterHub does not save from a base model class"
        )
        problem = Problem(
            "shared-not-saved", message, place.host.address, hint="save from a class with a head"
        )
        raise FileFormatError(problem)
    a, b = shared[base]["lora_A"], shared[base]["lora_B"]
    wanted = (rank, place.d_in), (place.d_out, rank)
    if (tuple(a.shape), tuple(b.shape)) != wanted:
        message = f"the shared matrices have shapes {tuple(a.shape)} and {tuple(b.shape)}"
        raise FileFormatError(
            Problem("other-shape", message, place.host.address, f"{wanted[0]} and {wanted[1]}")
        )
    return a, b
