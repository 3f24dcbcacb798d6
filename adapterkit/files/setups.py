"""Several adapters and how they act together: `adapterkit_setup.json`, and a directory for each of them.

crew/
├── adapterkit_setup.json    the setup
├── a/, b/                   adapters, each in a directory that can be loaded alone
└── a+b/                     the weights of a fusion
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapterkit import composition
from adapterkit.adapter import Adapter
from adapterkit.composition import Fuse, Setup, blocks, from_dict, names, to_dict
from adapterkit.errors import CompositionError, ConfigError, FileFormatError, Problem
from adapterkit.files import manifest, native
from adapterkit.files.content import Bundle
from adapterkit.files.disk import read_json, replaced, to_json
from adapterkit.model.blueprint import Blueprint
from adapterkit.versions import __version__, installed

CONFIG = "adapterkit_setup.json"
_WORDS = ("format", "format_version", "setup", "skip_layers", "shares", "versions")


def asked(setup: Setup, name: str | None, format: str) -> Setup:
    """A setup that is to be saved, which may be given as text.

    Raises: CompositionError: it has no meaning. ConfigError: it is asked for beside the name of one
        adapter, or in a format that has no setups.
    """
    if name is not None or format not in ("adapterkit", "adapterhub"):
        what = "a name" if name is not None else f"the format {format!r}"
        raise ConfigError(Problem("bad-option", f"a setup is not saved with {what}", "setup"))
    wanted = composition.read(setup)
    assert wanted is not None
    composition.check(wanted)
    return wanted


def write(
    directory: Path,
    bundle: Bundle,
    adapters: Mapping[str, Adapter],
    shares: Sequence[tuple[str, ...]],
    blueprint: Blueprint,
    head: bool | str,
) -> Path:
    """Write a setup with everything that it names. What stood there as a setup is replaced as a whole.

    Args: bundle: the setup and what it skips. shares: groups of adapters with tensors in common.
    Raises: FileFormatError: there is something else at this place.
    """
    setup = bundle.setup
    assert setup is not None
    groups = (tuple(name for name in group if name in names(setup)) for group in shares)
    data = {
        "format": "adapterkit",
        "format_version": manifest.FORMAT_VERSION,
        "setup": to_dict(setup),
        "skip_layers": list(bundle.skip_layers),
        "shares": [list(group) for group in groups if len(group) > 1],
        "versions": {"adapterkit": __version__} | {p: installed(p) for p in ("torch", "transformers")},
    }
    with replaced(directory, CONFIG, _named, {native.CONFIG, native.WEIGHTS}) as work:
        for name in names(setup):
            native.write(work / name, adapters[name], blueprint, head)
        (work / CONFIG).write_text(to_json(data), encoding="utf-8")
    return directory


def _named(file: Path) -> tuple[str, ...]:
    """The directories beside the file of a setup."""
    return names(_setup(file, read_json(file)))


def read(directory: Path) -> Bundle:
    """The adapters and the setup in a directory.

    Raises: FileFormatError.
    """
    file = directory / CONFIG
    data = read_json(file)
    manifest.check_version(data, str(file))
    manifest.check_words(data, _WORDS, str(file))
    setup, shares, skipped = _setup(file, data), data.get("shares", []), data.get("skip_layers", [])
    if not isinstance(skipped, list) or not isinstance(shares, list) or not all(map(_is_group, shares)):
        message = "'skip_layers' is a list of layers, 'shares' one of lists of names"
        raise FileFormatError(Problem("bad-file", message, file=str(file)))
    fusions = {block.name for block in blocks(setup) if isinstance(block, Fuse)}
    contents = []
    for name in sorted(names(setup), key=lambda name: name in fusions):
        if Path(name).name != name:
            raise FileFormatError(Problem("bad-file", f"{name!r} is no name", file=str(file)))
        found = native.read(directory / name)
        others = [other for group in shares if name in group for other in group if other != name]
        contents.append(replace(found, name=name, facts={**found.facts, "shares": others}))
    return Bundle(tuple(contents), setup, tuple(skipped))


def _is_group(shared: Any) -> bool:
    return isinstance(shared, list) and all(isinstance(name, str) for name in shared)


def _setup(file: Path, data: Mapping[str, Any]) -> Setup:
    try:
        return from_dict(data.get("setup"))
    except CompositionError as error:
        raise FileFormatError(replace(problem, file=str(file)) for problem in error.problems) from None
