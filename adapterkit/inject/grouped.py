"""Lanes of one unit each, run as one by stacked weights, where their method can."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from adapterkit.methods import lora_lanes
from adapterkit.methods.lora import LoRA
from adapterkit.methods.lora_lanes import Rows, Stacked
from adapterkit.runtime import Lanes

T = torch.Tensor
_KEPT = 8
ROWS = "#rows.chosen"
"""In the flow: what was made of an index, so that it is made once for all sites."""


def grouped(step: Lanes, out: T, x: Any, host: Any, index: Callable[[], tuple[T, int]]) -> T | None:
    """What the lanes of a block make of an output, if their units have a form for all at once; else None.

    Args: index: the lane of each example, and how many rows of `out` an example has.
    """
    site = host.adapterkit
    modules = site._modules
    units = [_unit(modules, lane) for lane in step.lanes]
    if step.kind not in ("rows", "route", "tasks") or not all(
        unit is None or type(unit) is LoRA for unit in units
    ):
        return None
    if not isinstance(x, T) or x.ndim < 2 or x.shape[0] != out.shape[0] or not lora_lanes.fit(units):
        return None
    first: Any = next(unit for unit in units if unit is not None)
    if torch.is_autocast_enabled(x.device.type):
        return None
    x = x.to(first.A.dtype)
    if step.kind == "rows":
        if len(set(step.numbers)) > 1 or x.shape[0] % len(units):
            return None
        return lora_lanes.equal(out, x, first, _stacked(site, step, units))
    rows = _rows(site, *index(), len(units), x.dtype)
    return lora_lanes.chosen(out, x, first, _stacked(site, step, units), rows)


def _unit(modules: Any, lane: Any) -> Any:
    """The only unit of a lane, None if it has none, False if it is not that simple."""
    if not lane:
        return None
    return modules[lane[0]] if len(lane) == 1 and isinstance(lane[0], str) else False


def _stacked(site: Any, step: Lanes, units: list[Any]) -> Stacked:
    """Stacked weights: made anew where they are trained or compiled, else kept while they are the same."""
    if torch.compiler.is_compiling():
        return lora_lanes.stack(units)
    sources = lora_lanes.tensors(units)
    if torch.is_grad_enabled() and any([tensor.requires_grad for tensor in sources]):
        site.stacked.clear()
        return lora_lanes.stack(units)
    # a tensor that is moved keeps its version, one that is written its place
    state = [(tensor.data_ptr(), tensor._version, tensor.dtype) for tensor in sources]
    known = site.stacked.get(step.lanes)
    if known is not None and known[0] == state:
        found: Stacked = known[1]
        return found
    with torch.inference_mode(False), torch.no_grad():
        made = lora_lanes.stack(units)
    if len(site.stacked) >= _KEPT:
        site.stacked.clear()
    site.stacked[step.lanes] = (state, made)
    return made


def _rows(site: Any, index: T, each: int, lanes: int, dtype: torch.dtype) -> Rows:
    flow, sort = site.runtime.override.flow, (each, lanes, dtype)
    known = None if torch.compiler.is_compiling() else flow.get(ROWS)
    if known is not None and known[0] is index and known[1] == sort:
        found: Rows = known[2]
        return found
    whole = index.repeat_interleave(each) if each > 1 else index
    made = lora_lanes.rows_of(whole, lanes, dtype)
    if not torch.compiler.is_compiling():
        flow[ROWS] = (index, sort, made)
    return made
