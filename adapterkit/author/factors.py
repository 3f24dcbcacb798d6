"""The factor of a branch where it is added to the stream, as the numbers of one forward pass show it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from adapterkit.author.layers import BranchFacts
from adapterkit.author.observe import Observation

CLOSE = 1e-4


def factor(found: Observation, facts: BranchFacts, value: int) -> float | torch.Tensor | None:
    """What a value of the branch is multiplied by on its way to the add: a number, or one for each channel.

    Args: value: what the last module of the branch gives (..., D).
    Returns: None if it is neither; see `varies`.
    """
    pair = _pair(found, facts, value)
    if pair is None:
        return None
    by = _ratio(*pair, 0)
    if by is None:
        return None
    return (
        float(by.mean()) if bool(((by - by.mean()).abs() <= CLOSE * by.abs().max()).all()) else by.flatten()
    )


def varies(found: Observation, facts: BranchFacts, value: int) -> bool:
    """Whether the factor is one of each example, or of each token: a gate that is made of the inputs."""
    pair = _pair(found, facts, value)
    if pair is None or factor(found, facts, value) is not None:
        return False
    examples = found.tensors[facts.stream].shape[0]
    before, after = (one.view(examples, -1, one.shape[-1]) for one in pair)
    each = [_ratio(x, y, 0) for x, y in zip(before, after, strict=True)]
    channels = _ratio(pair[0].t(), pair[1].t(), 0)
    return all(one is not None for one in each) or channels is not None


def named(layer: nn.Module, config: Any, by: float | torch.Tensor) -> str | float | None:
    """The word for a factor: the field of the config or attribute of the layer that is it, else a number."""
    if isinstance(by, torch.Tensor):
        own = layer.named_parameters(recurse=False)
        return next((n for n, p in own if p.numel() == by.numel() and _is_it(p.detach(), by)), None)
    holders = [vars(holder) for holder in (config, layer) if holder is not None]
    held = [n for one in holders for n, v in one.items() if type(v) is float and _is_it(torch.tensor(v), by)]
    return held[0] if len(held) == 1 else float(f"{by:.6g}")


def _is_it(held: torch.Tensor, by: float | torch.Tensor) -> bool:
    wanted = torch.as_tensor(by).double()
    return bool(torch.isclose(held.double().flatten(), wanted, rtol=1e-3).all())


def _pair(found: Observation, facts: BranchFacts, value: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The value and what is added, as rows (N, D); rows that are zero, as those of padding, stay zero."""
    before, after = found.tensors[value], found.tensors[facts.term]
    shape = found.tensors[facts.stream].shape
    if before.shape != after.shape or after.shape != shape or len(shape) < 3:
        return None
    return before.double().flatten(0, -2), after.double().flatten(0, -2)


def _ratio(before: torch.Tensor, after: torch.Tensor, dim: int) -> torch.Tensor | None:
    """The quotient along an axis, if it is the same everywhere; the largest numbers tell it best."""
    rows = (after != 0).any(dim=1, keepdim=True).expand_as(after)
    known = torch.where(rows, before, torch.zeros_like(before))
    at = known.abs().argmax(dim=dim, keepdim=True)
    base = known.gather(dim, at)
    if not bool((base != 0).all()):
        return None
    by = after.gather(dim, at) / base
    wrong = torch.where(rows, after - before * by, torch.zeros_like(after)).abs().max()
    return by if bool(wrong <= CLOSE * after.abs().max()) else None
