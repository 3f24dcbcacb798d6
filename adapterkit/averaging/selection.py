"""Which slots the config of an average selects, and options that only matter in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adapterkit.averaging.parts import Part
from adapterkit.methods.base import MethodConfig
from adapterkit.model.blueprint import Slot


def merged_selection(
    configs: Sequence[MethodConfig], own: Sequence[Mapping[str, Slot]], slots: Mapping[str, Slot]
) -> dict[str, Any]:
    """`targets`, `layers` and `leave_out` that select these slots.

    Those of the first adapter where its slots are all of them, else the addresses.
    """
    first = configs[0].model_dump()
    if own[0].keys() == slots.keys():
        return {option: first[option] for option in ("targets", "layers", "leave_out")}
    return {"targets": tuple(slots)}


def option(parts: Sequence[Part], name: str, default: Any) -> Any:
    """An option of training: the adapters' own where they agree, else the default."""
    found = {getattr(part.config, name, default) for part in parts}
    return found.pop() if len(found) == 1 else default
