"""Directories in PEFT's format."""

from __future__ import annotations

from pathlib import Path

from adapterkit.adapter import Adapter
from adapterkit.errors import FileFormatError, Problem
from adapterkit.files.content import Content
from adapterkit.model.blueprint import Blueprint


def read(directory: Path, blueprint: Blueprint, allow_bin: bool) -> Content:
    raise FileFormatError(Problem("unsupported-format", "PEFT files cannot be read yet", file=str(directory)))


def write(directory: Path, adapter: Adapter, blueprint: Blueprint, head: bool | str) -> Path:
    raise FileFormatError(Problem("unsupported-format", "PEFT files cannot be written yet", file=str(directory)))
