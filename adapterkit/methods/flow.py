"""What passes between the points of a branch in one forward pass: the residual, and what replaces a norm's
output.

By branch b: `b` is the residual x, `b~` the normed input, `b+` the branch beside, `b!` whether it waits for
its adapters, `b=` what replaces the norm's output (where `b?` says so), `b^` the share of x that the output
lacks to be what the last adapter gave.

It lives with the thread and not at the modules, so that threads which share a model do not see each other's
tensors.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from adapterkit.errors import PlanError, Problem
from adapterkit.model.blueprint import Blueprint, Scale, Slot
from adapterkit.model.conventions import CACHES, PACKED

Flow = dict[str, Any]


def flow_of(host: nn.Module) -> Flow:
    """The flow of this thread at a host that is a site."""
    flow: Flow = host.adapterkit.runtime.override.flow  # type: ignore[union-attr, assignment]
    return flow


AGAIN = "#again"
"""In the flow: a layer runs again in backward, with the flow of its own pass."""


def runs_again() -> bool:
    """Whether a part of the model is called in backward: it was checkpointed. Graphs never are."""
    return not torch.compiler.is_compiling() and task() != -1


def task() -> int:
    """Number of the backward pass that this is called in, -1: none."""
    return int(torch._C._current_graph_task_id())


def apart(where: str) -> PlanError:
    """The error for what runs again in backward, but not with what was around it."""
    message = "a part of the model runs again in backward that was checkpointed without what was around it"
    expected = "model.gradient_checkpointing_enable(), or the whole model checkpointed"
    return PlanError(Problem("checkpointed-apart", message, where, expected))


def record_of(runtime: Any) -> Any:
    """Where this thread keeps what its passes say, None where nobody asks. What runs again has said it."""
    record = runtime.override.record
    return None if record is None or runs_again() else record


def first(out: Any) -> torch.Tensor:
    """The tensor that a module gives to the stream: its first output."""
    found: torch.Tensor = out[0] if isinstance(out, tuple | list) else out
    return found


def with_first(out: Any, value: torch.Tensor) -> Any:
    """`out` with another first output."""
    return type(out)((value, *out[1:])) if isinstance(out, tuple | list) else value


def number(scale: Scale) -> Any:
    """The value of a factor: a number or a tensor."""
    return getattr(*scale) if isinstance(scale, tuple) else scale


class Capture(nn.Module):
    """At the module where a branch begins: remember its input, the residual."""

    def __init__(self, branch: str) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: torch.Tensor, host: nn.Module) -> torch.Tensor:
        flow = flow_of(host)
        flow[self.branch] = x
        for mark in ("!", "=", "?", "^"):  # of a pass that an exception ended
            flow.pop(f"{self.branch}{mark}", None)
        return x


class Arm(nn.Module):
    """At the projection of a branch: from now on the branch is waiting for the module where adapters act.

    A dropout that several branches share is called once for each; only the branch that was armed answers.
    """

    def __init__(self, branch: str) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, out: Any, x: Any, host: nn.Module) -> Any:
        flow_of(host)[f"{self.branch}!"] = True
        return out


class Override(nn.Module):
    """At the norm after the residual add: give what the branch left for it in place of the norm's output."""

    def __init__(self, branch: str) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, out: Any, x: Any, host: nn.Module) -> Any:
        flow = flow_of(host)
        value = flow.pop(f"{self.branch}=", None)
        if value is None:
            return out
        where = flow.pop(f"{self.branch}?", None)
        return with_first(out, value if where is None else torch.where(where, value, first(out)))


class Release(nn.Module):
    """Behind the last adapter of a branch: forget the residual, which would be kept alive otherwise."""

    def __init__(self, branch: str) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, out: Any, x: Any, host: nn.Module) -> Any:
        flow = flow_of(host)
        if f"{self.branch}!" in flow:
            del flow[f"{self.branch}!"]
            for mark in ("", "~", "+", "^"):
                flow.pop(f"{self.branch}{mark}", None)
        return out


