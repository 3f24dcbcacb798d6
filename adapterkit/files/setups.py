"""Several adapters and how they act together: `adapterkit_setup.json`, and a directory for each of them.

crew/
├── adapterkit_setup.json    the setup
├── a/, b/                   adapters, each in a directory that can be loaded alone
└── a+b/                     the weights of a fusion
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from adapterkit.adapter import Adapter
from adapterkit.composition import Fuse, Setup, blocks, from_dict, names, to_dict
from adapterkit.errors import CompositionError, FileFormatError, Problem
from adapterkit.files import manifest, native
from adapterkit.files.content import Bundle
from adapterkit.files.disk import read_json, to_json
from adapterkit.model.blueprint import Blueprint
from adapterkit.versions import __version__, installed

CONFIG = "adapterkit_setup.json"


def write(
    directory: Path, setup: Setup, adapters: Mapping[str, Adapter], blueprint: Blueprint, head: bool | str
) -> Path:
    """Write a setup with everything that it names. What stood there as a setup is replaced as a whole.

    Raises: FileFormatError: there is something else at this place.
    """
    if directory.exists() and not (directory.is_dir() and _may_go(directory)):
        message = "is there already, and no setup that could be replaced"
        raise FileFormatError(Problem("bad-file", message, file=str(directory)))
    directory.parent.mkdir(parents=True, exist_ok=True)
    data = {
        "format": "adapterkit",
        "format_version": manifest.FORMAT_VERSION,
        "setup": to_dict(setup),
        "versions": {"adapterkit": __version__} | {p: installed(p) for p in ("torch", "transformers")},
    }
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as folder:
        work = Path(folder) / "new"
        work.mkdir()
        for name in names(setup):
            native.write(work / name, adapters[name], blueprint, head)
        (work / CONFIG).write_text(to_json(data), encoding="utf-8")
        if directory.exists():
            directory.rename(Path(folder) / "old")
        work.rename(directory)
        shutil.rmtree(Path(folder) / "old", ignore_errors=True)
    return directory


def _may_go(directory: Path) -> bool:
    return (directory / CONFIG).is_file() or not any(directory.iterdir())


def read(directory: Path) -> Bundle:
    """The adapters and the setup in a directory.

    Raises: FileFormatError.
    """
    file = directory / CONFIG
    data = read_json(file)
    manifest.check_version(data, str(file))
    try:
        setup = from_dict(data.get("setup"))
    except CompositionError as error:
        raise FileFormatError(replace(problem, file=str(file)) for problem in error.problems) from None
    fusions = {block.name for block in blocks(setup) if isinstance(block, Fuse)}
    contents = []
    for name in sorted(names(setup), key=lambda name: name in fusions):
        if Path(name).name != name:
            raise FileFormatError(Problem("bad-file", f"{name!r} is no name", file=str(file)))
        contents.append(replace(native.read(directory / name), name=name))
    return Bundle(tuple(contents), setup)
