"""Directories of AdapterHub's `adapters`: either their numbers are reproduced, or the file is refused."""

from adapterkit.files.adapterhub.fusion import CONFIG as FUSION_CONFIG
from adapterkit.files.adapterhub.fusion import read as read_fusion
from adapterkit.files.adapterhub.fusion import write as write_fusion
from adapterkit.files.adapterhub.reader import read, recognises
from adapterkit.files.adapterhub.setup import CONFIG as SETUP_CONFIG
from adapterkit.files.adapterhub.setup import read as read_setup
from adapterkit.files.adapterhub.setup_writing import write as write_setup
from adapterkit.files.adapterhub.writing import write

__all__ = [
    "FUSION_CONFIG",
    "SETUP_CONFIG",
    "read",
    "read_fusion",
    "read_setup",
    "recognises",
    "write",
    "write_fusion",
    "write_setup",
]
