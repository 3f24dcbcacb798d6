"""How many recorded cases agree: `python -m tests.parity.report <recording>`. Exit code 1 if one is wrong."""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path

import transformers

from tests.parity.compare import Result, run
from tests.parity.recordings import Case, cases, root


def results(recording: Path) -> dict[Case, Result]:
    """What became of every case of the LoRA family."""
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as work:
        return {case: run(case, Path(work)) for case in cases(recording)}


def table(found: dict[Case, Result]) -> str:
    """Counts per family, then each case that is wrong."""
    columns = sorted({_column(result) for result in found.values()} | {"agree", "wrong"})
    counts = {family: Counter[str]() for family in sorted({case.family for case in found})}
    for case, result in found.items():
        counts[case.family][_column(result)] += 1
    total = sum(counts.values(), Counter[str]())
    rows = [["family", *columns]]
    rows += [[family, *(str(count[column]) for column in columns)] for family, count in counts.items()]
    rows += [["total", *(str(total[column]) for column in columns)]]
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, wide, strict=True)) for row in rows]
    wrong = [f"wrong: {case}: {r.worst:.3g} in {r.where}" for case, r in found.items() if r.status == "wrong"]
    return "\n".join([*lines, *wrong])


def _column(result: Result) -> str:
    return f"refused {result.code}" if result.code else result.status


def main() -> int:
    found = results(Path(sys.argv[1]) if len(sys.argv) > 1 else root())
    print(table(found))
    return int(any(result.status == "wrong" for result in found.values()))


if __name__ == "__main__":
    sys.exit(main())
