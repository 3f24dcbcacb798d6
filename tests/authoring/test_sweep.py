"""Verdicts on all shipped interfaces: every model type in a process of its own, and what is left to do."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.authoring import sweep
from tests.authoring.__main__ import main


def test_records_come_one_by_one_and_what_holds_is_not_done_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "records.jsonl"
    given = ["gpt_bigcode", "--claims", "--out", str(out), "--only-missing"]
    assert main(given) == 0
    (record,) = sweep.read(out)
    assert (record["state"], record["subject"], record["tried"]) == ("holds", "type", False)
    assert main(given) == 0
    assert len(sweep.read(out)) == 1 and "0 subjects" in capsys.readouterr().out


def test_what_takes_too_long_or_dies_is_ended_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "look", lambda subject, methods: time.sleep(60))
    (record,) = sweep.run([("type", "gpt2")], methods=False, jobs=1, timeout=0.5)
    assert record["state"] == "too long" and record["seconds"] < 30

    def die(subject: Any, methods: bool) -> Any:
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr(sweep, "look", die)
    (record,) = sweep.run([("type", "gpt2")], methods=False, jobs=1, timeout=60)
    assert (record["state"], record["facts"]) == ("error", ["ZeroDivisionError: by nothing"])


def test_missing_is_what_does_not_hold_on_this_version() -> None:
    here = transformers.__version__
    made = {"subject": "type", "tried": False}
    known = [
        {**made, "name": "a", "state": "holds", "transformers": here},
        {**made, "name": "b", "state": "holds", "transformers": "5.0.0"},
        {**made, "name": "c", "state": "holds", "transformers": here},
        {**made, "name": "c", "state": "refuted", "transformers": here},
    ]
    chosen = [("type", name) for name in "abcd"]
    assert [name for _, name in sweep.missing(chosen, known, methods=False)] == ["b", "c", "d"]
    assert len(sweep.missing(chosen, known, methods=True)) == 4
