"""Processor time of `adapterkit check`: of the shipped interfaces, and of as many files as wanted.

Run: python -m benchmarks.check [--files 150] [--rounds 9]
Every round is a fresh process; reports the least and the median, since other processes only add to them.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from adapterkit.spec import registry
from benchmarks.measure import show


def many(folder: Path, count: int) -> None:
    """A directory of `count` interfaces like the shipped ones."""
    shipped = sorted(registry.shipped_directory().glob("*.yaml"))
    for number in range(count):
        source = shipped[number % len(shipped)]
        again = number // len(shipped)
        (folder / f"{source.stem}{f'_{again}' if again else ''}.yaml").write_text(source.read_text())


def seconds(*arguments: str) -> float:
    """User and system time of one fresh `adapterkit check`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "adapterkit", "check", *arguments]
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        many(Path(folder), given.files)
        for what, arguments in (("shipped", ()), (f"{given.files} files", (folder,))):
            found = [seconds(*arguments) for _ in range(given.rounds)]
            rows.append(
                {"check": what, "least s": f"{min(found):.3f}", "median s": f"{statistics.median(found):.3f}"}
            )
    show("check", rows)


if __name__ == "__main__":
    main()
