"""Which threads are within a pass of a model: asked where adapters change, so that passes cost nothing."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from torch import nn

_CALL: Any = nn.Module._call_impl.__code__


def others_within(model: nn.Module) -> set[int]:
    """Other threads that run a method of the model or of a module inside it, or a module around it.

    What they do is looked up in their frames. A graph that was compiled is called by such a module, too.
    """
    frames = sys._current_frames()
    frames.pop(threading.get_ident(), None)
    modules = {thread: list(_modules(frame)) for thread, frame in frames.items()}
    if not any(modules.values()):
        return set()
    inside = set(model.modules())
    return {
        thread
        for thread, found in modules.items()
        if any(one in inside or (called and model in one.modules()) for one, called in found)
    }


def _modules(top: FrameType) -> Iterator[tuple[nn.Module, bool]]:
    """The modules whose methods a thread runs, and whether each is being called."""
    frame: FrameType | None = top
    while frame is not None:
        code = frame.f_code
        own = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if isinstance(own, nn.Module):
            yield own, code is _CALL
        frame = frame.f_back
