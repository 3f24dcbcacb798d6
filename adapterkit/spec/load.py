"""Parsed text -> Interface: what it copies is written out, words are checked, every problem has its place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pydantic import ValidationError

from adapterkit.errors import Problem, SpecError, did_you_mean, listing
from adapterkit.spec import explain, like
from adapterkit.spec.like import Find
from adapterkit.spec.schema import Interface, Part, Stack
from adapterkit.spec.text import Document
from adapterkit.spec.vocabulary import LANGUAGE_VERSION


def build(document: Document, find: Find) -> Interface:
    """The interface that `document` describes. `find` looks up what `like` names.

    Raises: SpecError with all problems of the file, and of those that it copies.
    """
    _check_version(document)
    whole, problems = like.expand(document, find)
    broken = bool(problems)
    try:
        interface = Interface.model_validate(whole.data)
    except ValidationError as error:
        places = {(found.file, found.line, found.column) for found in problems}
        # where a copy failed words are missing, and where the text is refused its value is a stand-in
        problems += [
            found
            for found in explain.problems(error, whole)
            if not (broken and found.code == "missing-word")
            and (found.file, found.line, found.column) not in places
        ]
    else:
        problems += _unknown_reads(interface, whole)
    if problems:
        raise SpecError(problems)
    interface._document = whole
    return interface


def _unknown_reads(interface: Interface, document: Document) -> Iterator[Problem]:
    """Stacks and parts whose `reads` names none of their siblings."""
    families: tuple[tuple[str, Mapping[str, Stack | Part]], ...] = (
        ("stacks", interface.stacks),
        ("parts", interface.parts),
    )
    for word, members in families:
        for name, member in members.items():
            if member.reads and member.reads.stack not in members:
                loc = (word, name, "reads", "stack")
                asked = member.reads.stack
                message = f"there is no {asked!r} among the {word} of this file"
                hint = did_you_mean(asked, members)
                yield document.problem(loc, "unknown-stack", message, f"{word}: {listing(members)}", hint)


def _check_version(document: Document) -> None:
    version = document.data.get("adapterkit")
    if isinstance(version, int) and not isinstance(version, bool) and version > LANGUAGE_VERSION:
        message = f"written in version {version} of the language; this adapterkit reads {LANGUAGE_VERSION}"
        raise SpecError(
            document.problem(("adapterkit",), "newer-language", message, hint="update adapterkit")
        )
