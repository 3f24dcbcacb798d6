"""Problems and the errors that carry them. Standard library only: every other room may import this one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import Any


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: what, where, what was expected, what to try.

    `line` and `column` count from 1; 0 means that the problem has no place in a text.
    """

    code: str
    message: str
    address: str = ""
    expected: str = ""
    hint: str = ""
    file: str = ""
    line: int = 0
    column: int = 0

    def sort_key(self) -> tuple[str, int, int, str, str, str]:
        return (self.file, self.line, self.column, self.address, self.code, self.message)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        place = (
            f"{self.file}:{self.line}:{self.column}: " if self.line else f"{self.file}: " if self.file else ""
        )
        head = f"{place}error[{self.code}]" + (f" {self.address}" if self.address else "")
        return "\n  ".join(line for line in (head, self.message, self.expected, self.hint) if line)


class AdapterkitError(Exception):
    """Base of every error of adapterkit. Holds all problems that were found, sorted by place."""

    def __init__(self, problems: Problem | Iterable[Problem]) -> None:
        found = [problems] if isinstance(problems, Problem) else list(problems)
        self.problems: tuple[Problem, ...] = tuple(sorted(set(found), key=Problem.sort_key))
        super().__init__("\n".join(str(problem) for problem in self.problems))

    @property
    def code(self) -> str:
        """Code of the first problem; docs/errors.md explains each."""
        return self.problems[0].code

    @property
    def address(self) -> str:
        return self.problems[0].address

    def to_dict(self) -> dict[str, Any]:
        return {"error": type(self).__name__, "problems": [problem.to_dict() for problem in self.problems]}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problems,)


class SpecError(AdapterkitError):
    """An interface file cannot be read, or says something the language does not know."""


class ResolveError(AdapterkitError):
    """An interface does not fit the model at hand."""


class ConfigError(AdapterkitError):
    """A method or its options are wrong."""


class PlanError(AdapterkitError):
    """What was asked for cannot be done on this model, or not completely."""


class CompositionError(AdapterkitError):
    """A setup of adapters is not legal."""


class FileFormatError(AdapterkitError):
    """A file of adapter weights cannot be read exactly, or does not fit."""


class NotAttachedError(AdapterkitError, KeyError):
    """There is no kit on this model, or no adapter of this name in it; for a mapping that is a KeyError."""

    __str__ = Exception.__str__  # a KeyError shows the repr of what it was given


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The hint line for a misspelt word, empty if nothing is near."""
    word, same = str(word)[:200], {name: name for name in known if name}
    for asked, names in (word, same), (word.casefold(), {name.casefold(): name for name in same}):
        near = get_close_matches(asked, names, n=1, cutoff=0.6)
        if near:
            return f"did you mean {names[near[0]]!r}?"
    return ""


def listing(names: Iterable[str], limit: int = 12) -> str:
    """Names in one line, cut when there are many."""
    found: Sequence[str] = list(names)
    shown = ", ".join(found[:limit])
    return shown + (f", ... ({len(found)} in all)" if len(found) > limit else "") if found else "none"
