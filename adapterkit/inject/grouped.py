"""Lanes of one unit each, run as one by stacked weights, where their method can."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from adapterkit.methods import lora_lanes
from adapterkit.methods.kept import Frozen, keepable
from adapterkit.methods.lora import LoRA
from adapterkit.methods.lora_lanes import Rows, Stacked
from adapterkit.runtime import Lanes

T = torch.Tensor
_KEPT = 8
_LAST = "last"
"""In the weights kept at a site: those that were used last, found without looking at all lanes."""
ROWS = "#rows.chosen"
"""In the flow: what was made of an index, so that it is made once for all sites."""


class Kept(NamedTuple):
    """Stacked weights and what they were made of."""

    units: list[Any]
    """The units, without those of empty lanes."""
    parameters: list[Any]
    """Their parameters by name."""
    state: Frozen
    dropout: bool
    stacked: Stacked


def grouped(step: Lanes, out: T, x: Any, site: Any, index: Callable[[], tuple[T, int]]) -> T | None:
    """What the lanes of a block make of an output, if their units have a form for all at once; else None.

    Args: index: the lane of each example, and how many rows of `out` an example has.
    """
    numbers = step.numbers
    even = (
        step.kind == "rows" and numbers.count(numbers[0]) == len(numbers) and x.shape[0] % len(numbers) == 0
    )
    if not even and step.kind not in ("route", "tasks"):
        return None
    if x.shape[0] != out.shape[0] or torch.is_autocast_enabled(x.device.type):
        return None
    found = _stacked(site, step)
    if found is None:
        return None
    unit, stacked = found
    dtype = unit._parameters["A"].dtype  # type: ignore[union-attr]
    x = x if x.dtype is dtype else x.to(dtype)
    if even:
        return lora_lanes.equal(out, x, unit, stacked)
    rows = _rows(site, *index(), stacked)
    return lora_lanes.chosen(out, x, unit, stacked, rows)


def _stacked(site: Any, step: Lanes) -> tuple[LoRA, Stacked] | None:
    """Stacked weights: made anew where they can be trained or are compiled, else kept while unchanged."""
    compiling = torch.compiler.is_compiling()
    known = None if compiling else _known(site, step)
    if known is not None:
        first = known.units[0]
        if not (known.dropout and first.training) and known.state.are(_tensors(known.parameters)):
            return first, known.stacked
    units = [_unit(site._modules, lane) for lane in step.lanes]
    real: list[Any] = [unit for unit in units if unit is not None]
    if not all([type(unit) is LoRA for unit in real]) or not lora_lanes.fit(units):
        return None
    if compiling:
        return real[0], lora_lanes.stack(units)
    parameters = [unit._parameters for unit in real]
    if not keepable(_tensors(parameters)):
        site.stacked.clear()
        return real[0], lora_lanes.stack(units, looked_at=not torch.is_grad_enabled())
    with torch.inference_mode(False), torch.no_grad():
        made = lora_lanes.stack(units, looked_at=True)
    if len(site.stacked) >= _KEPT:
        site.stacked.clear()
    dropout = any([bool(unit.dropout) for unit in real])
    site.stacked[step.lanes] = Kept(real, parameters, Frozen(_tensors(parameters)), dropout, made)
    site.stacked.pop(_LAST, None)
    return real[0], made


def _known(site: Any, step: Lanes) -> Kept | None:
    last: tuple[Any, Kept] | None = site.stacked.get(_LAST)
    if last is not None and last[0] is step.lanes:
        return last[1]
    found: Kept | None = site.stacked.get(step.lanes)
    if found is not None:
        site.stacked[_LAST] = (step.lanes, found)
    return found


def _unit(modules: Any, lane: Any) -> Any:
    """The only unit of a lane, None if it has none, False if it is not that simple."""
    if not lane:
        return None
    return modules[lane[0]] if len(lane) == 1 and isinstance(lane[0], str) else False


def _tensors(parameters: list[Any]) -> list[Any]:
    """A and B of all; None for what is no parameter, as where a parametrisation computes it."""
    return [own.get("A") for own in parameters] + [own.get("B") for own in parameters]


def _rows(site: Any, index: T, each: int, stacked: Stacked) -> Rows:
    lanes, rank, _ = stacked.lanes_a.shape
    if torch.compiler.is_compiling():
        return _rows_of(index, each, stacked)
    flow, sort = site.runtime.override.flow, (each, lanes, rank)
    known = flow.get(ROWS)
    if known is None or known[0] is not index:
        known = flow[ROWS] = (index, {})
    found: Rows | None = known[1].get(sort)
    if found is None:
        found = known[1][sort] = _rows_of(index, each, stacked)
    return found


def _rows_of(index: T, each: int, stacked: Stacked) -> Rows:
    return lora_lanes.rows_of(index.repeat_interleave(each) if each > 1 else index, stacked)
