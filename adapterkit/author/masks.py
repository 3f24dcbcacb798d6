"""Which argument hides tokens, and with which value: a hidden token changes nothing beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from inspect import Parameter, signature
from typing import Any, Literal

import torch
from torch import nn

from adapterkit.author.observe import observe
from adapterkit.author.recorder import Enter
from adapterkit.methods.flow import base_forward

Run = Callable[[Mapping[str, Any], bool], torch.Tensor | None]
"""What a first layer makes (B, T, D) with these arguments of the entry; True: what they say, or the stream
before that layer, differs at position T // 2. None if it does not run."""
Part = Callable[[torch.Tensor], torch.Tensor]


def visible(run: Run, name: str, shape: tuple[int, ...], kinds: Iterable[torch.dtype]) -> int | None:
    """The value with which an argument lets tokens be seen, 1 or 0; None if it hides none.

    Args:
        run: see `Run`; positions that may change anyway are not among what it gives.
        shape: that of the mask: (B, T), perhaps with axes of one between.
        kinds: types that the argument may have, the likeliest first.
    """
    for kind in kinds:
        for value in (1, 0):
            seen = torch.full(shape, value).to(kind)
            hidden = seen.clone()
            hidden[..., shape[-1] // 2] = 1 - value
            if _differ(run, {name: seen}) and _differ(run, {name: hidden}) is False:
                return value
    return None


def form(given: torch.Tensor | None, shape: tuple[int, int]) -> tuple[int, ...]:
    """The shape of a mask: that of what was given, if it is (B, T) with axes of one between, else (B, T)."""
    if given is None or given.ndim < 3 or (given.shape[0], given.shape[-1]) != shape:
        return shape
    return tuple(given.shape) if given.numel() == shape[0] * shape[1] else shape


def _differ(run: Run, mask: Mapping[str, Any]) -> bool | None:
    before, after = run(mask, False), run(mask, True)
    if before is None or after is None or before.shape != after.shape:
        return None
    return not torch.equal(before, after)


def edited(ids: torch.Tensor) -> torch.Tensor | None:
    """Ids (B, T) with another one at position T // 2 of every row, None if there is no other."""
    place = ids.shape[1] // 2
    other = ids.clone()
    for row in range(ids.shape[0]):
        known = ids[row][ids[row] != ids[row, place]]
        if not len(known):
            return None
        other[row, place] = known[0]
    return other


def beside(states: torch.Tensor) -> torch.Tensor:
    """States (B, T, D) without those at position T // 2."""
    place = states.shape[1] // 2
    return torch.cat([states[:, :place], states[:, place + 1 :]], dim=1)


def moved(states: torch.Tensor) -> torch.Tensor:
    """States (B, T, D) with other ones at position T // 2."""
    place = states.shape[1] // 2
    other = states.clone()
    other[:, place] = states[:, place].roll(1, dims=-1) + 1
    return other


def with_other_stream(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a layer with other numbers at position T // 2 of its stream, the first floats of them."""
    named: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    for name, value in named.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            named[name] = moved(value) if value.ndim == 3 else value
            break
    return tuple(named[i] for i in range(len(args))), {name: named[name] for name in kwargs}


def made(
    model: nn.Module,
    inputs: Mapping[str, Any],
    entry: nn.Module,
    arguments: Mapping[str, Any],
    layer: str,
    end: Literal["gives", "given"] = "gives",
    *,
    other: bool = False,
) -> torch.Tensor | None:
    """What a layer makes (B, T, D), or is given, if the entry is called with other arguments; None if that
    does not run.

    Args: other: the stream enters the layer with other numbers at position T // 2.
    """
    names = names_of(entry)

    def enter(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (), {**dict(zip(names, args, strict=False)), **kwargs, **arguments}

    changes: dict[nn.Module, Enter] = {entry: enter}
    if other and (module := model.get_submodule(layer)) is not entry:
        changes[module] = with_other_stream
    try:
        seen = observe(model, inputs, enter=changes)
    except Exception:  # models raise anything on what does not fit
        return None
    calls = seen.graph.calls_of(layer)
    node = getattr(calls[0], end) if calls else None
    return None if node is None else joined(seen.tensors[node])


def of_layers(
    model: nn.Module, inputs: Mapping[str, Any], entry: nn.Module, name: str, layer: str
) -> str | None:
    """The argument in which a layer gets a mask of positions, if the entry gets one of something else.

    Samples of sound, say, of which the model makes fewer frames. Every length of the entry's first tensor is
    tried; None if nothing comes of it, or if the mask of the entry is as long as the stream.
    """
    names = names_of(entry)
    shapes: list[torch.Size] = []

    def given(mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
        def enter(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            own = {**dict(zip(names, args, strict=False)), **kwargs}
            shapes.extend(value.shape for value in own.values() if isinstance(value, torch.Tensor))
            return (), own if mask is None else {**own, name: mask}

        try:
            seen = observe(model, inputs, enter={entry: enter})
        except Exception:  # models raise anything on what does not fit
            return {}
        calls = seen.graph.calls_of(layer)
        return {word: seen.tensors[value] for word, value in calls[0].arguments} if calls else {}

    plain = given(None)
    stream = next((value for value in plain.values() if value.is_floating_point()), None)
    if name not in names or stream is None or stream.ndim != 3 or not shapes:
        return None
    rows, *sizes = shapes[0]
    for size in dict.fromkeys(sizes):
        mask = torch.ones(rows, size, dtype=torch.long)
        mask[:, size // 2 :] = 0
        for word, value in given(mask).items():
            if word not in plain and (len(value), value.shape[-1]) == tuple(stream.shape[:2]):
                return None if size == stream.shape[1] else word
    return None


def joined(states: torch.Tensor) -> torch.Tensor | None:
    """States (B, T, D) of what may be several streams (S, B, T, D); None if they have another form."""
    if states.ndim == 4:
        return states.movedim(0, -1).flatten(2)
    return states if states.ndim == 3 else None


def names_of(module: nn.Module) -> list[str]:
    """Arguments of a module's forward, in order."""
    return list(signature(base_forward(module)).parameters)[1:]


def optional(module: nn.Module) -> list[str]:
    """Arguments that may be None."""
    parameters = signature(base_forward(module)).parameters
    kinds = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    return [name for name, one in parameters.items() if one.default is None and one.kind in kinds]


def kinds_of(given: torch.Tensor | None) -> tuple[torch.dtype, ...]:
    """Types to try: what was given, or what masks are."""
    return (torch.long, torch.bool) if given is None else (given.dtype,)
