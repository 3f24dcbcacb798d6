"""`adapterkit check`: read interface files, resolve them on models if asked. No torch until then."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.errors import AdapterkitError, ConfigError, Problem, ResolveError, SpecError
from adapterkit.spec import registry
from adapterkit.spec.schema import Interface
from adapterkit.spec.text import MAX_BYTES

if TYPE_CHECKING:
    from torch import nn

STDIN = "<stdin>"


@dataclass(frozen=True)
class Checked:
    """One file, what is wrong with it, and the models on which everything that it names was found."""

    file: str
    problems: tuple[Problem, ...] = ()
    interface: Interface | None = None
    verified_on: tuple[str, ...] = ()


def run(files: Sequence[str], model: str | None, require_model: bool) -> list[Checked]:
    """Check files, directories or '-'; without any the known interfaces, of which --model leaves one.

    Raises: ConfigError: no such model, or nothing to check.
    """
    from adapterkit.cli import models  # it loads torch only when a model is made

    target = models.named(model) if model is not None else None
    if target is not None and not files:
        files = [_file_for(target)]
    gc.disable()  # all that is read is kept: looking for garbage would take a tenth of the time
    try:
        found = [_read(name) for name in (_given(files) if files else _known())]
    finally:
        gc.enable()
    if not found:
        raise ConfigError(
            Problem("nothing-to-check", "there is no interface file", expected="a directory with *.yaml")
        )
    if target is not None:
        found = [_verified(one, [target]) for one in found]
    elif require_model:
        found = [_verified_on_defaults(one) for one in found]
    return found


def _given(files: Iterable[str]) -> Iterator[str]:
    """Files; directories stand for their files, names of interfaces and model types for theirs."""
    for name in files:
        if name == "-":
            yield name
        elif not Path(name).exists() and (name in registry.interfaces() or name in registry.model_types()):
            mark = registry.by_name(name).mark(())
            yield os.path.relpath(mark.file) if mark else name
        else:
            yield from (str(path) for path in registry.files_in(Path(name)))


def _known() -> Iterator[str]:
    """Every known file, relative to where we are if it is below."""
    here = Path.cwd()
    for entry in registry.known_files():
        yield str(entry.path.relative_to(here) if entry.path.is_relative_to(here) else entry.path)


def _read(name: str) -> Checked:
    shown = STDIN if name == "-" else name
    try:
        if name == "-":
            return Checked(shown, interface=registry.load_text(sys.stdin.buffer.read(MAX_BYTES + 1), shown))
        return Checked(shown, interface=registry.load(Path(name)))
    except SpecError as error:
        return Checked(shown, error.problems)


def _file_for(model: nn.Module) -> str:
    """The file of the interface that is known for the model's type."""
    from adapterkit.model.resolve import interface_of

    mark = interface_of(model).mark(())
    return os.path.relpath(mark.file) if mark else ""


def _verified(one: Checked, targets: Iterable[nn.Module]) -> Checked:
    """Resolve on models."""
    from adapterkit.model.resolve import resolve

    if one.interface is None:
        return one
    problems: list[Problem] = []
    names: list[str] = []
    for target in targets:
        try:
            resolve(target, one.interface)
        except ResolveError as error:
            problems += [
                problem if problem.file else replace(problem, file=one.file) for problem in error.problems
            ]
        else:
            names.append(type(target).__name__)
    return replace(one, problems=tuple(problems), verified_on=tuple(names))


def _verified_on_defaults(one: Checked) -> Checked:
    """Resolve on a model of each model type of the file; where there is none, that is a problem."""
    from adapterkit.cli import models

    if one.interface is None:
        return one
    targets, problems = [], []
    types = one.interface.model_type or ()
    for model_type in types:
        try:
            targets.append(models.named(model_type))
        except AdapterkitError as error:
            problems.append(
                Problem("not-verified", error.problems[0].message, expected="--model", file=one.file)
            )
    if not types:
        message = "the file names no model type that it could be verified on"
        problems.append(Problem("not-verified", message, expected="--model", file=one.file))
    found = _verified(one, targets)
    return replace(found, problems=(*problems, *found.problems))
