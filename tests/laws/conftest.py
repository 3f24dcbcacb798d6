"""The matrix as parameters of the tests: `case`, `generating_case` and `headed_case`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest

from tests.laws import branch_cases, composition_cases, matrix
from tests.models import tiny

_SOURCES = {
    "case": matrix.cases,
    "generating_case": matrix.generating_cases,
    "headed_case": matrix.headed_cases,
}


KNOWN = {**matrix.METHODS, **branch_cases.METHODS, **composition_cases.METHODS}
"""Every method of which there are cases."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name, source in _SOURCES.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, list(_chosen(metafunc.config, source())), ids=str)


def _chosen(config: pytest.Config, cases: Iterable[tuple[matrix.Case, bool]]) -> Iterator[object]:
    rows = _words(config, "--spec", tiny.ROWS)
    methods = _words(config, "--method", KNOWN)
    for case, full in cases:
        if case.row in rows and case.method in methods:
            yield pytest.param(case, marks=[pytest.mark.full] if full else [])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Filter tests that bring cases of their own: those of the chosen rows and methods are left."""
    if not (config.getoption("--spec", None) or config.getoption("--method", None)):
        return
    rows, methods = _words(config, "--spec", tiny.ROWS), _words(config, "--method", KNOWN)
    left = []
    for item in items:
        given = item.callspec.params.values() if hasattr(item, "callspec") else ()
        cases = [value for value in given if isinstance(value, matrix.Case)]
        if all(case.row in rows and case.method in methods for case in cases):
            left.append(item)
    config.hook.pytest_deselected(items=[item for item in items if item not in left])
    items[:] = left


def _words(config: pytest.Config, option: str, known: Iterable[str]) -> set[str]:
    """The words of a filter, all if it was not given."""
    given = {word for word in str(config.getoption(option, None) or "").split(",") if word}
    unknown = sorted(given - set(known))
    if unknown:
        raise pytest.UsageError(f"{option} {', '.join(unknown)}: known are {', '.join(known)}")
    return given or set(known)
