"""Warnings of other libraries that say nothing about the numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            # transformers 5.5 compiles a function of DeBERTa when it is imported
            item.add_marker(
                pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
            )
