"""Run the tests at both ends of the range of transformers, each in an environment of its own.

    python -m tests.versions                                     both ends, the default run
    python -m tests.versions --end low -- tests/laws -k lora     one end; what follows '--' goes to pytest
    python -m tests.versions --python low=/path/to/python        take an environment that exists

Environments are made in `.venv-low` and `.venv-new` and used again.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from adapterkit.versions import TRANSFORMERS_TESTED

ROOT = Path(__file__).parents[1]
ENDS: Mapping[str, str] = {"low": f"transformers=={TRANSFORMERS_TESTED[0]}", "new": "transformers<6"}
FAST = ("tests/unit", "tests/models", "tests/laws/test_forward.py", "tests/laws/test_merge.py", "tests/docs")
"""What says most about another version of transformers in little time: every family is built, resolved and
adapted."""

COUNT = re.compile(r"(\d+) (passed|failed|errors?|skipped|deselected|xfailed)")


@dataclass(frozen=True)
class Result:
    """What one end gave."""

    end: str
    versions: str
    counts: Mapping[str, int]
    seconds: float
    status: int

    @property
    def row(self) -> tuple[str, ...]:
        numbers = (str(self.counts.get(word, 0)) for word in ("passed", "failed", "error", "skipped"))
        return (
            self.end,
            self.versions,
            *numbers,
            f"{self.seconds:.0f} s",
            "ok" if self.status == 0 else "FAILED",
        )


def counts(line: str) -> dict[str, int]:
    """The numbers in pytest's closing line."""
    return {word.removesuffix("s"): int(number) for number, word in COUNT.findall(line)}


def environment(end: str, first: Sequence[str]) -> Path:
    """The Python of a virtual environment with one end of the range; `first` is installed before all else."""
    folder = ROOT / f".venv-{end}"
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if first:
        subprocess.run([*pip, *first], check=True)
    upgrade = ["--upgrade"] if end == "new" else []
    subprocess.run([*pip, *upgrade, "--editable", f"{ROOT}[test]", ENDS[end]], check=True)
    return python


def versions(python: Path) -> str:
    """transformers and torch of an environment."""
    code = "from importlib.metadata import version as v; print(v('transformers'), v('torch'))"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def run(end: str, python: Path, arguments: Sequence[str]) -> Result:
    """The tests in one environment; what they print is passed on."""
    start, last = time.monotonic(), ""
    command = [python, "-m", "pytest", "-n", "2", *arguments]
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | offline, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line if COUNT.search(line) else last
    return Result(end, versions(python), counts(last), time.monotonic() - start, process.returncode)


def table(results: Sequence[Result]) -> str:
    """All results, one line each."""
    rows = [
        ("end", "transformers, torch", "passed", "failed", "errors", "skipped", "time", ""),
        *(r.row for r in results),
    ]
    wide = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(wide[i]) for i, cell in enumerate(row)).rstrip() for row in rows)


def main() -> int:
    """Exit status 1 if one end fails."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.versions", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--end", choices=ENDS, action="append", help="this end only (default: both)")
    parser.add_argument(
        "--python", metavar="END=PATH", action="append", default=[], help="an interpreter to use as it is"
    )
    parser.add_argument(
        "--first", metavar="SPEC", action="append", default=[], help="install this before all else"
    )
    parser.add_argument("--fast", action="store_true", help="a selection that says most in little time")
    parser.add_argument("arguments", nargs="*", help="for pytest, after '--'")
    given = parser.parse_args()
    ready = dict(item.split("=", 1) for item in given.python)
    if unknown := ready.keys() - ENDS.keys():
        parser.error(f"--python takes {' or '.join(ENDS)}, not {', '.join(sorted(unknown))}")
    results = []
    for end in given.end or ENDS:
        python = Path(ready[end]) if end in ready else environment(end, given.first)
        results.append(run(end, python, [*(FAST if given.fast else ()), *given.arguments]))
    print(f"\n{table(results)}")
    return int(any(result.status for result in results))


if __name__ == "__main__":
    sys.exit(main())
