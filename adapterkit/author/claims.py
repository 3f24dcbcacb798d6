"""What an interface claims, and what was observed of each claim."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from adapterkit.errors import Problem
from adapterkit.spec.schema import Interface
from adapterkit.spec.text import Loc

Verdict = Literal["holds", "refuted", "unseen"]


@dataclass(frozen=True)
class Claim:
    """One claim of an interface and its verdict; unseen: nothing that ran could show it."""

    verdict: Verdict
    address: str
    """The words of the interface that say it."""
    text: str
    observed: str = ""
    """What was observed instead."""
    hint: str = ""
    file: str = ""
    line: int = 0
    column: int = 0

    def problem(self) -> Problem:
        """The refutation of a claim as a problem of its file."""
        place = {"file": self.file, "line": self.line, "column": self.column}
        return Problem("refuted", self.text, self.address, self.observed, self.hint, **place)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Book:
    """Gathers claims over layers, classes and configs. What one of them refutes is refuted."""

    def __init__(self) -> None:
        self._claims: dict[tuple[int, Loc, str], Claim] = {}
        self._held: list[Interface] = []
        """So that ids stay those of these."""

    def holds(self, interface: Interface, loc: Loc, text: str, aspect: str = "") -> None:
        self._put("holds", interface, loc, aspect, text)

    def unseen(self, interface: Interface, loc: Loc, text: str, aspect: str = "") -> None:
        self._put("unseen", interface, loc, aspect, text)

    def refute(
        self, interface: Interface, loc: Loc, text: str, observed: str, hint: str = "", aspect: str = ""
    ) -> None:
        self._put("refuted", interface, loc, aspect, text, observed, hint)

    def judge(
        self,
        truth: bool,
        interface: Interface,
        loc: Loc,
        text: str,
        observed: str,
        hint: str = "",
        aspect: str = "",
    ) -> bool:
        """The claim holds, or is refuted by what was observed."""
        if truth:
            self.holds(interface, loc, text, aspect)
        else:
            self.refute(interface, loc, text, observed, hint, aspect)
        return truth

    def _put(
        self,
        verdict: Verdict,
        interface: Interface,
        loc: Loc,
        aspect: str,
        text: str,
        observed: str = "",
        hint: str = "",
    ) -> None:
        rank = ("unseen", "holds", "refuted")
        key = (id(interface), loc, aspect)
        before = self._claims.get(key)
        if before is not None and rank.index(before.verdict) >= rank.index(verdict):
            return
        self._held.append(interface)
        mark = interface.mark(loc)
        where = (mark.file, mark.line, mark.column) if mark else ("", 0, 0)
        self._claims[key] = Claim(verdict, ".".join(map(str, loc)), text, observed, hint, *where)

    @property
    def refutes(self) -> bool:
        """Whether some claim is refuted."""
        return any(claim.verdict == "refuted" for claim in self._claims.values())

    def __iter__(self) -> Iterator[Claim]:
        """In the order of the file."""
        return iter(
            sorted(self._claims.values(), key=lambda c: (c.file, c.line, c.column, c.address, c.text))
        )
