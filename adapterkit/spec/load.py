"""Parsed text -> Interface: what it copies is written out, words are checked, every problem has its place."""

from __future__ import annotations

from pydantic import ValidationError

from adapterkit.errors import Problem, SpecError
from adapterkit.spec import explain, like
from adapterkit.spec.like import Find
from adapterkit.spec.schema import Interface
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
    if problems:
        raise SpecError(problems)
    interface._document = whole
    return interface


def _check_version(document: Document) -> None:
    version = document.data.get("adapterkit")
    if isinstance(version, int) and not isinstance(version, bool) and version > LANGUAGE_VERSION:
        mark = document.mark(("adapterkit",))
        message = (
            f"written in version {version} of the language; this adapterkit reads version {LANGUAGE_VERSION}"
        )
        raise SpecError(
            Problem(
                "newer-language",
                message,
                "adapterkit",
                hint="update adapterkit",
                file=document.file,
                line=mark.line if mark else 0,
                column=mark.column if mark else 0,
            )
        )
