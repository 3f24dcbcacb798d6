"""One recorded forward pass of a model, and what follows from it: the facts that `check` and `draft` read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from adapterkit.author.attention import Attention, attentions
from adapterkit.author.graph import Call, Graph
from adapterkit.author.layers import LayerFacts, layer_facts
from adapterkit.author.recorder import Edit, Enter, Recorder
from adapterkit.author.stacks import StackFacts, stacks


@dataclass(frozen=True)
class Observation:
    """What one forward pass did. Values are numbers of `graph.nodes`."""

    graph: Graph
    tensors: tuple[torch.Tensor, ...]
    """What each value was."""
    watched: tuple[tuple[str, tuple[tuple[str, int], ...]], ...] = ()
    """Calls of watched methods: '<module>:<method>', and the values of its arguments."""

    @cached_property
    def attentions(self) -> tuple[Attention, ...]:
        """Every computation of attention, in order."""
        return attentions(self.graph)

    @cached_property
    def stacks(self) -> tuple[StackFacts, ...]:
        """Every column of layers that was found, without an interface."""
        return stacks(self.graph, self.attentions, self.layer)

    @cached_property
    def _layers(self) -> dict[int, LayerFacts]:
        return {}

    def layer(self, call: Call) -> LayerFacts:
        """Residual adds and branches of one call of a layer."""
        if call.index not in self._layers:
            self._layers[call.index] = layer_facts(self.graph, self.attentions, call)
        return self._layers[call.index]


@torch.no_grad()
def observe(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    edits: Mapping[nn.Module, Edit] | None = None,
    enter: Mapping[nn.Module, Enter] | None = None,
    methods: Mapping[nn.Module, str] | None = None,
) -> Observation:
    """Record one forward pass of a model in eval mode. The model is left as it was.

    Args:
        inputs: keyword arguments of the model.
        edits: changes of a module's first output on the way, by module; the graph stays the same.
        enter: changes of (args, kwargs) of a module's calls, by module.
        methods: a method of a module whose calls are recorded too, with the path '<module>:<method>'.
    """
    recorder = Recorder(model, edits=edits, enter=enter, methods=methods)
    with _eval_mode(model), torch.random.fork_rng(devices=[]), recorder.watching(model):
        torch.manual_seed(0)  # some models draw numbers in every forward pass
        out = model(**inputs)
    watched = tuple((path, arguments) for path, arguments, *_ in recorder.watched)
    return Observation(recorder.graph(out), tuple(recorder.tensors), watched)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode
