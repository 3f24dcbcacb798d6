"""The runner of both ends of the range reads pytest's numbers right."""

from __future__ import annotations

import subprocess
import sys

from adapterkit.versions import TRANSFORMERS_TESTED
from tests import versions


def test_closing_lines_are_read() -> None:
    assert versions.counts("=== 2 failed, 31 passed, 4 skipped, 1 error in 9.12s ===") == {
        "failed": 2,
        "passed": 31,
        "skipped": 4,
        "error": 1,
    }
    assert versions.counts("3 errors in 0.1s") == {"error": 3}


def test_low_end_is_the_lowest_that_is_allowed() -> None:
    assert versions.ENDS["low"] == f"transformers=={TRANSFORMERS_TESTED[0]}"


def test_the_table_says_what_failed() -> None:
    good = versions.Result("low", "5.5.0 2.13.0", {"passed": 7}, 3.2, 0)
    bad = versions.Result("new", "5.23.0 2.13.0", {"passed": 6, "failed": 1}, 3.2, 1)
    head, first, second = versions.table([good, bad]).splitlines()
    assert head.split() == ["end", "transformers,", "torch", "passed", "failed", "errors", "skipped", "time"]
    assert first.split() == ["low", "5.5.0", "2.13.0", "7", "0", "0", "0", "3", "s", "ok"]
    assert second.split() == ["new", "5.23.0", "2.13.0", "6", "1", "0", "0", "3", "s", "FAILED"]


def test_an_interpreter_that_exists_is_taken() -> None:
    """A run of one quick test, in the environment of this one."""
    chosen = ["--end", "low", "--python", f"low={sys.executable}"]
    test = f"{__file__}::{test_low_end_is_the_lowest_that_is_allowed.__name__}"
    command = [sys.executable, "-m", "tests.versions", *chosen, "--", test]
    done = subprocess.run(command, cwd=versions.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].split()[3:7] == ["1", "0", "0", "0"]
