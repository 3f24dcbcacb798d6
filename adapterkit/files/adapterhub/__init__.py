"""Directories of AdapterHub's `adapters`: either their numbers are reproduced, or the file is refused."""

from adapterkit.files.adapterhub.reader import read, recognises

__all__ = ["read", "recognises"]
