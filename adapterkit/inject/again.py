"""Checkpointed layers run again in backward, with the flow of the pass that they belong to.

By then the flow of the thread may be that of a later pass (two texts, one loss), hold what a layer has left
whose second run was cut short since backward needed no more of it, or be empty: a GPU has threads of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from adapterkit.methods.flow import Flow, flow_of

KEY = "adapterkit_again"
"""The argument that brings a layer its flow: what is checkpointed is called with the same arguments again."""


class Again:
    """The flow with which a layer is called."""

    def __init__(self, flow: Flow) -> None:
        self.flow = dict(flow)
        self.has_run = False

    def run(self, flow: Flow, call: Callable[[], Any]) -> Any:
        """Call the layer, the first time as it is, later with the flow it had then."""
        if not self.has_run:
            self.has_run = True
            return call()
        own = dict(flow)
        flow.clear()
        flow.update(self.flow)
        try:
            return call()
        finally:
            flow.clear()
            flow.update(own)


def carried(layer: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a layer with its flow, where it will run again. A compiler runs nothing again."""
    if not (layer.training and layer.gradient_checkpointing) or torch.compiler.is_compiling():
        return kwargs
    return {**kwargs, KEY: Again(flow_of(layer))} if torch.is_grad_enabled() else kwargs


def forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a layer that may be called with its flow."""

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        again = kwargs.pop(KEY, None)
        if again is None:
            return original(self, *args, **kwargs)
        return again.run(flow_of(self), lambda: original(self, *args, **kwargs))

    return run
