"""A stack whose entry is called with other arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from adapterkit.author import masks
from adapterkit.author.graph import Call
from adapterkit.author.observe import Observation
from adapterkit.author.recorder import Enter
from adapterkit.author.scene import Scene
from adapterkit.author.seen import Seen
from adapterkit.model.blueprint import Slot


class Trial:
    """A stack whose entry can be called with other arguments."""

    def __init__(self, seen: Seen, scene: Scene, place: Slot, entry: Call) -> None:
        self.seen, self.scene, self.place, self.entry = seen, scene, place, entry
        self.names = masks.names_of(place.module)

    def loc(self, word: str) -> tuple[str | int, ...]:
        return (*self.seen.loc, "inputs", word)

    def given(self, name: str) -> torch.Tensor | None:
        """The tensor that the entry was called with."""
        value = self.entry.argument(name)
        return None if value is None else self.seen.observation.tensors[value]

    def run(self, other: Mapping[str, Any], *, moved: bool = False) -> Observation | None:
        """The same forward with other arguments of the entry, None if it does not run.

        Args: moved: the stream enters the first layer with other numbers at position T // 2.
        """

        def enter(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return (), {**dict(zip(self.names, args, strict=False)), **kwargs, **other}

        changes: dict[nn.Module, Enter] = {self.place.module: enter}
        first = self.seen.layers()[0][1].module
        if moved and first is not self.place.module:
            changes[first] = masks.with_other_stream
        key = (self.place.path, moved, *((name, _content(value)) for name, value in sorted(other.items())))
        return self.scene.once(key, lambda: self.scene.observe(enter=changes))

    def steers(
        self, before: Observation | None, after: Observation | None, *, words: str = "qkvo"
    ) -> bool | None:
        """Whether what enters the stack, or attention in it, differs; None if one did not run."""
        if before is None or after is None:
            return None
        first, second = (self.marks(found, words) for found in (before, after))
        if len(first) != len(second):
            return True
        return any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def made(self, other: Mapping[str, Any], part: masks.Part, *, moved: bool = False) -> torch.Tensor | None:
        """Part of what the first layer makes (B, T, D) with other arguments of the entry, as `run` has it."""
        found = self.run(other, moved=moved)
        _, place, _ = self.seen.layers()[0]
        calls = found.graph.calls_of(place.path) if found is not None else ()
        if found is None or not calls or calls[0].gives is None:
            return None
        states = masks.joined(found.tensors[calls[0].gives])
        return None if states is None else part(states)

    def marks(self, found: Observation, words: str) -> list[torch.Tensor]:
        layers = [c for _, place, _ in self.seen.layers() for c in found.graph.calls_of(place.path)]
        events = [e for e in found.attentions if any(c.start <= e.out < c.end for c in layers)]
        picked = {"q": "query", "k": "key", "v": "value", "o": "out"}
        marks = [found.tensors[getattr(event, picked[word])] for event in events for word in words]
        return marks + [found.tensors[c.given] for c in layers[:1] if c.given is not None]


def _content(value: Any) -> Any:
    return (tuple(value.shape), value.numpy().tobytes()) if isinstance(value, torch.Tensor) else value


def token_shape(trial: Trial) -> tuple[int, int] | None:
    """(B, T) of the stack."""
    names = trial.seen.info.inputs
    for name in (names.ids, names.embeds):
        given = trial.given(name) if name else None
        if given is not None and given.ndim >= 2:
            return int(given.shape[0]), int(given.shape[1])
    call = trial.seen.calls()[0]
    shape = trial.seen.graph.nodes[call.given].shape if call.given is not None else ()
    return (shape[0], shape[1]) if len(shape) == 3 else None
