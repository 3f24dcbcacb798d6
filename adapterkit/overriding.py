"""Blocks of `kit.using` in one thread: the one that was opened last is closed first.

A generator or a coroutine that waits within its block lets others run in the same thread, and what they open
lies beside it, not in it: each would have the adapters of another, and one of them would be left behind.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, TypeVar, cast

from adapterkit.composition import Setup
from adapterkit.errors import CompositionError, Problem
from adapterkit.runtime import Programs, Runtime


@dataclass(eq=False)
class Use:
    """What an open block of `kit.using` says."""

    programs: Programs | None = None
    active: Setup | None = None
    rows: Any = None
    tasks: Any = None
    owner: Any = None
    """The task of asyncio that has opened it, None outside of all."""
    thread: int = field(default_factory=threading.get_ident)


Verb = TypeVar("Verb", bound=Callable[..., Any])


def alone(verb: Verb) -> Verb:
    """A verb of a kit that takes from others what they use: no block is opened while it looks and acts."""

    @wraps(verb)
    def run(kit: Any, *args: Any, **kwargs: Any) -> Any:
        with kit._runtime.changing:
            return verb(kit, *args, **kwargs)

    return cast(Verb, run)


def opened(runtime: Runtime, programs: Programs, setup: Setup | None, rows: Any, tasks: Any) -> Use:
    """Open a block in this thread.

    Raises: CompositionError: one of another task is open.
    """
    own = Use(programs, setup, rows, tasks, _task())
    blocks: list[Use] = runtime.override.blocks
    if blocks and blocks[-1].owner is not None and blocks[-1].owner is not own.owner:
        raise _interleaved(blocks[-1])
    blocks.append(own)
    runtime.uses.append(own)
    _say(runtime, own)
    return own


def closed(runtime: Runtime, block: Use) -> None:
    """Close a block: what is around it says again what acts.

    Raises: CompositionError: it is not the one that was opened last. No other is touched.
    """
    runtime.uses.remove(block)
    blocks: list[Use] = runtime.override.blocks
    if blocks and blocks[-1] is block:
        blocks.pop()
        _say(runtime, blocks[-1] if blocks else Use())
        return
    if block in blocks:
        blocks.remove(block)
    raise _interleaved(block)


def _say(runtime: Runtime, block: Use) -> None:
    override = runtime.override
    override.programs, override.active = block.programs, block.active
    override.rows, override.tasks = block.rows, block.tasks


def _task() -> Any:
    try:
        return asyncio.current_task()
    except RuntimeError:  # no loop runs here
        return None


def _interleaved(block: Use) -> CompositionError:
    message = f"kit.using({block.active!r}) was left while it was open, by a generator or a task that waits"
    expected = "no `yield` and no `await` in the block; asyncio.to_thread for the forward pass"
    return CompositionError(Problem("interleaved-blocks", message, "using", expected))
