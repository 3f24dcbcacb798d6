"""How many recorded cases agree: `python -m tests.parity.report <recording>`. Exit code 1 if one is wrong."""

from __future__ import annotations

import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import transformers

from tests.parity.compare import Result, run
from tests.parity.recordings import ABOUT, Case, cases, root


def results(recording: Path) -> dict[Case, Result]:
    """What became of every case."""
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as work:
        return {case: run(case, Path(work)) for case in cases(recording)}


def about(case: Case) -> str:
    """What a case is about."""
    return next(words for words, names in ABOUT.items() if re.fullmatch(names, case.name))


def table(found: dict[Case, Result], title: str, group: Callable[[Case], str]) -> str:
    """Counts per group."""
    columns = sorted({_column(result) for result in found.values()} | {"agree", "wrong"})
    counts = {words: Counter[str]() for words in sorted({group(case) for case in found})}
    for case, result in found.items():
        counts[group(case)][_column(result)] += 1
    total = sum(counts.values(), Counter[str]())
    rows = [[title, *columns]]
    rows += [[words, *(str(count[column]) for column in columns)] for words, count in counts.items()]
    rows += [["total", *(str(total[column]) for column in columns)]]
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, wide, strict=True)) for row in rows]
    return "\n".join(lines)


def _column(result: Result) -> str:
    return f"refused {result.code}" if result.code else result.status


def main() -> int:
    found = results(Path(sys.argv[1]) if len(sys.argv) > 1 else root())
    print(table(found, "family", lambda case: case.family), table(found, "about", about), sep="\n\n")
    for case, result in found.items():
        if result.status != "agree":
            print(f"{_column(result)}: {case}: {result.worst:.3g} {result.where}")
    return int(any(result.status == "wrong" for result in found.values()))


if __name__ == "__main__":
    sys.exit(main())
