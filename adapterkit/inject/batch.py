"""What happens to the batch where the model is entered: it is counted, and repeated for Parallel."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import nn

from adapterkit.errors import CompositionError, Problem
from adapterkit.inject import lanes
from adapterkit.inject.cut import mapped
from adapterkit.methods.flow import Flow, cache_of
from adapterkit.model.blueprint import Blueprint
from adapterkit.model.conventions import COUNTS, IMAGES, MAINS, NOT_EXAMPLES, TARGETS
from adapterkit.runtime import Batch

ROWS, TASKS = "adapter_rows", "task_ids"
"""Columns of a batch that are for us, not for the model."""
_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Inputs:
    """What a model is called with, as far as its interface says."""

    def __init__(self, blueprint: Blueprint) -> None:
        model = blueprint.model
        self.names = _parameters(type(model).forward)
        said = [info.inputs for info in blueprint.stacks.values()]
        mains = [name for inputs in said for name in (inputs.ids, inputs.embeds) if name]
        mains += MAINS
        self.mains = tuple(dict.fromkeys((str(getattr(model, "main_input_name", "input_ids")), *mains)))
        self.tokens = {name for inputs in said if inputs.ids for name in _taken(inputs)}
        """What stacks of tokens are called with."""
        self.axes = {name: axis for inputs in said for name, axis in inputs.batch.items()}
        """Where the batch is not the first axis."""

    def examples(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], images: bool = True
    ) -> dict[str, int]:
        """Name of each main input that is given -> its number of examples.

        Args: images: whether images and the like, of which an example may have any number beside its tokens,
            are looked at where there are tokens.
        """
        given: dict[str, Any] = {**dict(zip(self.names, args, strict=False)), **kwargs}
        for value in [value for value in given.values() if isinstance(value, Mapping)]:
            given = {**value, **given}  # a map of features
        found = {name: given[name] for name in self.mains if isinstance(given.get(name), torch.Tensor)}
        if images or not found:
            found |= {name: given[name] for name in given if _of_images(name, given[name])}
        if not found:
            found = {
                name: value[0] if isinstance(value, tuple | list) else value
                for name, value in ((name, _first(value)) for name, value in given.items())
                if isinstance(value, torch.Tensor) and value.ndim > 1
            }
        return {name: tensor.shape[0] for name, tensor in found.items() if tensor.ndim}

    def repeated(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], copies: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments with every tensor that has a row for each example repeated: all for the first, ..."""
        found = self.examples(args, kwargs)
        sizes, images = set(found.values()), not found.keys() <= {*self.mains}
        names = (*self.names, *[""] * len(args))
        new = tuple(
            self._repeat(name, value, copies, sizes, images) for name, value in zip(names, args, strict=False)
        )
        return new, {name: self._repeat(name, value, copies, sizes, images) for name, value in kwargs.items()}

    def _repeat(self, name: str, value: Any, copies: int, sizes: set[int], images: bool) -> Any:
        if name in COUNTS and value is not None:
            return value * copies
        axis = {"none": -1, "second": 1}.get(self.axes.get(name, ""), 0)

        def repeat(tensor: torch.Tensor) -> torch.Tensor:
            if axis < 0 or tensor.ndim <= axis or name in NOT_EXAMPLES:
                return tensor
            of_tokens = not images or name in self.tokens
            if tensor.shape[axis] not in sizes and name not in TARGETS and of_tokens:
                return tensor  # one row for all examples
            counts = [1] * tensor.ndim
            counts[axis] = copies
            return tensor.repeat(counts)

        return mapped(value, repeat)


def _taken(inputs: Any) -> tuple[str, ...]:
    return tuple(filter(None, (inputs.ids, inputs.embeds, inputs.mask, inputs.positions, *inputs.aligned)))


def _of_images(name: str, value: Any) -> bool:
    return isinstance(value, torch.Tensor) and any(word in name for word in IMAGES)


@cache
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the arguments of a class's forward."""
    return tuple(inspect.signature(forward).parameters)[1:]


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple | list) and value else value


