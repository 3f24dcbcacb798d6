"""Attention whose projections also map what belongs to no example: its core is called once for each lane.

A projection of relative positions gives one row for all examples, so that in one call it cannot be another
one for each of them. The core around it can: it treats examples apart, and is called with those of one lane
at a time, while the blocks inside do what that lane does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from adapterkit.inject import lanes
from adapterkit.inject.cut import Cut
from adapterkit.methods.flow import Flow, given_arguments
from adapterkit.runtime import Around, Lanes

Call = Callable[[dict[str, Any]], Any]


def around(found: Around, args: tuple[Any, ...], kwargs: dict[str, Any], host: Any, call: Call) -> Any:
    """What the core gives for all examples.

    Args: call: runs the core with arguments by name.
    """
    return _lanes(found.step, found.whole, given_arguments(host, args, kwargs), host, call)


def runs_whole(found: Around, host: Any) -> bool:
    """Whether the core is called with the examples of all lanes."""
    return found.step.block not in host.adapterkit.runtime.override.flow.get(lanes.CHOSEN, {})


def _lanes(step: Lanes, whole: frozenset[str], given: dict[str, Any], host: Any, call: Call) -> Any:
    flow: Flow = host.adapterkit.runtime.override.flow
    cut = lanes.cut_of(step, lanes.tensor_in(given), host)
    chosen: dict[int, int] = flow.setdefault(lanes.CHOSEN, {})
    parts: list[Any] = []
    left: list[Flow | None] = []
    before = dict(flow)
    for lane, own in enumerate(lanes.with_none(step, cut)):
        if lanes.idle(lane, cut):
            parts.append(None)
            left.append(None)
            continue
        part = {n: value if n in whole else cut.part(lane, value) for n, value in given.items()}
        with lanes.Read(step, flow, cut, lane):
            read = dict(flow)
            chosen[step.block] = lane
            try:
                parts.append(_inside(own, whole, part, host, call))
            finally:
                del chosen[step.block]
            left.append({key: value for key, value in flow.items() if read.get(key) is not value})
        flow.clear()
        flow.update(before)
    _join(flow, cut, left)
    return lanes.joined(cut, parts)


def _inside(own: tuple[Any, ...], whole: frozenset[str], given: dict[str, Any], host: Any, call: Call) -> Any:
    return _lanes(own[0], whole, given, host, call) if own else call(given)


def _join(flow: Flow, cut: Cut, left: list[Flow | None]) -> None:
    """What units and helpers inside have left for others behind the core."""
    found = [own for own in left if own is not None]
    for key in dict.fromkeys(key for own in found for key in own if key not in lanes.KEPT):
        flow[key] = lanes.joined(cut, [None if own is None else own.get(key) for own in left])
