"""The benchmark of reach: one type through all its stages, and the report."""

from __future__ import annotations

from benchmarks import reach


def test_one_type_through_all_stages() -> None:
    record = reach.reach("opt", methods=())
    assert (record["built"], record["ran"], record["complete"], record["gaps"]) == (True, True, True, [])
    assert record["attention"] == 2 and record["stacks"] == ["decoder"]


def test_a_type_that_cannot_be_built_is_a_record() -> None:
    record = reach.reach("no_such_type")
    assert (record["built"], record["ran"]) == (False, False) and "none of this name" in record["why"]


def test_the_report_counts_of_those_with_attention() -> None:
    plain = {"built": True, "ran": True, "attention": 2}
    proved = dict.fromkeys(reach.NINE, "")
    impossible = {"reft": f"{reach.FACT}refused: no positions"}
    records = [
        {"type": "a", **plain, "complete": True, "gaps": [], "columns": proved},
        {"type": "b", **plain, "complete": True, "gaps": [], "columns": proved | {"reft": "broken: x"}},
        {"type": "c", **plain, "complete": False, "gaps": ["stacks.a: q: none"]},
        {"type": "f", **plain, "complete": True, "gaps": [], "columns": proved | impossible},
        {"type": "g", **plain, "complete": True, "gaps": [], "columns": {"lora": ""}},
        {"type": "d", "built": True, "ran": True, "attention": 0},
        {"type": "e", "built": False, "ran": False, "attention": 0, "why": "too large"},
    ]
    lines = [" ".join(line.split()) for line in reach.report(records).splitlines()]
    expected = (
        "built tiny 6 85.7% of 7",
        "ran with attention 5 71.4% of 7",
        "drafted completely 4 80.0% of 5",
        "... passing the laws of LoRA 4 80.0% of 5",
        "... of all columns 2 40.0% of 5",
        "without any fact of the model 1 20.0% of 5",
        "1 reft: broken: x",
        "b: reft: broken: x",
        "c: no complete draft: stacks.a: q: none",
        "e: too large",
    )
    assert [line for line in expected if line not in lines] == []
    assert not any(line.startswith(("a:", "f:")) for line in lines)
