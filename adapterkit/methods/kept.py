"""What is computed from weights alone, kept while these are frozen and unchanged.

Optimisers and averages of weights may write unseen, through `data`: never to what is frozen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import attrgetter

import torch
from torch import nn

_VERSION, _PLACE, _TRAINED = attrgetter("_version"), torch.Tensor.data_ptr, attrgetter("requires_grad")


def keepable(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether these are frozen parameters, to which all that is written is seen.

    Those of copies (DataParallel, `torch.func`) are no parameters; in inference mode all is written unseen.
    """
    return all([type(t) is nn.Parameter and not t.requires_grad and not t.is_inference() for t in tensors])


class Frozen:
    """Tensors as they are now, to be known again."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._state = _state(tensors)
        self._held = [tensor.detach() for tensor in tensors]  # so that no other takes their place in memory

    def are(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether these are unchanged, and not trained in this pass."""
        try:
            if torch.is_grad_enabled() and any(map(_TRAINED, tensors)):
                return False
            return _state(tensors) == self._state
        except (
            RuntimeError,
            AttributeError,
        ):  # those of torch.func have no place; None is no tensor any more
            return False


def _state(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Changes whenever the tensors do: what is moved keeps its version, what is written its place."""
    return [*map(_VERSION, tensors), *map(_PLACE, tensors)]
