"""Lanes of one unit each, run as one by stacked weights, where their method can."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from adapterkit.methods import lora_lanes
from adapterkit.methods.lora import LoRA
from adapterkit.methods.lora_lanes import Rows, Stacked
from adapterkit.runtime import Lanes

T = torch.Tensor
_KEPT = 8
ROWS = "#rows.chosen"
"""In the flow: what was made of an index, so that it is made once for all sites."""


class Kept(NamedTuple):
    """Stacked weights and what they were made of."""

    units: list[Any]
    """The units, without those of empty lanes."""
    state: list[int]
    dropout: bool
    stacked: Stacked


def grouped(step: Lanes, out: T, x: Any, site: Any, index: Callable[[], tuple[T, int]]) -> T | None:
    """What the lanes of a block make of an output, if their units have a form for all at once; else None.

    Args: index: the lane of each example, and how many rows of `out` an example has.
    """
    even = step.kind == "rows" and len(set(step.numbers)) == 1 and x.shape[0] % len(step.lanes) == 0
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
    rows = _rows(site, *index(), len(step.lanes), x.dtype)
    return lora_lanes.chosen(out, x, unit, stacked, rows)


def _stacked(site: Any, step: Lanes) -> tuple[LoRA, Stacked] | None:
    """Stacked weights: made anew where they are trained or compiled, else kept while they are the same."""
    compiling = torch.compiler.is_compiling()
    known: Kept | None = None if compiling else site.stacked.get(step.lanes)
    if known is not None:
        first = known.units[0]
        trained = _trained(known.units)
        if not trained and not (known.dropout and first.training) and _state(known.units) == known.state:
            return first, known.stacked
    units = [_unit(site._modules, lane) for lane in step.lanes]
    real: list[Any] = [unit for unit in units if unit is not None]
    if not all([type(unit) is LoRA for unit in real]) or not lora_lanes.fit(units):
        return None
    if compiling:
        return real[0], lora_lanes.stack(units)
    if _trained(real):
        # what writes to weights unseen, through their `data`, does so in training
        site.stacked.clear()
        return real[0], lora_lanes.stack(units)
    with torch.inference_mode(False), torch.no_grad():
        made = lora_lanes.stack(units)
    if len(site.stacked) >= _KEPT:
        site.stacked.clear()
    dropout = any([bool(unit.dropout) for unit in real])
    site.stacked[step.lanes] = Kept(real, _state(real), dropout, made)
    return real[0], made


def _unit(modules: Any, lane: Any) -> Any:
    """The only unit of a lane, None if it has none, False if it is not that simple."""
    if not lane:
        return None
    return modules[lane[0]] if len(lane) == 1 and isinstance(lane[0], str) else False


def _trained(units: list[Any]) -> bool:
    return torch.is_grad_enabled() and any([t.requires_grad for unit in units for t in (unit.A, unit.B)])


def _state(units: list[Any]) -> list[int]:
    """Changes whenever the weights of units do: a tensor that is moved keeps its version, one that is written
    to keeps its place.
    """
    tensors = [unit._parameters[name] for unit in units for name in ("A", "B")]
    return [t._version for t in tensors] + [t.data_ptr() for t in tensors]


def _rows(site: Any, index: T, each: int, lanes: int, dtype: torch.dtype) -> Rows:
    compiling = torch.compiler.is_compiling()
    flow, sort = site.runtime.override.flow, (each, lanes, dtype)
    known = None if compiling else flow.get(ROWS)
    if known is not None and known[0] is index and known[1] == sort:
        found: Rows = known[2]
        return found
    whole = index.repeat_interleave(each) if each > 1 else index
    made = lora_lanes.rows_of(whole, lanes, dtype)
    if not compiling:
        flow[ROWS] = (index, sort, made)
    return made
