"""Models that nobody wrote an interface for, as a user would hand them over: by `module:function`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.models.custom import TinyClassifier


def classifier() -> nn.Module:
    return TinyClassifier()


class Odd(nn.Module):
    """Takes what no name tells."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(11, 3)

    def forward(self, wires: Tensor) -> Tensor:
        return self.map(wires)


def odd() -> nn.Module:
    return Odd()


def odd_with_inputs() -> tuple[nn.Module, dict[str, Tensor]]:
    return Odd(), {"wires": torch.zeros(2, 11)}


def no_module() -> int:
    return 3


def fails() -> nn.Module:
    raise RuntimeError("the weights are elsewhere")


def asks(width: int) -> nn.Module:
    return nn.Linear(width, 2)


not_callable = 5


def with_a_list() -> tuple[nn.Module, list[Tensor]]:
    return Odd(), [torch.zeros(2, 11)]


def with_wrong_inputs() -> tuple[nn.Module, dict[str, Tensor]]:
    return Odd(), {"cables": torch.zeros(2, 11)}
