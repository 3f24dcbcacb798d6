"""The benchmark of reach: one type through all its stages, and the report."""

from __future__ import annotations

from benchmarks import reach


def test_one_type_through_all_stages() -> None:
    record = reach.reach("opt", methods=False)
    assert (record["built"], record["ran"], record["complete"], record["gaps"]) == (True, True, True, [])
    assert record["attention"] == 2 and record["stacks"] == ["decoder"]


def test_a_type_that_cannot_be_built_is_a_record() -> None:
    record = reach.reach("no_such_type")
    assert (record["built"], record["ran"]) == (False, False) and "none of this name" in record["why"]


def test_the_report_counts_of_those_with_attention() -> None:
    plain = {"built": True, "ran": True, "attention": 2}
    records = [
        {"type": "a", **plain, "complete": True, "gaps": [], "columns": {"lora": "", "reft": ""}},
        {"type": "b", **plain, "complete": True, "gaps": [], "columns": {"lora": "", "reft": "broken: x"}},
        {"type": "c", **plain, "complete": False, "gaps": ["stacks.a: q: none"]},
        {"type": "d", "built": True, "ran": True, "attention": 0},
        {"type": "e", "built": False, "ran": False, "attention": 0, "why": "too large"},
    ]
    lines = [" ".join(line.split()) for line in reach.report(records).splitlines()]
    expected = (
        "built tiny 4 80.0% of 5",
        "ran with attention 3 60.0% of 5",
        "drafted completely 2 66.7% of 3",
        "... passing the laws of LoRA 2 66.7% of 3",
        "... of all columns 1 33.3% of 3",
    )
    assert [line for line in expected if line not in lines] == []
    assert "1 reft: broken: x" in lines
