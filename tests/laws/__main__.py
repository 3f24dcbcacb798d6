"""Run the laws and print the matrix: families x methods, the number of checks that hold or `failed/all`.

Laws of setups are printed a second time, as families x blocks.

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

Cell = tuple[str, str]


class Table:
    """Outcomes by family and one more word."""

    def __init__(self) -> None:
        self.all: Counter[Cell] = Counter()
        self.failed: Counter[Cell] = Counter()

    def count(self, cell: Cell, new: bool, failed: bool) -> None:
        self.all[cell] += new
        self.failed[cell] += failed

    def __str__(self) -> str:
        rows = list(dict.fromkeys(row for row, _ in self.all))
        words = list(dict.fromkeys(word for _, word in self.all))
        table = [["", *words], *([row, *(self._cell((row, word)) for word in words)] for row in rows)]
        wide = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        return "\n".join(
            "  ".join(text.ljust(wide[i]) for i, text in enumerate(line)).rstrip() for line in table
        )

    def _cell(self, cell: Cell) -> str:
        if cell not in self.all:
            return "-"
        failed = self.failed[cell]
        return f"FAILED {failed}/{self.all[cell]}" if failed else f"ok {self.all[cell]}"


class Matrix:
    """Pytest plugin that counts outcomes by family and method, and by family and block."""

    def __init__(self) -> None:
        # a case is known by what it has: its class would bring transformers in before pytest is ready
        self.cases: dict[str, Any] = {}
        self.methods, self.blocks = Table(), Table()
        self.seen: set[str] = set()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            given: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
            case = next(
                (value for value in given.values() if hasattr(value, "row") and hasattr(value, "method")),
                None,
            )
            if case is not None:
                self.cases[item.nodeid] = case

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        case = self.cases.get(report.nodeid)
        if case is None or not (report.when == "call" or report.failed):
            return
        new = report.nodeid not in self.seen
        self.seen.add(report.nodeid)
        self.methods.count((case.row, case.method), new, report.failed)
        block = getattr(case, "block", "")
        if block:
            self.blocks.count((case.row, block), new, report.failed)

    def __str__(self) -> str:
        total = f"{self.methods.all.total()} checks, {self.methods.failed.total()} failed"
        tables = [str(table) for table in (self.methods, self.blocks) if table.all]
        return "\n\n".join([*tables, total])


def main(arguments: list[str]) -> int:
    matrix, start = Matrix(), time.perf_counter()
    here = str(Path(__file__).parent)
    code = pytest.main([here, "-q", "--no-header", "--tb=short", *arguments], plugins=[matrix])
    versions = ", ".join(f"{package} {version(package)}" for package in ("transformers", "torch"))
    print(f"{matrix}\n{time.perf_counter() - start:.0f} s, {versions}")
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
