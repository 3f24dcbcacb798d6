"""Slices of fused matrices against a reference by explicit row indices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapterkit.model.layouts import Layout, Rows, split
from tests.oracles import fused as oracle


@st.composite
def shapes(draw: st.DrawFn) -> tuple[Layout, int, int, int, tuple[str, ...]]:
    """(layout, query heads H, key/value heads K, head width E, order)."""
    layout: Layout = draw(st.sampled_from(["blocks", "per_head", "per_group"]))
    kv_heads = draw(st.integers(1, 4))
    heads = kv_heads if layout == "per_head" else kv_heads * draw(st.integers(1, 4))
    order = tuple(draw(st.permutations(["q", "k", "v"])))
    return layout, heads, kv_heads, draw(st.integers(1, 5)), order


def weight_of(heads: int, kv_heads: int, width: int) -> torch.Tensor:
    """Every number occurs once, so that equal rows are the same rows."""
    rows = (heads + 2 * kv_heads) * width
    return torch.arange(rows * 3, dtype=torch.float32).reshape(rows, 3)


@given(shapes())
def test_roles_are_the_rows_that_the_reference_names(
    case: tuple[Layout, int, int, int, tuple[str, ...]],
) -> None:
    layout, heads, kv_heads, width, order = case
    weight = weight_of(heads, kv_heads, width)
    rows = split(weight.shape[0], layout, order, heads, kv_heads)
    parts = dict(zip(oracle.ROLES, oracle.split(weight, layout, heads, kv_heads, width, order), strict=True))
    assert list(rows) == list(order)
    for role in order:
        assert torch.equal(rows[role].take(weight), parts[role])
        assert rows[role].total == parts[role].shape[0]
        # the same rows of an output (B, T, rows), seen as (B, T, groups, length)
        seen = rows[role].view(weight.T[None])
        assert torch.equal(seen.flatten(-2)[0].T, parts[role])


@given(shapes())
def test_putting_back_what_was_taken_restores_every_bit(
    case: tuple[Layout, int, int, int, tuple[str, ...]],
) -> None:
    layout, heads, kv_heads, width, order = case
    weight = weight_of(heads, kv_heads, width)
    rows = split(weight.shape[0], layout, order, heads, kv_heads)
    rebuilt = torch.full_like(weight, torch.nan)
    for found in rows.values():
        found.put(rebuilt, found.take(weight))
    # no row was left out and none was written twice with something else
    assert torch.equal(rebuilt, weight)


@given(shapes(), st.sampled_from(oracle.ROLES))
def test_putting_one_role_touches_no_other(
    case: tuple[Layout, int, int, int, tuple[str, ...]], role: str
) -> None:
    layout, heads, kv_heads, width, order = case
    weight = weight_of(heads, kv_heads, width)
    parts = list(oracle.split(weight, layout, heads, kv_heads, width, order))
    at = oracle.ROLES.index(role)
    parts[at] = -parts[at] - 1
    wanted = oracle.join(*parts, layout, heads, kv_heads, width, order)
    split(weight.shape[0], layout, order, heads, kv_heads)[role].put(weight, parts[at])
    assert torch.equal(weight, wanted)


@given(st.integers(1, 9), st.permutations(["gate", "up"]))
def test_gate_and_up_are_halves_in_order(width: int, order: list[str]) -> None:
    found = split(2 * width, "blocks", tuple(order))
    assert found[order[0]] == Rows(1, 2 * width, 0, width)
    assert found[order[1]] == Rows(1, 2 * width, width, width)


def test_a_view_shares_memory_with_the_output() -> None:
    out = torch.zeros(2, 5, 12)
    split(12, "per_head", ("q", "k", "v"), 2, 2)["k"].view(out).fill_(1)
    assert out.sum() == 2 * 5 * 4


def test_equal_blocks_need_no_head_counts() -> None:
    assert split(12, "blocks", ("q", "k", "v"))["v"] == Rows(1, 12, 8, 4)


@pytest.mark.parametrize(
    ("total", "layout", "order", "heads", "kv_heads", "said"),
    [
        (25, "blocks", ("q", "k", "v"), 4, 4, "25 rows do not divide into 12 equal shares"),
        (24, "per_head", ("q", "k", "v"), 4, 2, "as many key/value heads"),
        (24, "per_group", ("q", "k", "v"), 4, 3, "4 query heads do not divide among 3"),
        (26, "per_group", ("q", "k", "v"), 4, 4, "26 rows do not divide among 4 groups"),
        (24, "per_group", ("q", "k", "v"), None, None, "number of heads is not known"),
        (9, "blocks", ("gate", "up"), None, None, "9 rows do not divide into 2"),
    ],
)
def test_rows_that_do_not_divide_are_refused(
    total: int, layout: Layout, order: tuple[str, ...], heads: int | None, kv_heads: int | None, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        split(total, layout, order, heads, kv_heads)
