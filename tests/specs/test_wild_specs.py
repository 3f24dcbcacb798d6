"""Shipped specs with words exchanged, on models that they were not written for: errors, never a crash."""

from __future__ import annotations

import re
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from adapterkit.errors import ResolveError, SpecError
from adapterkit.model.resolve import resolve
from adapterkit.spec import registry
from tests.models import tiny

TEXTS = {path.stem: path.read_text() for path in registry.shipped_directory().glob("*.yaml")}
WORDS = sorted({word for text in TEXTS.values() for word in re.findall(r"[A-Za-z_.0-9]+", text)})


@cache
def model(row: str) -> nn.Module:
    return tiny.build(row)


def tried(text: str, row: str) -> str:
    """How it ends: 'fits', or the code of the first problem."""
    try:
        resolve(model(row), registry.load_text(text, "f"))
    except (SpecError, ResolveError) as error:
        assert all(problem.code and problem.message for problem in error.problems)
        return error.code
    return "fits"


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(sorted(TEXTS)), st.sampled_from(["bert", "gpt2", "t5", "custom"]), st.data())
def test_exchanged_words_give_our_errors_only(name: str, row: str, data: st.DataObject) -> None:
    parts = re.split(r"([A-Za-z_.0-9]+)", TEXTS[name])
    for _ in range(data.draw(st.integers(0, 3))):
        at = 2 * data.draw(st.integers(0, len(parts) // 2 - 1)) + 1
        parts[at] = data.draw(st.sampled_from(WORDS))
    tried("".join(parts), row)


@pytest.mark.parametrize("row", ["bert", "gpt2", "t5"])
def test_the_unchanged_spec_fits_and_that_of_another_does_not(row: str) -> None:
    others = {"bert": "gpt2", "gpt2": "bert", "t5": "gpt2"}
    assert tried(TEXTS[row], row) == "fits"
    assert tried(TEXTS[others[row]], row) == "path-not-found"
