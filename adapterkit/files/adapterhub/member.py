"""What every method of theirs is to the reader: tensors that it asks for, and what they are here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from adapterkit.errors import Problem
from adapterkit.files.adapterhub.keys import Host, Keyed
from adapterkit.methods.base import MethodConfig

Shapes = dict[str, tuple[int, ...]]
Units = dict[str, dict[str, torch.Tensor]]
"""Address -> parameter of the unit there -> tensor."""


@dataclass(frozen=True)
class Part:
    """One method of ours with its tensors."""

    config: MethodConfig
    units: Units
    shared: Mapping[str, torch.Tensor] = field(default_factory=dict)


class Member(ABC):
    """One config of theirs on one model."""

    shares: bool = False
    """Whether tensors are kept once for each base model."""

    @abstractmethod
    def refusals(self) -> Iterator[Problem]:
        """What cannot be reproduced."""

    @abstractmethod
    def wanted(self, given: Keyed) -> dict[Host, Shapes]:
        """Names and shapes of the tensors that the config asks for in this model."""

    def shared_wanted(self) -> Shapes:
        """Names and shapes of the tensors that are kept once for the base model."""
        return {}

    @abstractmethod
    def parts(self, given: Keyed) -> Iterator[Part]:
        """What the tensors are here.

        Raises: FileFormatError: they cannot be had as what the config says.
        """
