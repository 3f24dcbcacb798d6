"""Which interface describes which model type, and where its file lies."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from adapterkit.errors import Problem, SpecError, did_you_mean
from adapterkit.spec.load import build
from adapterkit.spec.schema import Interface
from adapterkit.spec.text import Document, parse, read

SEARCH_PATH = "ADAPTERKIT_INTERFACES"
ENTRY_POINTS = "adapterkit.interfaces"


def shipped_directory() -> Path:
    """Directory of the interfaces that come with adapterkit: inside the package, or beside it in a checkout."""
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
    types: dict[str, str] = field(default_factory=dict)
    loaded: dict[str, Interface] = field(default_factory=dict)

    def add(self, path: Path, *, shipped: bool) -> Entry:
        entry = Entry(path.stem, path, shipped)
        self.entries[entry.name] = entry
        self.loaded.clear()
        declared = read(path).data.get("model_type") or []
        for model_type in [declared] if isinstance(declared, str) else declared:
            self.types[str(model_type)] = entry.name
        return entry


@cache
def _registry() -> _Registry:
    """Shipped files, then entry points, then the search path: later ones win."""
    registry = _Registry()
    for path in sorted(shipped_directory().glob("*.yaml")):
        registry.add(path, shipped=True)
    for point in entry_points(group=ENTRY_POINTS):
        found = point.load()
        for path in _files(Path(found() if callable(found) else found)):
            registry.add(path, shipped=False)
    for folder in filter(None, os.environ.get(SEARCH_PATH, "").split(os.pathsep)):
        for path in _files(Path(folder)):
            registry.add(path, shipped=False)
    return registry


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise SpecError(Problem("unreadable", f"{SEARCH_PATH} or an entry point names a missing path", file=str(path)))
    return sorted(path.glob("*.yaml")) if path.is_dir() else [path]


def _document(name: str) -> Document | None:
    entry = _registry().entries.get(name)
    return read(entry.path) if entry else None


def register(path: str | Path) -> str:
    """Make the interface file at `path` known for its model types and for `like`. Returns its name.

    Raises: SpecError: the file has problems; nothing is registered then.
    """
    path = Path(path)
    load(path)
    return _registry().add(path, shipped=False).name


def interfaces() -> tuple[str, ...]:
    """Names of all known interfaces, sorted."""
    return tuple(sorted(_registry().entries))


def model_types() -> dict[str, str]:
    """model type -> name of its interface."""
    return dict(sorted(_registry().types.items()))


def by_name(name: str) -> Interface:
    """The interface of this name or model type.

    Raises: SpecError: there is none.
    """
    registry = _registry()
    key = name if name in registry.entries else registry.types.get(name)
    if key is None:
        known = (*registry.entries, *registry.types)
        raise SpecError(
            Problem(
                "unknown-interface",
                f"there is no interface for {name!r}",
                expected="one of `adapterkit list`, or a file of your own: interface='my.yaml'",
                hint=did_you_mean(name, known),
            )
        )
    if key not in registry.loaded:
        registry.loaded[key] = load(registry.entries[key].path)
    return registry.loaded[key]


def name_of(interface: Interface) -> str | None:
    """Name under which exactly this interface is known, None for one from elsewhere."""
    known = _registry().loaded
    for name, candidate in known.items():
        if candidate is interface:
            return name
    for model_type in interface.model_type or ():
        found = _registry().types.get(model_type)
        if found and digest(by_name(found)) == digest(interface):
            return found
    return None


def load(source: str | Path | dict[str, Any] | Interface) -> Interface:
    """An interface from a path, a model type, a dict or as it is.

    Raises: SpecError: with every problem of the file.
    """
    if isinstance(source, Interface):
        return source
    if isinstance(source, dict):
        return build(parse(json.dumps(source), "<dict>"), _document)
    path = Path(source)
    if isinstance(source, str) and path.suffix not in (".yaml", ".yml") and not path.is_file():
        return by_name(source)
    return build(read(path), lambda name: _beside(path, name), path.stem)


def load_text(content: bytes | str, file: str) -> Interface:
    """An interface from the text of a file."""
    return build(parse(content, file), _document)


def _beside(path: Path, name: str) -> Document | None:
    """`like` first looks beside the file, then among the known interfaces."""
    sibling = path.parent / f"{name}.yaml"
    return read(sibling) if Path(name).name == name and sibling.is_file() else _document(name)


def dump(interface: Interface) -> dict[str, Any]:
    """The interface as plain data, complete without other files."""
    data: dict[str, Any] = interface.model_dump(mode="json", exclude_unset=True)
    return {key: value for key, value in data.items() if key not in ("like", "only")}


def digest(interface: Interface) -> str:
    """Hash of what the interface says, whatever file it came from."""
    text = json.dumps(dump(interface), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_shipped(name: str) -> bool:
    """Whether an interface comes with adapterkit, so that files need not carry it."""
    entry = _registry().entries.get(name)
    return entry is not None and entry.shipped
