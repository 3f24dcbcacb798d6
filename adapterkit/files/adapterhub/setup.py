"""A directory with a setup of theirs: `adapter_setup.json`, and a directory for each adapter and fusion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapterkit.composition import Fuse, Setup, blocks, from_dict, names
from adapterkit.errors import CompositionError, FileFormatError, Problem
from adapterkit.files.adapterhub import fusion, reader
from adapterkit.files.adapterhub.setup_options import idle, repeated
from adapterkit.files.adapterhub.setup_refusals import refusals, repeating, unlike
from adapterkit.files.content import Bundle, Content
from adapterkit.files.disk import read_json
from adapterkit.model.blueprint import Blueprint

CONFIG = "adapter_setup.json"


def read(directory: Path, blueprint: Blueprint, allow_bin: bool) -> Bundle:
    """The adapters, fusions and the setup in a directory of AdapterHub.

    Raises: FileFormatError: with everything that is unknown, missing or cannot be reproduced.
    """
    file = directory / CONFIG
    data = read_json(file)
    setup = setup_in(data, file)
    fusions = {block.name: block for block in blocks(setup) if isinstance(block, Fuse)}
    contents = {}
    for name in sorted(names(setup), key=lambda name: name in fusions):
        if name in fusions:
            theirs = fusion.name_of(fusions[name].fused, name)
            found = fusion.read(_inside(directory, theirs), blueprint, allow_bin)
        else:
            found = reader.read(_inside(directory, name), blueprint, allow_bin)
        contents[name] = replace(found, name=name)
    try:
        contents = together(setup, contents, blueprint)
    except FileFormatError as error:
        raise FileFormatError(replace(problem, file=str(file)) for problem in error.problems) from None
    if data.get("head_setup"):
        first = next(iter(contents))
        contents[first] = replace(contents[first], heads={"heads": {}})
    return Bundle(tuple(contents.values()), setup)


def setup_in(data: Mapping[str, Any], file: Path) -> Setup:
    """The setup that a file of theirs says.

    Raises: FileFormatError: it has no meaning.
    """
    try:
        return from_dict(_plain(data.get("adapter_setup")))
    except CompositionError as error:
        raise FileFormatError(replace(problem, file=str(file)) for problem in error.problems) from None


def _inside(directory: Path, name: str) -> Path:
    """The directory of an adapter; a name leads nowhere else."""
    if Path(name).name != name:
        raise FileFormatError(Problem("bad-file", f"{name!r} is no name", file=str(directory / CONFIG)))
    return directory / name


def _plain(data: Any) -> Any:
    """Their data as ours: {"type": ..., "children": [...], "kwargs": {...}}, where 'single' is a name."""
    if not isinstance(data, Mapping) or not isinstance(data.get("children"), list):
        return data
    children = [_plain(child) if isinstance(child, Mapping) else child for child in data["children"]]
    if data.get("type") == "single" and len(children) == 1:
        return children[0]
    return {**data.get("kwargs", {}), "block": data.get("type"), "children": children}


def together(setup: Setup, contents: Mapping[str, Content], blueprint: Blueprint) -> dict[str, Content]:
    """The adapters with the options that say what theirs does with them in this setup.

    Raises: FileFormatError: no option says it.
    """
    problems = [*refusals(setup, contents), *unlike(setup, contents, blueprint)]
    reader.refuse([*problems, *repeating(setup, contents, blueprint)])
    return idle(setup, repeated(setup, contents))
