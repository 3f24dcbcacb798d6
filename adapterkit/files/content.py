"""What a file of adapter weights says, whatever its format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from adapterkit.composition import Setup
from adapterkit.methods.base import MethodConfig


@dataclass(frozen=True)
class Content:
    """One adapter as read from a file, in the words of adapterkit."""

    name: str
    config: MethodConfig
    tensors: Mapping[str, torch.Tensor]
    """Tensors of units by address ('encoder.0.attention.q.A'), of shared ones by 'shared.A'."""
    addresses: tuple[str, ...] | None = None
    """Slots that are adapted; None: those that the config selects."""
    heads: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    """Path of a task head -> its tensors."""
    poolers: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    """Address of a pooler inside the base -> its tensors."""
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Shapes of the slots that the adapter was made for."""
    source: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Base model, versions and the like, for messages."""


@dataclass(frozen=True)
class Bundle:
    """Everything that a source holds: adapters, in an order in which they can be attached."""

    contents: tuple[Content, ...]
    setup: Setup | None = None
    """How they act together, where the source says it."""
    skip_layers: tuple[int | str, ...] = ()
    """Layers where they do not act."""
