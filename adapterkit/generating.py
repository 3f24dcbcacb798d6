"""Generating under a setup that has parts of the batch."""

from __future__ import annotations

from typing import Any

from torch import nn

from adapterkit.inject import lanes
from adapterkit.inject.batch import columns, prepare
from adapterkit.inject.entry import Top


def generate(model: nn.Module, top: Top, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`model.generate` with the batch repeated for Parallel, and rows that follow the examples.

    Raises: CompositionError: the batch does not fit the setup.
    """
    run: Any = model.generate
    override, inputs = top.runtime.override, top.inputs
    program = top.program if override.programs is None else override.programs.get(top.key)
    batch = program.batch if program is not None else None
    if batch is None:
        return run(*args, **kwargs)
    if args:  # the first one is the prompt, whatever the model calls it
        kwargs, args = {**kwargs, "inputs": args[0]}, args[1:]
    kwargs, rows, tasks = columns(batch, inputs, kwargs, override.rows, override.tasks)
    flow = override.flow
    prepare(model, batch, inputs.examples((), kwargs, batch.images), flow, rows, tasks)
    if batch.copies > 1:
        _, kwargs = inputs.repeated((), kwargs, batch.copies)
    prompt = (kwargs.pop("inputs"),) if "inputs" in kwargs else ()
    flow[lanes.GENERATING] = True
    try:
        return run(*prompt, *args, **kwargs)
    finally:
        for key in (lanes.GENERATING, lanes.ENTERED, *lanes.KEPT):
            flow.pop(key, None)