def enter(
    model: nn.Module,
    batch: Batch,
    inputs: Inputs,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    flow: Flow,
    rows: Any,
    tasks: Any,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Prepare a forward pass of the model under a setup that has parts of the batch.

    Args: rows, tasks: what `using` was told; columns of the batch take their place.
    Raises: CompositionError: the batch does not fit the setup.
    """
    generating = lanes.GENERATING in flow
    kwargs, rows, tasks = columns(batch, inputs, kwargs, rows, tasks)
    if generating:
        flow[lanes.ENTERED] = True
        return args, kwargs
    if batch.copies > 1 and cache_of({**dict(zip(inputs.names, args, strict=False)), **kwargs}) is not None:
        message = "a cache holds the rows of one copy of the batch, but Parallel repeats it"
        expected = "kit.generate(...) in place of model.generate(...), or no cache"
        raise CompositionError(Problem("cached-parallel", message, expected=expected))
    found = inputs.examples(args, kwargs, batch.images)
    prepare(model, batch, found, flow, rows, tasks)
    if batch.copies > 1 and not found:
        message = "no argument shows how many examples there are, so that Parallel cannot repeat them"
        raise CompositionError(Problem("batch-mismatch", message, expected="a tensor with a row for each"))
    flow[lanes.ENTERED] = True
    if batch.copies > 1:
        args, kwargs = inputs.repeated(args, kwargs, batch.copies)
    return args, kwargs


def refuse_columns(kwargs: Mapping[str, Any], inputs: Inputs) -> None:
    """Refuse our columns where no block asks for them: many models swallow arguments that they do not know.

    Raises: CompositionError.
    """
    for name in (ROWS, TASKS):
        if name in kwargs and name not in inputs.names:
            message = f"the batch has a column {name!r}, but the active setup has no block that asks for it"
            raise CompositionError(
                Problem("no-rows", message, name, "Route for adapter_rows, MultiTask for task_ids")
            )


def columns(
    batch: Batch, inputs: Inputs, kwargs: dict[str, Any], rows: Any, tasks: Any
) -> tuple[dict[str, Any], Any, Any]:
    """Take the columns that are ours out of what the model is called with."""
    kwargs = dict(kwargs)
    if batch.routed and ROWS in kwargs:
        rows = kwargs.pop(ROWS)
    if batch.tasks and TASKS in kwargs:
        tasks = kwargs.pop(TASKS)
    refuse_columns(kwargs, inputs)
    return kwargs, rows, tasks


def prepare(
    model: nn.Module, batch: Batch, found: Mapping[str, int], flow: Flow, rows: Any, tasks: Any
) -> None:
    """Compare the number of examples with the setup, and keep which lane each example takes.

    Raises: CompositionError.
    """
    for name, number in found.items():
        if batch.examples is not None and number != batch.examples:
            message = f"BatchSplit is for {batch.examples} examples, but {name} has {number}"
            expected = "as many examples as batch_sizes add up to; kit.generate(...) to generate"
            raise CompositionError(Problem("batch-mismatch", message, expected=expected))
    for key, index, lanes_, option in (
        (lanes.INDEX["route"], rows, batch.routed, "rows"),
        (lanes.INDEX["tasks"], tasks, batch.tasks, "task_ids"),
    ):
        flow.pop(key, None)
        if lanes_ and index is not None:
            _check_index(model, index, lanes_, found, option)
            flow[key] = index.repeat(batch.copies) if batch.copies > 1 else index


def _check_index(model: nn.Module, index: Any, lanes_: int, found: Mapping[str, int], option: str) -> None:
    if not isinstance(index, torch.Tensor) or index.ndim != 1 or index.dtype not in _WHOLE:
        message = f"{option} are whole numbers, one for each example"
        raise CompositionError(Problem("unknown-row", message, expected="a tensor (B,) of int64"))
    for name, number in found.items():
        if number != index.shape[0]:
            message = f"{option} name {index.shape[0]} examples, but {name} has {number}"
            expected = "one for each example; kit.generate(...) to generate with beams"
            raise CompositionError(Problem("batch-mismatch", message, expected=expected))
    lowest = 0 if option == "task_ids" else -1
    if torch.compiler.is_compiling():
        # a graph has no branches, but assertions
        inside = ((index >= lowest) & (index < lanes_)).all()
        torch._assert_async(inside, f"{option} are {lowest} to {lanes_ - 1}")
        return
    if index.numel() and not lowest <= int(index.min()) <= int(index.max()) < lanes_:
        message = (
            f"{option} go from {int(index.min())} to {int(index.max())}, but there are {lanes_} children"
        )
        expected = f"0 to {lanes_ - 1}" + (", or -1 for none" if lowest else "")
        raise CompositionError(Problem("unknown-row", message, expected=expected))
    if torch.is_grad_enabled() and model.training and checkpoints(model):
        message = f"the model checkpoints its layers; they would run again in backward with other {option}"
        raise CompositionError(Problem("override-checkpointed", message))


def refuse_override(model: nn.Module) -> None:
    """An override with gradients is lost where layers run again in backward, or in other threads.

    Raises: CompositionError.
    """
    if torch.is_grad_enabled() and model.training and checkpoints(model):
        message = "the model checkpoints its layers; they would run again in backward under another adapter"
        expected = "kit.activate(...) for training, or torch.no_grad() around the block"
        raise CompositionError(Problem("override-checkpointed", message, "using", expected))


def checkpoints(model: nn.Module) -> bool:
    """Whether layers run again in the backward pass."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def leave(flow: Flow) -> None:
    """Forget the batch of a forward pass."""
    flow.pop(lanes.ENTERED, None)
    if lanes.GENERATING not in flow:
        for key in lanes.KEPT:
            flow.pop(key, None)
