"""Files of AdapterHub give AdapterHub's numbers, or are refused with a reason; never other numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parity.compare import run
from tests.parity.recordings import Case, cases, refusal, root


@pytest.mark.parametrize("case", list(cases(root())), ids=str)
def test_recorded_numbers(case: Case, tmp_path: Path) -> None:
    result = run(case, tmp_path)
    code = refusal(case)
    assert result.status == ("refused" if code else "agree"), result
    assert result.code == (code or "")
