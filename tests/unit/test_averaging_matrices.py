"""Strategies on changes of one weight: against loops over entries, and against peft's functions."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adapterkit.averaging import matrices
from tests.oracles import averaging as oracle

Deltas = list[Tensor]


def draw(count: int, seed: int = 0, rows: int = 5, columns: int = 7) -> Deltas:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, columns, generator=generator, dtype=torch.float64) for _ in range(count)]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


WEIGHTS = st.lists(st.floats(-2, 2).filter(lambda w: abs(w) > 1e-3), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(WEIGHTS, st.floats(0.05, 1), st.integers(0, 9))
def test_strategies_are_those_of_the_papers(weights: list[float], density: float, seed: int) -> None:
    deltas = draw(len(weights), seed)
    total = sum(map(abs, weights))
    close(matrices.combined(deltas, weights, "linear"), oracle.weighted_sum(deltas, weights))
    found = matrices.combined(deltas, weights, "magnitude", density)
    close(found, oracle.magnitude(deltas, weights, density))
    found = matrices.combined(deltas, weights, "ties", density)
    close(found, oracle.ties(deltas, weights, density, total))


@pytest.mark.parametrize("density", [0.3, 0.75])
def test_dare_keeps_a_part_at_random_and_scales_it(density: float) -> None:
    (delta,) = draw(1, rows=200, columns=150)
    first, again, other = (
        matrices.dropped(delta, density, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    mask = (first != 0).double()
    assert mask.mean().item() == pytest.approx(density, abs=0.02)
    close(first, oracle.dare([delta], [1.0], density, [mask]))


def test_dare_draws_for_every_adapter_anew() -> None:
    same = draw(1, rows=40, columns=40) * 2
    found = matrices.combined(same, [1.0, 1.0], "dare", 0.5, None, torch.Generator().manual_seed(3))
    kept = found / same[0] * 0.5
    assert {round(value) for value in kept.flatten().tolist()} == {0, 1, 2}


@pytest.mark.parametrize("strategy", ["linear", "ties", "dare", "magnitude"])
def test_one_change_of_weight_one_stays(strategy: str) -> None:
    (delta,) = draw(1)
    assert torch.equal(matrices.combined([delta], [1.0], strategy), delta)


def test_a_vote_of_equals_elects_no_sign() -> None:
    delta = torch.tensor([[1.0, -2.0, 3.0]], dtype=torch.float64)
    assert not matrices.combined([delta, -delta], [0.5, 0.5], "ties").any()


def test_an_absent_adapter_has_a_weight_in_ties() -> None:
    """Where one of two adapters does not change a weight at all, the other's change is not doubled away."""
    deltas = draw(2)
    both = matrices.combined([deltas[0], torch.zeros_like(deltas[0])], [0.4, 0.6], "ties")
    close(matrices.combined(deltas[:1], [0.4], "ties", total=1.0), both)


# ---------------------------------------------------------------------------------------------------- peft


@pytest.fixture(scope="module")
def peft() -> Any:
    pytest.importorskip("peft")
    return importlib.import_module("peft.utils.merge_utils")


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, 0.25, 0.25], [1.5, -0.5, 1.0]])
@pytest.mark.parametrize("density", [0.2, 0.6])
def test_peft_computes_the_same_sums(peft: Any, weights: list[float], density: float) -> None:
    deltas, told = draw(len(weights)), torch.tensor(weights, dtype=torch.float64)
    close(matrices.combined(deltas, weights, "linear"), peft.task_arithmetic(deltas, told))
    found = matrices.combined(deltas, weights, "magnitude", density)
    close(found, peft.magnitude_prune(deltas, told, density))


@pytest.mark.parametrize("density", [0.2, 0.6])
def test_peft_computes_the_same_ties_for_equal_weights(peft: Any, density: float) -> None:
    """With other weights it elects without them, and divides their sum by the number that agree."""
    deltas = draw(3)
    found = matrices.combined(deltas, [1 / 3] * 3, "ties", density)
    expected = peft.ties(deltas, torch.ones(3, dtype=torch.float64), density)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)  # it divides by a float32


# ------------------------------------------------------------------------------------------------- factors


@pytest.mark.parametrize("rank", [1, 3, 5, 9])
def test_factors_are_the_best_of_their_rank(rank: int) -> None:
    (matrix,) = draw(1)
    b, a = matrices.factored(matrix, rank)
    assert b.shape == (5, rank) and a.shape == (rank, 7)
    torch.testing.assert_close(b @ a, oracle.truncated(matrix, rank), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rank", [1, 2, 6, None])
def test_a_product_is_factored_without_forming_it(rank: int | None) -> None:
    left, right = draw(1, 1, 9, 6)[0], draw(1, 2, 6, 8)[0]
    b, a = matrices.reduced(left, right, rank)
    assert b.shape[1] == a.shape[0] == (rank or 6)
    torch.testing.assert_close(b @ a, oracle.truncated(left @ right, rank or 6), rtol=1e-9, atol=1e-9)


def test_without_a_rank_it_is_as_small_as_is_exact() -> None:
    left, right = draw(1, 1, 9, 2)[0], draw(1, 2, 2, 8)[0]
    for b, a in (
        matrices.factored(left @ right, None),
        matrices.reduced(left.repeat(1, 2), right.repeat(2, 1) / 2, None),
    ):
        assert b.shape[1] == 2
        close(b @ a, left @ right)
    nothing, _ = matrices.factored(torch.zeros(4, 3), None)
    assert nothing.shape == (4, 1) and not nothing.any()
