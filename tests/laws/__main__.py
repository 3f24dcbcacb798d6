"""Run the laws and print the matrix: families x methods, the number of checks that hold or `failed/all`.

python -m tests.laws                        the default run: base class and one class with a head
python -m tests.laws -m ""                  every class and variant
python -m tests.laws --spec bert,llama --method lora -x        any other option of pytest
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

CASES = ("case", "generating_case", "headed_case")


class Matrix:
    """Pytest plugin that counts outcomes by family and method."""

    def __init__(self) -> None:
        self.cells: dict[str, tuple[str, str]] = {}
        self.all: Counter[tuple[str, str]] = Counter()
        self.failed: Counter[tuple[str, str]] = Counter()
        self.seen: set[str] = set()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            given: dict[str, Any] = item.callspec.params if isinstance(item, pytest.Function) else {}
            case = next((given[name] for name in CASES if name in given), None)
            if case is not None:
                self.cells[item.nodeid] = (case.row, case.method)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        cell = self.cells.get(report.nodeid)
        if cell is not None and (report.when == "call" or report.failed):
            self.all[cell] += report.nodeid not in self.seen
            self.seen.add(report.nodeid)
            self.failed[cell] += report.failed

    def __str__(self) -> str:
        rows = list(dict.fromkeys(row for row, _ in self.all))
        methods = list(dict.fromkeys(method for _, method in self.all))
        table = [["", *methods], *([row, *(self._cell((row, method)) for method in methods)] for row in rows)]
        wide = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        lines = ["  ".join(text.ljust(wide[i]) for i, text in enumerate(line)).rstrip() for line in table]
        total = f"{self.all.total()} checks, {self.failed.total()} failed"
        return "\n".join([*lines, total])

    def _cell(self, cell: tuple[str, str]) -> str:
        if cell not in self.all:
            return "-"
        failed = self.failed[cell]
        return f"FAILED {failed}/{self.all[cell]}" if failed else f"ok {self.all[cell]}"


def main(arguments: list[str]) -> int:
    matrix, start = Matrix(), time.perf_counter()
    here = str(Path(__file__).parent)
    code = pytest.main([here, "-q", "--no-header", "--tb=short", *arguments], plugins=[matrix])
    versions = ", ".join(f"{package} {version(package)}" for package in ("transformers", "torch"))
    print(f"{matrix}\n{time.perf_counter() - start:.0f} s, {versions}")
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