class Forget(nn.Module):
    """At the layer: forget a residual that was remembered again by a norm that is called twice."""

    def __init__(self, branch: str) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, out: Any, x: Any, host: nn.Module) -> Any:
        flow_of(host).pop(self.branch, None)
        return out


class Result(nn.Module):
    """Behind the adapters of a branch: remember its result for the branch beside it."""

    def __init__(self, reader: str) -> None:
        super().__init__()
        self.reader = reader

    def forward(self, out: Any, x: Any, host: nn.Module) -> Any:
        flow_of(host)[f"{self.reader}+"] = first(out)
        return out


def base_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward that the module's class had before adapters came to it."""
    forward: Callable[..., Any] = getattr(type(module), "_adapterkit_base", type(module)).forward
    return forward


def called_alone(module: nn.Module, forward: Callable[..., Any], x: torch.Tensor) -> torch.Tensor:
    """What a module's own `forward` gives for x, without its adapters.

    The hook of accelerate, if there is one, brings weights that are kept elsewhere and takes them away.
    """
    hook: Any = getattr(module, "_hf_hook", None)
    if hook is None:
        return forward(module, x)  # type: ignore[no-any-return]
    args, kwargs = hook.pre_forward(module, x)
    return hook.post_forward(module, forward(module, *args, **kwargs))  # type: ignore[no-any-return]


def entry_place(blueprint: Blueprint, stack: str) -> Slot:
    """The module whose call runs a stack."""
    named = blueprint.places.get(f"{stack}.entry")
    info = blueprint.stacks[stack]
    return named or Slot(f"{stack}.entry", "entry", stack, None, None, info.root, info.path)


def given_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call by name."""
    names = list(inspect.signature(base_forward(module)).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def cache_of(given: Mapping[str, Any]) -> Any:
    """The cache among arguments, None if there is none: versions differ in its name, not in what it can."""
    return next((value for value in given.values() if hasattr(value, "get_seq_length")), None)


def room_of(given: Mapping[str, Any]) -> int | None:
    """How many positions a cache of a fixed size has; None if it grows, or lets go of the first."""
    cache = cache_of(given)
    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", ())
    sizes = [
        layer.max_cache_len
        for layer in layers
        if isinstance(getattr(layer, "max_cache_len", None), int) and not getattr(layer, "is_sliding", False)
    ]
    return min(sizes) if sizes else None


def past_of(given: Mapping[str, Any]) -> int:
    """How many tokens a cache among arguments holds."""
    cache = cache_of(given)
    return 0 if cache is None else int(cache.get_seq_length())


def refuse_packed(module: nn.Module, given: Mapping[str, Any], inputs: Any, stack: str, what: str) -> None:
    """Refuse several texts in one row, where a method counts the positions of a row as those of one text.

    Models with a cache, that are given no mask, see by positions that begin anew where a text ends.
    Args: inputs: what the stack calls its arguments.
    Raises: PlanError.
    """
    numbers, mask = (given.get(name or "") for name in (inputs.positions, inputs.mask))
    packed = any(given.get(name) is not None for name in PACKED)
    if isinstance(numbers, torch.Tensor) and numbers.ndim == 2 and mask is None and not packed:
        causal = getattr(getattr(module, "config", None), "is_decoder", True)
        names = inspect.signature(base_forward(module)).parameters
        if causal and not past_of(given) and not CACHES.isdisjoint(names) and can_look(numbers):
            packed = bool((numbers[:, 1:] < numbers[:, :-1]).any())
    if packed:
        message = f"several texts are packed into one row, of which {what} would see the first alone"
        raise PlanError(Problem("packed", message, stack, "one text in each row, with a mask (B, T)"))


def can_look(tensor: torch.Tensor) -> bool:
    """Whether numbers can be looked at here: not in a graph, neither of a compiler nor of a GPU."""
    if torch.compiler.is_compiling():
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
