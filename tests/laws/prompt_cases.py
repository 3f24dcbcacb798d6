"""What the tests of prompt tuning share."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import adapterkit as ak
from tests.laws.matrix import CUSTOM
from tests.models import tiny

LENGTH = 4


def attach(row: str, cls: str, *, attn: str | None = None, **options: Any) -> ak.Kit:
    """A tiny model with a prompt of its own."""
    config = {"method": "prompt_tuning", "prompt_length": LENGTH, **options}
    interface = CUSTOM if row == "custom" else None
    return ak.attach(tiny.build(row, cls, attn=attn), config, seed=0, interface=interface)


def vectors(kit: ak.Kit) -> Tensor:
    """The prompt (P, D) of a kit that has one."""
    (found,) = (t for name, t in kit["default"].state_dict().items() if name.endswith(".embeds"))
    return found.clone()
