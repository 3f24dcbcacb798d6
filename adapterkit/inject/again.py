"""Checkpointed layers run again in backward, with the setup and the flow of the pass that they belong to.

By then the flow of the thread may be that of a later pass (two texts, one loss), hold what a layer has left
whose second run was cut short since backward needed no more of it, or be empty: a GPU has threads of its own.
Another adapter may act: that of the next task, of which the loss is added before one backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from adapterkit.methods.flow import AGAIN
from adapterkit.runtime import Runtime

KEY = "adapterkit_again"
"""The argument that brings a layer its setup and flow: it is called again with the same arguments."""


class Again:
    """The setup and the flow with which a layer is called."""

    def __init__(self, runtime: Runtime) -> None:
        override = runtime.override
        self.programs = runtime.programs if override.programs is None else override.programs
        self.choice = override.rows, override.tasks
        self.flow = {**override.flow, AGAIN: True}
        self.has_run = False

    def run(self, runtime: Runtime, call: Callable[[], Any]) -> Any:
        """Call the layer, the first time as it is, later with what it had then.

        What is recorded was so the first time.
        """
        if not self.has_run:
            self.has_run = True
            return call()
        override = runtime.override
        before = override.programs, override.rows, override.tasks, override.record
        own = dict(override.flow)
        override.programs, (override.rows, override.tasks), override.record = self.programs, self.choice, None
        override.flow.clear()
        override.flow.update(self.flow)
        try:
            return call()
        finally:
            override.programs, override.rows, override.tasks, override.record = before
            override.flow.clear()
            override.flow.update(own)


def carried(layer: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a layer with what it runs again with, where it will. A compiler runs nothing again."""
    if not (layer.training and layer.gradient_checkpointing) or torch.compiler.is_compiling():
        return kwargs
    return {**kwargs, KEY: Again(layer.adapterkit.runtime)} if torch.is_grad_enabled() else kwargs


def forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a layer that may be called with what it runs again with."""

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        again = kwargs.pop(KEY, None)
        if again is None:
            return original(self, *args, **kwargs)
        return again.run(self.adapterkit.runtime, lambda: original(self, *args, **kwargs))

    return run
