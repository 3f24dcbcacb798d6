"""Wrong interfaces are refuted: a slice of `python -m tests.authoring.mutation` in the default run."""

from __future__ import annotations

import pytest

from tests.authoring.mutants import Mutant
from tests.authoring.mutation import judged, run
from tests.authoring.scenes import interface, scenes
from tests.models import tiny

SLICE = {"clip": 12, "custom": 40, "phi": 30}
"""Row -> about how many of its mutants."""


@pytest.mark.parametrize("row", SLICE)
def test_mutants_are_refuted(row: str) -> None:
    outcome = run(row, limit=SLICE[row])
    assert outcome.survivors == []
    assert outcome.wrong >= SLICE[row] // 2
    assert outcome.refuted["observed"] > 0


@pytest.mark.full
@pytest.mark.parametrize("row", tiny.ROWS)
def test_every_mutant_is_refuted(row: str) -> None:
    outcome = run(row)
    assert [str(mutant) for mutant, _ in outcome.survivors] == []
    assert outcome.wrong > (10 if row == "encoder_decoder" else 100)


def test_what_is_not_wrong_is_not_refuted() -> None:
    """The judge does not refute by itself."""
    from adapterkit.spec import registry

    for row in ("custom", "vit"):
        whole = Mutant("none", (), "as it is", registry.dump(interface(row)))
        assert judged(whole, list(scenes(row)), interface(row)) is None
