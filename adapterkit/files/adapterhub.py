"""Directories written by AdapterHub's `adapters`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapterkit.errors import FileFormatError, Problem
from adapterkit.files.content import Content
from adapterkit.model.blueprint import Blueprint


def recognises(data: Mapping[str, Any]) -> bool:
    """Whether a config was written by AdapterHub."""
    return isinstance(data.get("config"), dict) and "model_type" in data and "peft_type" not in data


def read(directory: Path, blueprint: Blueprint, allow_bin: bool) -> Content:
    raise FileFormatError(Problem("unsupported-format", "AdapterHub files cannot be read yet", file=str(directory)))
