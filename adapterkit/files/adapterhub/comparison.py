"""Whether a file has what its config asks for, and nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from adapterkit.errors import FileFormatError, Problem, did_you_mean, listing
from adapterkit.files.adapterhub.keys import Host, Keyed
from adapterkit.files.adapterhub.member import Shapes
from adapterkit.model.blueprint import Blueprint


@contextmanager
def told_of(directory: Path) -> Iterator[None]:
    """Let problems that name no file of their own name the directory that is read."""
    try:
        yield
    except FileFormatError as error:
        source = str(directory)
        raise FileFormatError(p if p.file else replace(p, file=source) for p in error.problems) from None
    except ValidationError as error:  # what their config takes and ours does not
        raise FileFormatError(
            Problem("bad-option", f"{item['input']!r} does not fit", word, item["msg"], file=str(directory))
            for item in error.errors(include_url=False)
            for word in (str(item["loc"][0]) if item["loc"] else "",)
        ) from None


def check_model(data: Mapping[str, Any], blueprint: Blueprint) -> None:
    """Refuse an adapter of another family, whose shapes may fit by chance."""
    known = blueprint.interface.model_type
    if known is not None and data["model_type"] not in known:
        message = f"made for a model of type {data['model_type']!r}"
        raise FileFormatError(
            Problem("other-model", message, expected=f"this model is described as {listing(known)}")
        )


def weights_file(directory: Path, names: Sequence[str]) -> Path:
    """The file with the weights: the first of these names that is there.

    Raises: FileFormatError: there is none.
    """
    for file in names:
        if (directory / file).is_file():
            return directory / file
    raise FileFormatError(Problem("bad-file", f"holds no weights: neither {' nor '.join(names)}"))


def differences(asked: Sequence[Mapping[Host, Shapes]], given: Keyed) -> Iterator[Problem]:
    """Where a file has not got exactly the tensors that are asked for, by each config of it."""
    if not any(asked):
        yield Problem(
            "empty-adapter", "the config adapts no module of this model, so that there is nothing to load"
        )
    for (_, host), count in Counter(host for hosts in asked for host in hosts).items():
        if count > 1:
            yield Problem("adapted-twice", "more than one config of the union adapts this module", host)
    whole = {host: shapes for hosts in asked for host, shapes in hosts.items()}
    wanted = {(host, n): shape for host, shapes in whole.items() for n, shape in shapes.items()}
    found = {(host, n): tensor for host, part in given.parts.items() for n, tensor in part.items()}
    names = {key: f"{key[0][1]}.{key[1]}" for key in (*wanted, *found)}
    known = [names[key] for key in wanted]
    for key in found.keys() - wanted.keys():
        hint = did_you_mean(names[key], known)
        yield Problem("unknown-tensors", "the config asks for no such tensor", names[key], "", hint)
    for key in wanted.keys() - found.keys():
        yield Problem("missing-tensors", "the file lacks this tensor", names[key])
    for key in wanted.keys() & found.keys():
        if tuple(found[key].shape) != wanted[key]:
            message = f"has shape {tuple(found[key].shape)}, {wanted[key]} was expected"
            yield Problem("other-shape", message, names[key])
