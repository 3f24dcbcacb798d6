"""Random trees of blocks, run: every row of the output is what its example gets alone, and no row is lost."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import adapterkit as ak
from adapterkit.composition import (
    Average,
    BatchSplit,
    MultiTask,
    Parallel,
    Route,
    Setup,
    Stack,
    check,
    copies,
    examples,
    from_dict,
    parse,
    to_dict,
)
from adapterkit.errors import CompositionError
from tests.laws.branch_cases import randomise
from tests.laws.composition_cases import BATCH, assert_rows
from tests.models import tiny

METHODS = {
    "a": "lora[r=3]",
    "b": "seq_bn[reduction_factor=4]",
    "c": "lora[r=2, targets=[q, down]]|par_bn[reduction_factor=8]",
    "d": "ia3",
}


@cache
def kit_of(row: str, cls: str) -> ak.Kit:
    """Adapters a to d; each has a head of its own where the class has one."""
    model = tiny.build(row, cls)
    for seed, (name, method) in enumerate(METHODS.items()):
        kit = ak.attach(model, method, name=name, seed=seed)
        randomise(kit, name, seed=seed)
    return kit


@st.composite
def setups(draw: Any) -> Setup:
    """A legal tree: what repeats the batch lies in Stack or Parallel alone, and one block asks for rows."""
    left = {"Route": 1, "MultiTask": 1}

    def some(many: int = 3) -> int:
        return int(draw(st.integers(1, many)))

    def tree(depth: int, number: int | None, repeats: bool) -> Setup:
        kinds = ["name", "Stack", "Average"]
        kinds += ["Parallel"] if repeats else []
        kinds += ["BatchSplit"] if number else []
        kinds += [kind for kind, count in left.items() if count]
        kind = draw(st.sampled_from(kinds)) if depth else "name"
        if kind == "name":
            return str(draw(st.sampled_from(sorted(METHODS))))
        if kind == "Stack":
            children = [tree(depth - 1, number, False) for _ in range(some(2))]
            if repeats and draw(st.booleans()):
                children.insert(draw(st.integers(0, len(children))), tree(depth - 1, number, True))
            return Stack(*children)
        if kind == "Parallel":
            return Parallel(*[tree(depth - 1, number, True) for _ in range(some())])
        if kind == "Average":
            children = [tree(depth - 1, number, False) for _ in range(some(2))]
            weights = draw(st.lists(st.integers(1, 4), min_size=len(children), max_size=len(children)))
            return Average(*children, weights=weights)
        if kind == "BatchSplit":
            assert number is not None
            cuts = sorted(draw(st.lists(st.integers(0, number), min_size=1, max_size=2)))
            sizes = [end - start for start, end in zip([0, *cuts], [*cuts, number], strict=True)]
            return BatchSplit(*[tree(depth - 1, size or None, False) for size in sizes], batch_sizes=sizes)
        left[kind] = 0
        block = Route if kind == "Route" else MultiTask
        return block(*[tree(depth - 1, None, False) for _ in range(some())])

    return tree(3, BATCH, True)


def children(setup: Setup, kind: type[Any]) -> int:
    """How many children the block of a kind has, 1 if there is none."""
    if isinstance(setup, str):
        return 1
    if isinstance(setup, kind):
        return len(setup.children)
    return max(children(child, kind) for child in setup.children)


@pytest.mark.parametrize(
    ("row", "cls"),
    [
        ("bert", "BertModel"),
        ("bert", "BertForSequenceClassification"),
        pytest.param("llama", "LlamaModel", marks=pytest.mark.full),
        pytest.param("t5", "T5ForSequenceClassification", marks=pytest.mark.full),
    ],
)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(setup=setups(), data=st.data())
def test_every_row_of_a_random_tree(row: str, cls: str, setup: Setup, data: Any) -> None:
    check(setup)
    assert examples(setup) in (None, BATCH)
    assert parse(repr(setup)) == setup == from_dict(to_dict(setup)) or isinstance(setup, str)
    rows = [data.draw(st.integers(-1, children(setup, Route) - 1)) for _ in range(BATCH)]
    tasks = [data.draw(st.integers(0, children(setup, MultiTask) - 1)) for _ in range(BATCH)]
    kit, inputs = kit_of(row, cls), tiny.inputs(row, cls, batch=BATCH)
    assert_rows(kit, setup, inputs, rows, tasks)


@settings(max_examples=40, deadline=None)
@given(setup=setups(), batch=st.integers(1, 6))
def test_a_batch_of_another_size_is_refused_or_repeated(setup: Setup, batch: int) -> None:
    kit, inputs = kit_of("bert", "BertModel"), tiny.inputs("bert", "BertModel", batch=batch)
    if "Route" in repr(setup) or "MultiTask" in repr(setup):
        return
    with kit.using(setup):
        if examples(setup) in (None, batch):
            assert kit.model(**inputs).last_hidden_state.shape[0] == batch * copies(setup)
        else:
            with pytest.raises(CompositionError) as caught:
                kit.model(**inputs)
            assert caught.value.code == "batch-mismatch"
