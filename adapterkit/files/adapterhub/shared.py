"""The frozen matrices of VeRA, which AdapterHub keeps once for each base model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from adapterkit.errors import FileFormatError, Problem


@dataclass(frozen=True)
class SharedMatrices:
    """A (n * R, D_in) and B (D_out, n * R) of `count` base models, and which of them each module reads.

    A model made of models has one pair for each. They are joined, and a module's d is zero where the other pairs are:
    exact zeros are added, so that the numbers stay those of the file.
    """

    A: torch.Tensor
    B: torch.Tensor
    count: int
    index: Mapping[str, int]

    def spread(self, module: str, d: torch.Tensor) -> torch.Tensor:
        """D (R,) of a module as (n * R,)."""
        rank = d.shape[0]
        whole = d.new_zeros(self.count * rank)
        start = self.index[module] * rank
        whole[start : start + rank] = d
        return whole


def join(
    pairs: Mapping[str, Mapping[str, torch.Tensor]], modules: Mapping[str, tuple[int, int]], rank: int
) -> SharedMatrices:
    """The matrices for these modules.

    Args: pairs: path of a base model -> its `lora_A` and `lora_B`; modules: path of a module -> (D_out, D_in) of it.
    Raises: FileFormatError: they are not in the file, or do not fit.
    """
    problems, unique, index = [], list[tuple[torch.Tensor, torch.Tensor]](), {}
    for module, (d_out, d_in) in modules.items():
        base = max((b for b in pairs if not b or module.startswith(f"{b}.")), key=len, default=None)
        pair = pairs.get(base, {}) if base is not None else {}
        if pair.keys() != {"lora_A", "lora_B"}:
            message = "the file lacks the matrices that VeRA shares; AdapterHub does not save them from a base model class"
            problems.append(
                Problem("shared-not-saved", message, module, hint="save from a class with a head")
            )
            continue
        a, b = pair["lora_A"], pair["lora_B"]
        if a.shape != (rank, d_in) or b.shape != (d_out, rank):
            message = f"shared matrices of shapes {tuple(a.shape)} and {tuple(b.shape)} do not fit the module"
            problems.append(Problem("other-shape", message, module, f"{(rank, d_in)} and {(d_out, rank)}"))
            continue
        same = (i for i, (x, y) in enumerate(unique) if torch.equal(x, a) and torch.equal(y, b))
        index[module] = next(same, len(unique))
        if index[module] == len(unique):
            unique.append((a, b))
    if problems:
        raise FileFormatError(problems)
    d_in = max(a.shape[1] for a, _ in unique)
    d_out = max(b.shape[0] for _, b in unique)
    return SharedMatrices(
        torch.cat([F.pad(a, (0, d_in - a.shape[1])) for a, _ in unique]),
        torch.cat([F.pad(b, (0, 0, 0, d_out - b.shape[0])) for _, b in unique], dim=1),
        len(unique),
        index,
    )
