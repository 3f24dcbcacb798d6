"""Setups as values: what can be said, how it is printed and read, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapterkit.composition import (
    Average,
    BatchSplit,
    Fuse,
    MultiTask,
    Parallel,
    Route,
    Setup,
    Split,
    Stack,
    check,
    copies,
    examples,
    from_dict,
    names,
    parse,
    to_dict,
)
from adapterkit.errors import CompositionError
from tests.unit.kit_scene import refused

NAMES = st.sampled_from(["a", "b-1", "c_2", "train"])


def _blocks(children: st.SearchStrategy[Setup]) -> st.SearchStrategy[Setup]:
    some = st.lists(children, min_size=1, max_size=3)
    number = st.integers(1, 4)

    def sized(block: Any, option: str) -> st.SearchStrategy[Setup]:
        return some.flatmap(
            lambda own: st.lists(number, min_size=len(own), max_size=len(own)).map(
                lambda sizes: block(*own, **{option: sizes})
            )
        )

    plain = [some.map(lambda own, block=block: block(*own)) for block in (Stack, Parallel, MultiTask, Route)]
    weighted = some.flatmap(
        lambda own: st.builds(
            lambda weights, normalize: Average(*own, weights=weights, normalize=normalize),
            st.none() | st.lists(st.floats(0.1, 9), min_size=len(own), max_size=len(own)),
            st.booleans(),
        )
    )
    fused = st.lists(NAMES, min_size=2, max_size=3, unique=True).flatmap(
        lambda own: st.builds(
            lambda name, before: Fuse(Stack(*before, own[0]) if before else own[0], *own[1:], name=name),
            st.none() | st.just("f"),
            st.lists(NAMES, max_size=2),
        )
    )
    sizes = (sized(Split, "splits"), sized(BatchSplit, "batch_sizes"))
    return st.one_of(*plain, *sizes, weighted, fused)


SETUPS = st.recursive(NAMES, _blocks, max_leaves=8)


@given(SETUPS)
def test_every_setup_is_read_back_from_its_text_and_its_data(setup: Setup) -> None:
    text = setup if isinstance(setup, str) else repr(setup)
    assert parse(text) == setup
    assert from_dict(to_dict(setup)) == setup
    assert hash(parse(text)) == hash(setup)


def rows(setup: Setup, batch: list[int]) -> list[tuple[int, frozenset[str]]]:
    """Every row of the output: its example and the adapters that may act on it. Written from the meaning."""
    if isinstance(setup, str):
        return [(example, frozenset({setup})) for example in batch]
    if isinstance(setup, Parallel):
        return [row for child in setup.children for row in rows(child, batch)]
    if isinstance(setup, BatchSplit):
        found, start = [], 0
        for child, size in zip(setup.children, setup.batch_sizes, strict=True):
            found += rows(child, batch[start : start + size])
            start += size
        assert start == len(batch)
        return found
    if isinstance(setup, Fuse):
        inside = frozenset().union(*(own for child in setup.children for _, own in rows(child, [0])))
        return [(example, inside | {setup.name}) for example in batch]
    parts = [rows(child, batch) for child in setup.children]
    wide = max(map(len, parts))
    parts = [part * (wide // len(part)) for part in parts]
    return [
        (found[0][0], frozenset().union(*(own for _, own in found))) for found in zip(*parts, strict=True)
    ]


@given(SETUPS)
def test_a_setup_that_is_not_refused_gives_every_row_to_someone(setup: Setup) -> None:
    try:
        check(setup)
    except CompositionError as error:
        assert error.code in ("bad-nesting", "batch-mismatch")
        return
    number = examples(setup) or 3
    found = rows(setup, list(range(number)))
    assert [example for example, _ in found] == list(range(number)) * copies(setup)
    assert frozenset().union(*(own for _, own in found)) == set(names(setup))


def test_sizes_and_weights_may_be_numbers_of_other_libraries() -> None:
    assert Split("a", "b", splits=np.array([3, 4])) == Split("a", "b", splits=torch.tensor([3, 4]))
    assert repr(BatchSplit("a", "b", batch_sizes=np.int64(3))) == "BatchSplit('a', 'b', batch_sizes=[3, 3])"
    assert Average("a", "b", weights=torch.tensor([0.5, 2])) == Average("a", "b", weights=np.array([0.5, 2]))
    assert repr(Average("a", "b", weights=torch.tensor([1, 3]))) == "Average('a', 'b', weights=[1.0, 3.0])"
    refused(CompositionError, "bad-setup", lambda: Split("a", "b", splits=torch.tensor([4])))
    refused(CompositionError, "bad-setup", lambda: Split("a", "b", splits=np.array([0.5, 4])))


def test_a_block_gives_its_data_and_is_made_of_it() -> None:
    one = Stack("a", Split("b", "c", splits=[2, 3]))
    assert one.to_dict() == to_dict(one)
    assert Stack.from_dict(one.to_dict()) == one


def test_setups_are_values() -> None:
    one = Stack("a", Average("b", "c", weights=[1, 3]))
    assert one == Stack("a", Average("b", "c", weights=(1.0, 3.0))) != Stack("a", "b")
    assert {one: 1}[parse(repr(one))] == 1
    assert repr(one) == "Stack('a', Average('b', 'c', weights=[1.0, 3.0]))"
    assert repr(Split("a", "b", splits=3)) == "Split('a', 'b', splits=[3, 3])"
    assert repr(Fuse("a", "b")) == "Fuse('a', 'b')" and repr(Fuse("a", "b", name="x")).endswith("name='x')")
    assert parse(" Parallel(a, Stack(b, 'c-1')) ") == Parallel("a", Stack("b", "c-1"))
    assert to_dict(one)["children"][1] == {"block": "Average", "children": ["b", "c"], "weights": [1.0, 3.0]}
    assert Average("a", "b", weights=[1, 3]).shares == (0.25, 0.75)
    assert Average("a", "b", weights=[1, 3], normalize=False).shares == (1, 3)
    assert names(Stack("a", Fuse("b", "c"), "a")) == ("a", "b+c", "b", "c")
    with pytest.raises(AttributeError):
        one.children = ()  # type: ignore[misc]


@pytest.mark.parametrize(
    "call",
    [
        Stack,
        lambda: Stack(3),  # type: ignore[arg-type]
        lambda: Fuse("a"),
        lambda: Fuse("a", "a"),
        lambda: Fuse("a", Stack("b", "a")),
        lambda: Fuse("a", "b", name=3),  # type: ignore[arg-type]
        lambda: Split("a", "b", splits=[1]),
        lambda: Split("a", "b", splits=[1, -1]),
        lambda: Split("a", "b", splits=[0, 0]),
        lambda: Split("a", "b", splits="12"),  # type: ignore[arg-type]
        lambda: BatchSplit("a", batch_sizes=[1.5]),  # type: ignore[list-item]
        lambda: BatchSplit("a", batch_sizes=[True]),
        lambda: Average("a", "b", weights=[1]),
        lambda: Average("a", "b", weights=[1, float("nan")]),
        lambda: Average("a", "b", weights=[1, -1]),
        lambda: Average("a", normalize=2),  # type: ignore[arg-type]
        lambda: parse("Stack(a"),
        lambda: parse("Stak(a)"),
        lambda: parse("Stack(a.b)"),
        lambda: parse("Split(a, b)"),
        lambda: parse("Stack(a, splits=[1])"),
        lambda: parse("Split(a, splits=f())"),
        lambda: from_dict({"block": "Stack"}),
        lambda: from_dict([]),
        lambda: check(3),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_setup(call: Any) -> None:
    refused(CompositionError, "bad-setup", call)


def test_a_misspelt_block_is_told() -> None:
    assert "did you mean 'Stack'?" in str(refused(CompositionError, "bad-setup", parse, "Stak(a)"))


@pytest.mark.parametrize(
    ("setup", "code"),
    [
        (Average("a", Parallel("b", "c")), "bad-nesting"),
        (BatchSplit(Parallel("a", "b"), "c", batch_sizes=[1, 1]), "bad-nesting"),
        (Split(Stack("a", Parallel("b", "c")), "d", splits=[1, 1]), "bad-nesting"),
        (Route(Parallel("a", "b"), "c"), "bad-nesting"),
        (Route(BatchSplit("a", "b", batch_sizes=[1, 1]), "c"), "bad-nesting"),
        (MultiTask(BatchSplit("a", "b", batch_sizes=[1, 1]), "c"), "bad-nesting"),
        (Parallel(Route("a", "b"), Route("c", "d")), "bad-nesting"),
        (Stack(MultiTask("a", "b"), MultiTask("c", "d")), "bad-nesting"),
        (Stack(Parallel("a", "b"), Parallel("a", "b", "c")), "bad-nesting"),
        (Stack(BatchSplit("a", "b", batch_sizes=[1, 1]), BatchSplit("a", batch_sizes=[3])), "batch-mismatch"),
        (BatchSplit(BatchSplit("a", "b", batch_sizes=[1, 1]), "c", batch_sizes=[3, 1]), "batch-mismatch"),
    ],
    ids=repr,
)
def test_blocks_that_have_no_meaning_together(setup: Setup, code: str) -> None:
    refused(CompositionError, code, check, setup)


@pytest.mark.parametrize(
    "setup",
    [
        Stack("a", Parallel("b", Stack("c", "d"))),
        Stack(Parallel("a", "b"), Parallel("c", "d"), "e"),
        Parallel(Parallel("a", "b"), BatchSplit("a", "b", batch_sizes=[1, 1])),
        Split("a", Split("b", "c", splits=[1, 1]), splits=[1, 2]),
        BatchSplit("a", BatchSplit("b", "c", batch_sizes=[1, 2]), batch_sizes=[1, 3]),
        Average("a", Stack("b", Split("c", "d", splits=[1, 1])), BatchSplit("a", "b", batch_sizes=[1, 1])),
        Route("a", Stack("b", MultiTask("c", "d")), Average("a", "b")),
        MultiTask("a", Route("b", "c")),
        BatchSplit(Fuse("a", "b"), Route("c", "d"), batch_sizes=[1, 1]),
        Parallel(Fuse(Stack("a", "b"), "c"), Stack("a", Fuse("b", Stack("c", "d")))),
    ],
    ids=repr,
)
def test_nesting_that_has_a_meaning(setup: Setup) -> None:
    check(setup)
