"""Which interface describes which model type, and where its file lies."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from adapterkit.errors import Problem, SpecError, did_you_mean
from adapterkit.spec.load import build
from adapterkit.spec.schema import Interface
from adapterkit.spec.text import Document, parse, read

SEARCH_PATH = "ADAPTERKIT_INTERFACES"
ENTRY_POINTS = "adapterkit.interfaces"
SUFFIXES = (".yaml", ".yml")


def shipped_directory() -> Path:
    """Directory of the interfaces that come with adapterkit: in the package, or beside it in a checkout."""
    inside = Path(__file__).parent.parent / "interfaces"
    return inside if inside.is_dir() else Path(__file__).parent.parent.parent / "interfaces"


@dataclass(frozen=True)
class Entry:
    """An interface that is known by name."""

    name: str
    path: Path
    shipped: bool


@dataclass
class _Registry:
    entries: dict[str, Entry] = field(default_factory=dict)
    types: dict[str, Entry] = field(default_factory=dict)
    """Model type -> who describes it; a file that takes another's name takes only the types that it says."""
    files: dict[Path, Entry] = field(default_factory=dict)
    loaded: dict[Path, Interface] = field(default_factory=dict)

    def add(self, entry: Entry) -> None:
        declared = read(entry.path).data.get("model_type")
        self.entries[entry.name] = self.files[entry.path] = entry
        self.loaded.clear()
        for model_type in declared if isinstance(declared, list) else [declared]:
            if isinstance(model_type, str):
                self.types[model_type] = entry


def known_files() -> Iterator[Entry]:
    """Shipped files, then those of entry points, then those of the search path: later ones win.

    Raises: SpecError: an entry point or the search path names what is not there.
    """
    for path in files_in(shipped_directory()):
        yield Entry(path.stem, path, shipped=True)
    for source, path in (*_from_entry_points(), *_from_search_path()):
        if not path.exists():
            raise SpecError(
                Problem("unreadable", f"{source} names a path that does not exist", file=str(path))
            )
        for found in files_in(path):
            yield Entry(found.stem, found, shipped=False)


def files_in(path: Path) -> list[Path]:
    """The interface files of a directory, not of those below; a file is itself."""
    if not path.is_dir():
        return [path]
    return sorted(found for found in path.iterdir() if found.suffix in SUFFIXES and found.is_file())


def _from_entry_points() -> Iterator[tuple[str, Path]]:
    from importlib.metadata import entry_points  # slow to import, and not always needed

    for point in entry_points(group=ENTRY_POINTS):
        source = f"entry point {point.name!r} ({point.value})"
        try:
            found = point.load()
            path = Path(found() if callable(found) else found)
        except Exception as error:  # code of others may raise anything
            reason = f"{type(error).__name__}: {error}"
            raise SpecError(Problem("bad-entry-point", f"{source} fails: {reason}")) from error
        yield source, path


def _from_search_path() -> Iterator[tuple[str, Path]]:
    for folder in filter(None, os.environ.get(SEARCH_PATH, "").split(os.pathsep)):
        yield SEARCH_PATH, Path(folder)


@cache
def _registry() -> _Registry:
    registry = _Registry()
    for entry in known_files():
        registry.add(entry)
    return registry


def _find(name: str, asking: str) -> Document:
    """The file that `like` names: first beside the file that asks, then among the known interfaces."""
    if Path(name).name == name:
        for suffix in SUFFIXES:
            sibling = Path(asking).parent / f"{name}{suffix}"
            if sibling.is_file():
                return read(sibling)
    return read(_entry(name).path)


def _entry(name: str) -> Entry:
    """What is known by this name or model type."""
    registry = _registry()
    entry = registry.types.get(name) or registry.entries.get(name)
    if entry is None:
        raise SpecError(
            Problem(
                "unknown-interface",
                f"there is no interface for {name!r}",
                expected="one of `adapterkit list`, or a file of your own: interface='my.yaml'",
                hint=did_you_mean(name, (*registry.entries, *registry.types)),
            )
        )
    return entry


def register(path: str | Path) -> str:
    """Make the interface file at `path` known for its model types and for `like`. Returns its name.

    Raises: SpecError: the file has problems; nothing is registered then.
    """
    path = _path(path, "the path of a file")
    load(path)
    entry = Entry(path.stem, path, shipped=False)
    _registry().add(entry)
    return entry.name


def interfaces() -> tuple[str, ...]:
    """Names of all known interfaces, sorted."""
    return tuple(sorted(_registry().entries))


def model_types() -> dict[str, str]:
    """Model type -> name of its interface."""
    return {model_type: entry.name for model_type, entry in sorted(_registry().types.items())}


def by_name(name: str) -> Interface:
    """The interface of this name or model type.

    Raises: SpecError: there is none, or its file has problems.
    """
    entry, loaded = _entry(name), _registry().loaded
    if entry.path not in loaded:
        loaded[entry.path] = load(entry.path)
    return loaded[entry.path]


def name_of(interface: Interface) -> str | None:
    """Name under which exactly this interface is known, None for one from elsewhere."""
    registry = _registry()
    path = next((path for path, found in registry.loaded.items() if found is interface), None)
    entry = registry.files.get(path) if path is not None else None
    if entry is not None and registry.entries.get(entry.name) is entry:
        return entry.name
    for model_type in interface.model_type or ():
        if model_type in registry.types and digest(by_name(model_type)) == digest(interface):
            return registry.types[model_type].name
    return None


def load(source: str | Path | dict[str, Any] | Interface) -> Interface:
    """An interface from a path, a model type, a dict or as it is.

    Raises: SpecError: with every problem of the file.
    """
    if isinstance(source, Interface):
        return source
    if isinstance(source, dict):
        return load_text(_as_text(source), "<dict>")
    path = _path(source, "a path, a model type, a dict or an Interface")
    if isinstance(source, str) and path.suffix not in SUFFIXES and not _is_file(path):
        return by_name(source)
    return build(read(path), _find)


def load_text(content: bytes | str, file: str) -> Interface:
    """An interface from the text of a file, which messages call `file`."""
    return build(parse(content, file), _find)


def _as_text(data: dict[str, Any]) -> str:
    try:
        return json.dumps(data, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        message = f"the dict is no interface: {error}"
        raise SpecError(
            Problem("wrong-type", message, expected="text, numbers, lists and maps only")
        ) from None


def _path(given: Any, expected: str) -> Path:
    if not isinstance(given, str | os.PathLike):
        message = f"an interface is not given by {type(given).__name__}"
        raise SpecError(Problem("wrong-type", message, "interface", expected))
    return Path(given)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # longer than any name
        return False


def dump(interface: Interface) -> dict[str, Any]:
    """What the interface says of models, as plain data that is complete without other files."""
    data: dict[str, Any] = interface.model_dump(mode="json", exclude_unset=True)
    return {key: value for key, value in data.items() if key not in ("like", "only", "tiny")}


def digest(interface: Interface) -> str:
    """Hash of what the interface says, whatever file it came from."""
    if interface._digest is None:
        text = json.dumps(dump(interface), sort_keys=True)
        interface._digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return interface._digest


def is_shipped(name: str) -> bool:
    """Whether an interface comes with adapterkit, so that files need not carry it."""
    entry = _registry().entries.get(name)
    return entry is not None and entry.shipped
