"""Running a program that has lanes: each lane on its part, by the same units that run alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from adapterkit.errors import CompositionError, Problem
from adapterkit.inject import cut as cuts
from adapterkit.inject.cut import Cut
from adapterkit.inject.grouped import ROWS, grouped
from adapterkit.inject.prefix import State, after_one_another, side_by_side
from adapterkit.methods.flow import Flow, first, with_first
from adapterkit.runtime import Lanes, Step

T = torch.Tensor
ENTERED = "#batch"
"""In the flow while the model that was given to attach runs."""
GENERATING = "#generate"
INDEX = {"route": "#rows", "tasks": "#tasks"}
PICKS = "#picks"
"""Positions of the examples of each lane, as far as they were looked up."""
CHOSEN = "#chosen"
"""Blocks of which one lane alone runs, while a core is called for it: number of the block -> its lane."""
KEPT = (*INDEX.values(), PICKS, ROWS, CHOSEN)
"""What is in the flow as long as a batch is."""


class Seen:
    """A host as units see it that accelerate has hooked.

    Such a hook moves every argument that has a method `to`, and with the host all its other units, those that
    are offloaded as well.
    """

    def __init__(self, host: Any) -> None:
        self._host = host

    def __getattr__(self, name: str) -> Any:
        if name == "to":
            raise AttributeError(name)
        return getattr(self._host, name)


def seen(unit: Any, host: Any) -> Any:
    """The host as a unit sees it."""
    return Seen(host) if "_hf_hook" in unit.__dict__ else host


def inputs(steps: Sequence[Step], x: Any, host: Any) -> Any:
    """What the host is called with, after the input units."""
    units = host.adapterkit._modules
    for step in steps:
        if isinstance(step, str):
            unit = units[step]
            x = unit(x, seen(unit, host))
        elif (own := narrowed(step, host)) is not None:
            x = inputs(own, x, host)
        else:
            x = _laned(step, x, host, lambda own, part, _: inputs(own, part, host))
    return x


def outputs(steps: Sequence[Step], out: Any, x: Any, host: Any) -> Any:
    """What the host gives, after the output units."""
    units = host.adapterkit._modules
    for step in steps:
        if isinstance(step, str):
            unit = units[step]
            out = unit(out, x, seen(unit, host))
        elif step.by:
            fusion: Any = units[step.by]
            out = fusion.fused(out, x, seen(fusion, host), step.lanes)
        elif (own := narrowed(step, host)) is not None:
            out = outputs(own, out, x, host)
        else:
            out = with_first(out, _outputs(step, first(out), x, host))
    return out


def lone(step: Any, out: Any, x: Any, host: Any) -> Any:
    """The same for lanes alone."""
    return with_first(out, _outputs(step, first(out), x, host))


def narrowed(step: Lanes, host: Any) -> tuple[Step, ...] | None:
    """The lane of a block that alone runs here, None if all do; see apart.py."""
    if not step.block:
        return None
    lane = host.adapterkit.runtime.override.flow.get(CHOSEN, {}).get(step.block)
    if lane is None:
        return None
    return step.lanes[lane] if lane < len(step.lanes) else ()


def keys(steps: Sequence[Step]) -> Iterator[str]:
    """Keys of all units of these steps."""
    for step in steps:
        if isinstance(step, str):
            yield step
        else:
            for lane in step.lanes:
                yield from keys(lane)


def kernel(steps: Sequence[Step], x: T, host: Any) -> State | None:
    """Keys and values of the kernel units, one prefix after another; None if there is none."""
    states, units = [], host.adapterkit._modules
    for step in steps:
        state: State | None
        if isinstance(step, str):
            state = (*units[step](x), None)
        elif (own := narrowed(step, host)) is not None:
            state = kernel(own, x, host)
        else:
            state = _kernel(step, x, host)
        if state is not None:
            states.append(state)
    return after_one_another(states, x.shape[0])


def _kernel(step: Lanes, x: T, host: Any) -> State | None:
    """The prefix that each example gets from its lane."""
    cut = cut_of(step, x, host)
    states, rows = [], []
    for lane, own in enumerate(with_none(step, cut)):
        part = cut.part(lane, x)
        rows.append(part.shape[0])
        empty = cut.empty(lane) or not own
        with Read(step, host.adapterkit.runtime.override.flow, cut, lane):
            states.append(None if empty else kernel(own, part, host))
    even = side_by_side(states, rows)
    if even is None:
        return None
    key, value = (cut.join([state[:2][i] for state in even]) for i in (0, 1))
    seen = [state[2] for state in even if state[2] is not None]
    return key, value, cut.join(seen) if seen else None


def prompt(steps: Sequence[Step], stack: str, x: T, host: Any) -> T | None:
    """The vectors (1 or B, P, D) that the prompts of a stack put among embedded tokens x (B, T, D)."""
    found, units = [], host.adapterkit._modules
    for step in steps:
        own: T | None
        if not isinstance(step, str):
            own = _prompt(step, stack, x, host)
        else:
            own = units[step].embeds[None] if units[step].stack == stack else None
        if own is not None:
            found.append(own)
    rows = max([1, *[own.shape[0] for own in found]])
    return torch.cat([own.expand(rows, -1, -1) for own in found], dim=1) if found else None


def _prompt(step: Lanes, stack: str, x: T, host: Any) -> T | None:
    if not prompt_length((step,), stack, host):
        return None
    cut = cut_of(step, x, host)
    parts: list[T | None] = []
    for lane, own in enumerate(step.lanes):
        part = cut.part(lane, x)
        with Read(step, host.adapterkit.runtime.override.flow, cut, lane):
            vectors = prompt(own, stack, part, host)
        parts.append(None if vectors is None else vectors.expand(part.shape[0], -1, -1))
    if step.kind in INDEX:
        if not cut.empty(len(step.lanes)):
            message = "some examples take no adapter, but all of one batch have a prompt, or none has"
            raise CompositionError(Problem("uneven-prompts", message, host.adapterkit.key))
        parts.append(parts[0] if isinstance(cut, cuts.Mask) else _nothing(parts[0]))
    return cut.join([part for part in parts if part is not None])


def _nothing(part: T | None) -> T | None:
    return None if part is None else part[:0]


def prompt_length(steps: Sequence[Step], stack: str, host: Any) -> int:
    """How many positions the prompts of a stack take; the lanes of a block take the same number."""
    total, units = 0, host.adapterkit._modules
    for step in steps:
        if not isinstance(step, str):
            total += prompt_length(step.lanes[0], stack, host)
        elif units[step].stack == stack:
            total += int(units[step].embeds.shape[0])
    return total


def _outputs(step: Lanes, out: T, x: Any, host: Any) -> T:
    if isinstance(x, T) and x.ndim > 1:
        site = host.adapterkit
        if step.kind == "rows":
            _entered(site)
        whole = grouped(step, out, x, site, lambda: _index(step, out, host))
        if whole is not None:
            return whole

    def run(own: Sequence[Step], part: T, read: Callable[[Any], Any]) -> T:
        found: T = outputs(own, part, read(x), host)
        return found

    return _laned(step, out, host, run)


def instead(step: Step, args: tuple[Any, ...], kwargs: dict[str, Any], host: Any, original: Any) -> Any:
    """What a head of an adapter's own gives, for each lane the one it has; else the model's."""
    site = host.adapterkit
    if isinstance(step, str):
        return site._modules[step](*args, **kwargs)
    cut = cut_of(step, tensor_in((args, kwargs)), host)
    parts: list[Any] = []
    for lane, own in enumerate(with_none(step, cut)):
        if idle(lane, cut):
            parts.append(None)
            continue
        given, named = cut.part(lane, args), cut.part(lane, kwargs)
        with Read(step, site.runtime.override.flow, cut, lane):
            if own:
                parts.append(instead(own[0], given, named, host, original))
            else:
                parts.append(original(host, *given, **named))
    return joined(cut, parts)


def tensor_in(value: Any) -> Any:
    """The first tensor of what a head is called with: some read the states of several layers."""
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if not isinstance(value, tuple | list):
        return value if isinstance(value, T) else None
    for item in value:
        found = tensor_in(item)
        if found is not None:
            return found
    return None


def joined(cut: Cut, parts: Sequence[Any]) -> Any:
    """Outputs of lanes put together: tensors, or tuples of them; lanes without examples have none."""
    real = [part for part in parts if part is not None]
    if not real:
        return None
    if isinstance(real[0], T):
        return cut.join([real[0][:0] if part is None else part for part in parts])
    if type(real[0]) is tuple:
        columns = ([None if part is None else part[i] for part in parts] for i in range(len(real[0])))
        return tuple(joined(cut, column) for column in columns)
    if isinstance(real[0], Mapping):
        named = {key: joined(cut, [None if p is None else p[key] for p in parts]) for key in real[0]}
        return type(real[0])(**named) if hasattr(real[0], "to_tuple") else named
    if real[0] is None or all(part is real[0] for part in real):
        return real[0]
    message = f"heads that give {type(real[0]).__name__} cannot act on parts of a batch"
    raise CompositionError(Problem("unfit-head", message, expected="heads that give tensors"))


# ------------------------------------------------------------------------------------------------- one block


def with_none(step: Lanes, cut: Cut) -> list[tuple[Step, ...]]:
    """The lanes, and where the batch may take none, one for that."""
    return [*step.lanes, step.none] if step.kind in INDEX else list(step.lanes)


def idle(lane: int, cut: Cut) -> bool:
    """Whether no example of a lane is there. A compiled graph cannot tell: it calls all, for all examples."""
    return cut.empty(lane) and not isinstance(cut, cuts.Mask)


class Read:
    """While a lane runs: the flow holds its part of what its units read."""

    def __init__(self, step: Lanes, flow: Flow, cut: Cut, lane: int) -> None:
        self.step, self.flow, self.cut, self.lane = step, flow, cut, lane
        self.saved: Flow = {}

    def __enter__(self) -> None:
        for key in self.step.reads:
            whole = self.flow.get(key)
            if whole is not None:
                part = self.cut.part(self.lane, whole)
                if part is not whole:
                    self.saved[key] = whole
                    self.flow[key] = part

    def __exit__(self, *error: object) -> None:
        self.flow.update(self.saved)


def _laned(step: Lanes, value: T, host: Any, run: Callable[..., T]) -> T:
    """A value (B, T, ...) after a block.

    Args: run: (steps, part, read) -> what the steps of a lane make of its part; read(value) is the lane's
        part of anything beside.
    """
    flow = host.adapterkit.runtime.override.flow
    cut = cut_of(step, value, host)
    pending = [_Pending(branch, flow) for branch in step.leaves]
    parts, same = [], True
    for lane, own in enumerate(with_none(step, cut)):
        part = cut.take(lane, value)
        result = part
        for branch in pending:
            branch.give(cut, lane)
        if own and not cut.empty(lane):
            with Read(step, flow, cut, lane):
                result = run(own, part, lambda given, lane=lane: cut.part(lane, given))
        same = same and result is part
        parts.append(result)
        for branch in pending:
            branch.take(result)
    for branch in pending:
        branch.join(cut, parts)
    if same and type(cut) is Cut and not torch.is_grad_enabled():
        return value  # every unit has written into its own slice
    return cut.join(parts)


class _Pending:
    """What units of one branch have left besides their outputs: see methods/flow.py for the marks."""

    def __init__(self, branch: str, flow: Flow) -> None:
        self.branch, self.flow = branch, flow
        self.before = {mark: flow.pop(f"{branch}{mark}", None) for mark in "=?^"}
        self.found: list[dict[str, Any]] = []

    def give(self, cut: Cut, lane: int) -> None:
        for mark, value in self.before.items():
            if value is not None:
                self.flow[f"{self.branch}{mark}"] = cut.part(lane, value)

    def take(self, part: T) -> None:
        self.found.append({mark: self.flow.pop(f"{self.branch}{mark}", None) for mark in "=?^"})

    def join(self, cut: Cut, parts: Sequence[T]) -> None:
        done = [found["="] for found in self.found]
        if any(value is not None for value in done):
            whole = all(found["="] is not None and found["?"] is None for found in self.found)
            if isinstance(cut, cuts.Mean) and not whole:
                message = "leaves out the model's own norm with some of the averaged adapters, not with all"
                raise CompositionError(Problem("mixed-average", message, self.branch))
            values = [h if value is None else value for value, h in zip(done, parts, strict=True)]
            self.flow[f"{self.branch}="] = cut.join(values)
            if not whole:
                masks = [
                    _like(h, found["="] is not None if found["?"] is None else found["?"], torch.bool)
                    for h, found in zip(parts, self.found, strict=True)
                ]
                self.flow[f"{self.branch}?"] = cut.join(masks)
        shares = [found["^"] for found in self.found]
        if any(share is not None for share in shares):
            numbers = [0.0 if share is None else share for share in shares]
            if not isinstance(cut, cuts.Mean) and all(
                share == 1.0 for share in numbers if not _tensor(share)
            ):
                if not any(map(_tensor, numbers)):
                    self.flow[f"{self.branch}^"] = 1.0
                    return
            filled = [_like(h, number, h.dtype) for h, number in zip(parts, numbers, strict=True)]
            if isinstance(cut, cuts.Mean):
                cut = cuts.Mean(cut.shares, torch.zeros_like(filled[0]))
            self.flow[f"{self.branch}^"] = cut.join(filled)


def _tensor(value: Any) -> bool:
    return isinstance(value, T)


def _like(h: T, value: Any, dtype: torch.dtype) -> T:
    """One number for each position of h (B, T, D): (B, T, 1)."""
    shape = (*h.shape[:-1], 1)
    return (
        value.expand(shape).to(dtype)
        if _tensor(value)
        else torch.full(shape, value, dtype=dtype, device=h.device)
    )


# ---------------------------------------------------------------------------------------- which part is whose


def cut_of(step: Lanes, value: T, host: Any) -> Cut:
    """How the lanes of a block take their parts of a value at a host.

    Raises: CompositionError: the model was not entered where it should be, or the sizes do not fit.
    """
    site = host.adapterkit
    match step.kind:
        case "average":
            return cuts.Mean(step.numbers, value)
        case "split":
            return cuts.segments(step.numbers, value, site.key)
        case "rows":
            _entered(site)
            return cuts.rows(step.numbers, value, site.key)
    index, each = _index(step, value, host)
    if torch.compiler.is_compiling():
        return cuts.Mask(index.repeat_interleave(each) if each > 1 else index, len(step.lanes))
    return _picked(index, each, len(step.lanes), site.runtime.override.flow)


def _entered(site: Any) -> None:
    flow = site.runtime.override.flow
    if ENTERED in flow or GENERATING in flow or torch._C._current_graph_task_id() != -1:
        return
    message = (
        f"{site.key} was called from outside the model that was given to attach, so the batch is unknown"
    )
    expected = "a call of that model; kit.generate(...) in place of model.generate(...)"
    raise CompositionError(Problem("not-entered", message, expected=expected))


def _index(step: Lanes, value: T, host: Any) -> tuple[T, int]:
    """For each example the lane it takes (B,), and how many rows of the value each example has.

    Raises: CompositionError: the batch should say, but does not; or there are other rows than said.
    """
    site = host.adapterkit
    override = site.runtime.override
    key = INDEX[step.kind]
    index: T | None = override.flow.get(key)
    if index is None:
        index = override.rows if step.kind == "route" else override.tasks
    if index is None:
        word, option = ("Route", "rows") if step.kind == "route" else ("MultiTask", "task_ids")
        message = f"{word} acts, but nothing says which adapter each example takes"
        expected = f"kit.using(..., {option}=...), or the column of the batch"
        raise CompositionError(Problem("no-rows", message, expected=expected))
    given, known = value.shape[0], index.shape[0] or 1  # an empty batch is one, too
    if given % known or (given != known and ENTERED not in override.flow and GENERATING not in override.flow):
        message = f"{site.key} is called with {given} rows, but {known} examples were named"
        raise CompositionError(Problem("batch-mismatch", message))
    return index.to(value.device), given // known


def _picked(index: T, each: int, lanes: int, flow: Flow) -> Cut:
    """Positions of the examples of each lane; looked up once for each index in a forward pass."""
    known: list[tuple[T, tuple[int, int], Cut]] = flow.setdefault(PICKS, [])
    for other, sizes, found in known:
        if other is index and sizes == (each, lanes):
            return found
    said = [chosen for chosen in index.tolist() for _ in range(each)]
    groups = [[at for at, chosen in enumerate(said) if chosen == lane] for lane in range(lanes)]
    groups.append([at for at, chosen in enumerate(said) if not 0 <= chosen < lanes])
    order = torch.tensor([at for group in groups for at in group], device=index.device).argsort()
    made = cuts.Pick([torch.tensor(g, dtype=torch.long, device=index.device) for g in groups], order)
    if len(known) > 8:
        known.clear()
    known.append((index, (each, lanes), made))
    return made
