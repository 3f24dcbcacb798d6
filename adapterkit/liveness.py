"""Which adapter tensors do anything: moved away from their start, each must get a gradient."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from adapterkit.adapter import Adapter
from adapterkit.errors import Problem, listing


@dataclass(frozen=True)
class Liveness:
    """Tensors of the adapters by whether the output depends on them."""

    alive: tuple[str, ...]
    dead: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.dead

    def problems(self) -> tuple[Problem, ...]:
        return tuple(
            Problem("dead-tensor", "moves no output and gets no gradient", name) for name in self.dead
        )

    def __str__(self) -> str:
        if self.ok:
            return f"all {len(self.alive)} adapter tensors move the output"
        total = len(self.alive) + len(self.dead)
        return f"{len(self.dead)} of {total} adapter tensors are dead: {listing(self.dead)}"


def outputs(result: Any) -> Iterator[torch.Tensor]:
    """Every floating tensor of a model output, whatever its nesting."""
    if isinstance(result, torch.Tensor):
        if result.is_floating_point():
            yield result
    elif isinstance(result, dict):
        for value in result.values():
            yield from outputs(value)
    elif isinstance(result, list | tuple):
        for value in result:
            yield from outputs(value)


@contextmanager
def _moved(tensors: Iterable[nn.Parameter]) -> Iterator[None]:
    """Adapter tensors away from their start (where much has no gradient), put back exactly afterwards."""
    kept = [(tensor, tensor.detach().clone(), tensor.requires_grad, tensor.grad) for tensor in tensors]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for tensor, *_ in kept:
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
                tensor.add_((0.1 * noise).to(tensor.device, tensor.dtype))
                tensor.grad = None
        yield
    finally:
        with torch.no_grad():
            for tensor, value, trained, grad in kept:
                tensor.copy_(value)
                tensor.requires_grad_(trained)
                tensor.grad = grad


def trained(adapters: Sequence[Adapter]) -> dict[str, torch.nn.Parameter]:
    """The tensors that some adapters train; of several, the name of each adapter goes first."""
    return {
        (key if len(adapters) == 1 else f"{adapter.name}:{key}"): tensor
        for adapter in adapters
        for key, tensor in adapter.named_trained()
    }


def examine(model: nn.Module, tensors: dict[str, nn.Parameter], inputs: dict[str, Any]) -> Liveness:
    """One forward and backward in eval mode: which of `tensors` get a gradient that is not zero."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with _moved(tensors.values()), torch.enable_grad():
            for tensor in tensors.values():
                tensor.requires_grad_(True)
            generator = torch.Generator().manual_seed(1)
            total: Any = 0.0
            for out in outputs(model(**inputs)):
                if out.requires_grad:
                    weights = torch.randn(out.shape, generator=generator).to(out.device, out.dtype)
                    total = total + (out * weights).sum()
            grads: list[torch.Tensor | None] = [None] * len(tensors)
            if isinstance(total, torch.Tensor):
                grads = list(torch.autograd.grad(total, list(tensors.values()), allow_unused=True))
    finally:
        for module, mode in training:
            module.training = mode
    alive = [name for name, grad in zip(tensors, grads, strict=True) if grad is not None and bool(grad.any())]
    return Liveness(tuple(alive), tuple(name for name in tensors if name not in set(alive)))
