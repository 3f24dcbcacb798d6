"""The state of a kit as data, text and HTML."""

from __future__ import annotations

import html as escape
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from adapterkit.adapter import Adapter
from adapterkit.composition import Setup, names
from adapterkit.model.blueprint import Blueprint
from adapterkit.planning import Plan
from adapterkit.versions import unverified

logger = logging.getLogger("adapterkit")


def log(plan: Plan) -> None:
    """The plan at INFO; the library prints nothing."""
    if logger.isEnabledFor(logging.INFO):
        logger.info("%s", plan)


@dataclass(frozen=True)
class AdapterStatus:
    """One adapter, in words and numbers."""

    name: str
    method: str
    slots: int
    parameters: int
    percent: float
    dtype: str
    device: str
    active: bool
    trainable: bool
    merged: bool


@dataclass(frozen=True)
class Status:
    """All adapters of a model."""

    model: str
    interface: str
    base_parameters: int
    adapters: tuple[AdapterStatus, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def status(
    model: nn.Module,
    blueprint: Blueprint,
    adapters: Mapping[str, Adapter],
    active: Setup | None,
    merged: str | None,
) -> Status:
    """What is attached, active and trained."""
    rows = []
    acting = set(names(active))
    for name, adapter in adapters.items():
        tensors = list(adapter.parameters())
        rows.append(
            AdapterStatus(
                name=name,
                method=adapter.config.method,
                slots=len(adapter.plan.slots),
                parameters=adapter.num_parameters,
                percent=adapter.plan.percent,
                dtype="/".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors})),
                device="/".join(sorted({str(t.device) for t in tensors})),
                active=name in acting,
                trainable=any(t.requires_grad for t in tensors),
                merged=name == merged,
            )
        )
    base = sum(p.numel() for n, p in model.named_parameters() if ".adapterkit." not in n)
    note = unverified()
    return Status(type(model).__name__, blueprint.interface_name, base, tuple(rows), (note,) if note else ())


_COLUMNS = ("adapter", "method", "slots", "parameters", "%", "dtype", "device", "active", "trained")


def _cells(found: Status) -> list[tuple[str, ...]]:
    def yes(claim: bool) -> str:
        return "yes" if claim else "no"

    return [
        (
            row.name,
            row.method,
            str(row.slots),
            f"{row.parameters:,}",
            f"{row.percent:.2f}",
            row.dtype,
            row.device,
            "merged" if row.merged else yes(row.active),
            yes(row.trainable),
        )
        for row in found.adapters
    ]


def table(found: Status) -> str:
    """The status as a plain text table."""
    rows = [_COLUMNS, *_cells(found)]
    wide = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    lines = ["  ".join(cell.ljust(wide[i]) for i, cell in enumerate(row)).rstrip() for row in rows]
    head = f"{found.model} ({found.interface}), {found.base_parameters:,} parameters"
    return "\n".join([head, *lines, *found.notes])


def html(found: Status) -> str:
    """The status as an HTML table, for notebooks."""

    def row(cells: tuple[str, ...], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    head = (
        f"<p>{escape.escape(f'{found.model} ({found.interface}), {found.base_parameters:,} parameters')}</p>"
    )
    notes = "".join(f"<p>{escape.escape(note)}</p>" for note in found.notes)
    return (
        head
        + "<table>"
        + row(_COLUMNS, "th")
        + "".join(row(cells, "td") for cells in _cells(found))
        + "</table>"
        + notes
    )
