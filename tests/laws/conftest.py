"""The matrix as parameters of the tests: `case`, `generating_case` and `headed_case`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest

from tests.laws import matrix
from tests.models import tiny

_SOURCES = {
    "case": matrix.cases,
    "generating_case": matrix.generating_cases,
    "headed_case": matrix.headed_cases,
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name, source in _SOURCES.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, list(_chosen(metafunc.config, source())), ids=str)


def _chosen(config: pytest.Config, cases: Iterable[tuple[matrix.Case, bool]]) -> Iterator[object]:
    rows = _words(config, "--spec", tiny.ROWS)
    methods = _words(config, "--method", matrix.METHODS)
    for case, full in cases:
        if case.row in rows and case.method in methods:
            yield pytest.param(case, marks=[pytest.mark.full] if full else [])


def _words(config: pytest.Config, option: str, known: Iterable[str]) -> set[str]:
    """The words of a filter, all if it was not given."""
    given = {word for word in str(config.getoption(option, None) or "").split(",") if word}
    unknown = sorted(given - set(known))
    if unknown:
        raise pytest.UsageError(f"{option} {', '.join(unknown)}: known are {', '.join(known)}")
    return given or set(known)
