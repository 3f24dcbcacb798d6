"""Setups: which adapters act together, and how. Frozen values without any tensor."""

from adapterkit.composition.blocks import (
    Average,
    BatchSplit,
    Block,
    Fuse,
    MultiTask,
    Parallel,
    Route,
    Setup,
    Split,
    Stack,
)
from adapterkit.composition.rules import blocks, check, copies, examples, first, names
from adapterkit.composition.text import from_dict, parse, read, to_dict

__all__ = [
    "Average",
    "BatchSplit",
    "Block",
    "Fuse",
    "MultiTask",
    "Parallel",
    "Route",
    "Setup",
    "Split",
    "Stack",
    "blocks",
    "check",
    "copies",
    "examples",
    "first",
    "from_dict",
    "names",
    "parse",
    "read",
    "to_dict",
]
