"""Directories in PEFT's format; PEFT itself is not needed."""

from adapterkit.files.peft.reading import read
from adapterkit.files.peft.writing import write

__all__ = ["read", "write"]
