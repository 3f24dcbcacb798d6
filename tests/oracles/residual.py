"""The residual stream as one forward pass shows it: what each branch reads, gives, and what becomes of it.

An oracle for interfaces: it sees tensors at modules and adds them up itself; it knows nothing of how adapters
find their places.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.model.blueprint import Blueprint, StackInfo
from adapterkit.model.branches import Branch, branches

LAST = 10**9


def tensor_of(value: Any) -> Tensor | None:
    """The first tensor of floats in arguments or outputs."""
    if isinstance(value, Tensor):
        return value.detach().clone() if value.is_floating_point() else None
    if isinstance(value, Mapping):
        value = list(value.values())
    found = (tensor_of(item) for item in (value if isinstance(value, tuple | list) else ()))
    return next((tensor for tensor in found if tensor is not None), None)


class Watch:
    """Every call of the modules that an interface names, in order."""

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any], blueprint: Blueprint) -> None:
        self.calls: dict[tuple[int, str], list[tuple[int, Tensor | None]]] = {}
        self.count = 0
        named = [slot.module for slot in (*blueprint.slots.values(), *blueprint.places.values())]
        handles = []
        for module in {id(m): m for m in named}.values():
            handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave))
        try:
            with torch.no_grad():
                model(**inputs)
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._note(module, "in", tensor_of(args) if args else tensor_of(kwargs))

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        self._note(module, "out", tensor_of(out))

    def _note(self, module: nn.Module, end: str, value: Tensor | None) -> None:
        self.calls.setdefault((id(module), end), []).append((self.count, value))
        self.count += 1

    def first(self, module: nn.Module, end: str, after: int = -1, before: int = LAST) -> tuple[int, Any]:
        """When, and with what, a module was first called in a stretch of the forward pass."""
        calls = self.calls.get((id(module), end), ())
        return next(((n, value) for n, value in calls if after < n < before), (-1, None))


def broken(model: nn.Module, inputs: Mapping[str, Any], blueprint: Blueprint) -> Iterator[str]:
    """Branches for which x + scale * h (through the norm behind the sum) is not what is read next."""
    watch, found = Watch(model, inputs, blueprint), branches(blueprint)
    for name, info in blueprint.stacks.items():
        for index in range(info.num_layers):
            mine = [branch for at, branch in found.items() if at.startswith(f"{name}.{index}.")]
            yield from _layer(watch, blueprint, info, f"{name}.{index}", mine)


def _layer(
    watch: Watch, blueprint: Blueprint, info: StackInfo, address: str, mine: list[Branch]
) -> Iterator[str]:
    layer = blueprint.places[f"{address}.layer"].module
    (begin, _), (end, given) = watch.first(layer, "in"), watch.first(layer, "out")
    steps = []
    for branch in mine:
        made, _ = watch.first(branch.projection.module, "out", begin, end)
        at, h = watch.first(branch.module, "out", made - 1, end)
        reads = [x for n, x in watch.calls.get((id(branch.start.module), "in"), ()) if begin <= n <= made]
        if made < 0 or not reads or h is None:
            yield f"{branch.address} is not called"
            continue
        scale = getattr(*branch.scale) if isinstance(branch.scale, tuple) else branch.scale
        steps.append((at, branch, reads[-1], reads[-1] + scale * h.reshape(reads[-1].shape)))
    if not steps:
        return
    steps.sort(key=lambda step: step[0])
    if info.parallel and steps:
        x = steps[0][2]
        total = x + sum(added - x for *_, added in steps)
        if not all(same(x, step[2]) for step in steps) or not same(total, given):
            yield f"{address} is not x + its branches"
        return
    # what is said to be no branch, but a part of a sum, is added behind the last branch
    is_open = "branch" in blueprint.without.get(f"{address}.mlp", {})
    for (at, branch, _, total), following in zip(steps, [*steps[1:], None], strict=True):
        norm = branch.after_residual
        if norm is not None:
            into, out = watch.first(norm.module, "in", at, end), watch.first(norm.module, "out", at, end + 1)
            if not same(total, into[1]):
                yield f"{branch.address}: x + h is not what its norm reads"
            total = out[1]
        if following is None and is_open:
            continue
        if not same(total, given if following is None else following[2]):
            yield f"{branch.address}: x + h is not what is read next"


def same(a: Tensor, b: Tensor | None) -> bool:
    return (
        b is not None
        and a.numel() == b.numel()
        and torch.allclose(a, b.reshape(a.shape), atol=1e-4, rtol=1e-4)
    )
