"""Reading and writing files: whole or not at all, safetensors first, nothing executed."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from adapterkit.errors import FileFormatError, Problem
from adapterkit.files.present import refuse_away


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises: FileFormatError: it cannot be read, or is no object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FileFormatError(
            Problem("bad-file", f"cannot be read: {str(error)[:200]}", file=str(path))
        ) from None
    if not isinstance(data, dict):
        raise FileFormatError(Problem("bad-file", "holds no JSON object", file=str(path)))
    return data


def read_tensors(path: Path, allow_bin: bool) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file, or of a torch file where that is allowed.

    Raises: FileFormatError: the file is damaged, or a torch file that was not allowed.
    """
    if path.suffix == ".safetensors":
        try:
            return dict(load_file(path))
        except (OSError, SafetensorError, ValueError) as error:
            raise FileFormatError(
                Problem("bad-file", f"cannot be read: {str(error)[:200]}", file=str(path))
            ) from None
    if not allow_bin:
        message = "is a torch file, which may hold more than tensors"
        raise FileFormatError(
            Problem("bin-file", message, file=str(path), expected="safetensors, or allow_bin=True")
        )
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise FileFormatError(
            Problem("bad-file", f"cannot be read: {str(error)[:200]}", file=str(path))
        ) from None
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise FileFormatError(Problem("bad-file", "holds something else than named tensors", file=str(path)))
    return found


def write_directory(
    directory: Path, tensors: Mapping[str, Mapping[str, torch.Tensor]], texts: Mapping[str, str]
) -> Path:
    """Write files to a temporary directory beside `directory`, then move them in place.

    What they replace is moved away first, texts before tensors: at no time is an old config beside new
    tensors, and an exception brings everything back.
    Args: tensors: file name -> named tensors; texts: file name -> text.
    """
    for named in tensors.values():
        refuse_away(named)
    _prepare(directory)
    # '.' has no place beside it, a link may be on another disk
    asked, directory = directory, directory.resolve()
    for name in (*tensors, *texts):
        if (directory / name).is_dir():
            message = f"holds a directory of the name {name!r}"
            raise FileFormatError(Problem("bad-file", message, file=str(directory)))
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as folder:
        work = Path(folder) / "new"
        work.mkdir()
        for name, named in tensors.items():
            save_file(
                {key: value.contiguous().cpu() for key, value in named.items()}, work / name, {"format": "pt"}
            )
        for name, text in texts.items():
            (work / name).write_text(text, encoding="utf-8")
        if not directory.exists():
            work.replace(directory)
        else:
            names = (*tensors, *texts)
            gone = [name for name in reversed(names) if (directory / name).exists()]
            _exchange(directory, gone, names, work, Path(folder) / "old")
        shutil.rmtree(work, ignore_errors=True)
    return asked


def _prepare(directory: Path) -> None:
    """Make room for a directory. Raises: FileFormatError: something else is there, or above it."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"cannot be made: {str(error)[:200]}"
        raise FileFormatError(Problem("bad-file", message, file=str(directory))) from None
    if not directory.is_dir() and (directory.exists() or directory.is_symlink()):
        raise FileFormatError(Problem("bad-file", "is a file, not a directory", file=str(directory)))


def _exchange(directory: Path, gone: Iterable[str], put: Iterable[str], new: Path, old: Path) -> None:
    """Move entries of a directory to `old`, and those of `new` into it; all of them or none.

    The directory stays the one that it is: it may be a link, or where a process works.
    """
    old.mkdir()
    moved: list[tuple[Path, Path]] = []
    try:
        for name, source, target in (
            *((n, directory, old) for n in gone),
            *((n, new, directory) for n in put),
        ):
            (source / name).rename(target / name)
            moved.append((source / name, target / name))
    except BaseException:
        for before, after in reversed(moved):
            after.rename(before)
        raise


@contextmanager
def replaced(
    directory: Path, config: str, named: Callable[[Path], Iterable[str]], files: Set[str]
) -> Iterator[Path]:
    """A new directory to write into, which then stands at this place as a whole; or nothing has changed.

    What stands there may go if it is empty, or holds a setup and nothing beside it.
    Args: config: the file of a setup.  named: directories beside that file, by what it says.
        files: what is in those.
    Raises: FileFormatError: there is something else at this place.
    """
    if directory.exists() and not (directory.is_dir() and _may_go(directory, config, named, files)):
        message = "is there already, and no setup that could be replaced without losing other files"
        raise FileFormatError(Problem("bad-file", message, file=str(directory)))
    _prepare(directory)
    directory = directory.resolve()  # '.' has no place beside it, a link may be on another disk
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as folder:
        work = Path(folder) / "new"
        work.mkdir()
        yield work
        if directory.exists():
            gone = sorted((path.name for path in directory.iterdir()), key=lambda name: name != config)
            put = sorted((path.name for path in work.iterdir()), key=lambda name: name == config)
            _exchange(directory, gone, put, work, Path(folder) / "old")
        else:
            work.rename(directory)


def to_json(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=2, sort_keys=True) + "\n"


def _may_go(directory: Path, config: str, named: Callable[[Path], Iterable[str]], files: Set[str]) -> bool:
    found = {path.relative_to(directory).parts for path in directory.rglob("*")}
    if (config,) not in found:
        return not found
    own = set(named(directory / config))
    return all(
        path == (config,) or (path[0] in own and (len(path) == 1 or (len(path) == 2 and path[1] in files)))
        for path in found
    )
