"""The spec files of this folder, found by name, and the problems that reading one gives.

bad/<name>.yaml (or .bin) comes with bad/<name>.txt: exactly what is reported. A file called
model-<name>-<what> is also resolved on that model: a row of the table of tiny models, or one of toys.py.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from adapterkit.errors import ResolveError, SpecError
from adapterkit.model.resolve import resolve
from adapterkit.spec import registry
from tests.models import tiny
from tests.specs.toys import TOYS

HERE = Path(__file__).parent
GOOD, BAD = HERE / "good", HERE / "bad"


def names(folder: Path) -> list[str]:
    """Names of the spec files of a folder, sorted."""
    return sorted(path.name for path in folder.iterdir() if path.suffix in (".yaml", ".yml", ".bin"))


def model_for(name: str) -> nn.Module | None:
    """The model that a file is resolved on, as its name says; None for a file that is only read."""
    if not name.startswith("model-"):
        return None
    word = name.split("-")[1]
    return TOYS[word]() if word in TOYS else tiny.build(word)


def report(name: str) -> str:
    """The text of every problem of a file in the current folder; empty if there is none."""
    try:
        interface = registry.load(Path(name))
        model = model_for(name)
        if model is not None:
            resolve(model, interface)
    except (SpecError, ResolveError) as error:
        return f"{error}\n".replace(f"{registry.shipped_directory()}/", "interfaces/")
    return ""
