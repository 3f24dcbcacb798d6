"""Other weights for an attached adapter, in place: compiled graphs and optimisers keep what they hold."""

from __future__ import annotations

import torch

from adapterkit.adapter import Adapter
from adapterkit.errors import FileFormatError, Problem
from adapterkit.files.assemble import compare
from adapterkit.files.content import Content


@torch.no_grad()
def swap(adapter: Adapter, content: Content) -> None:
    """Copy the tensors of a file into an adapter of the same method, slots and shapes.

    Raises: FileFormatError: with everything that differs; nothing is changed then.
    """
    own = {**dict(adapter.named_parameters()), **_buffers(adapter)}
    given = dict(content.tensors)
    for path, tensors in content.heads.items():
        given |= {f"head.{path}.{key}": tensor for key, tensor in tensors.items()}
    shapes = {key: tuple(tensor.shape) for key, tensor in own.items()}
    problems = compare(shapes, given, content.source)
    if content.config.to_dict() != adapter.config.to_dict():
        message = f"the file holds {content.config.method} with other options than {adapter.name!r}"
        problems.append(Problem("other-adapter", message, adapter.name, file=content.source))
    if problems:
        raise FileFormatError(problems)
    for key, tensor in own.items():
        tensor.copy_(given[key])


def _buffers(adapter: Adapter) -> dict[str, torch.Tensor]:
    """Tensors of an adapter that are saved and are no parameters."""
    return {
        f"{address}.{name}": buffer
        for address, module in adapter.modules().items()
        for name, buffer in module.named_buffers()
    }
