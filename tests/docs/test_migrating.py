"""Right columns of the guides for those who come from other libraries: every call exists as written."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import adapterkit as ak

DOCS = Path(__file__).parents[2] / "docs"
GUIDES = ("from-adapters.md", "from-peft.md")


def calls(page: str) -> Iterator[tuple[str, str]]:
    """Every expression in the right column with the cell to its left."""
    for line in (DOCS / page).read_text(encoding="utf-8").splitlines():
        cells = re.split(r"(?<!\\)\|", line)[1:-1]
        if len(cells) == 2:
            left, right = cells
            for code in re.findall(r"`([^`]+)`", right):
                if code.startswith(("ak.", "kit.", "print(", "kit =")):
                    yield left, code.replace("\\|", "|")


def check(code: str) -> None:
    """Raise where a name does not exist or a call does not fit its signature."""
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
            continue
        owner = {"ak": ak, "kit": ak.Kit}.get(node.value.id)
        if owner is not None:
            getattr(owner, node.attr)
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner = {"ak": ak, "kit": ak.Kit}.get(getattr(node.func.value, "id", ""))
        if owner is None:
            continue
        bound = ([None] if owner is ak.Kit else []) + [None] * len(node.args)
        inspect.signature(getattr(owner, node.func.attr)).bind(
            *bound, **{keyword.arg: None for keyword in node.keywords if keyword.arg}
        )


@pytest.mark.parametrize("page", GUIDES)
def test_every_call_exists(page: str) -> None:
    found = list(calls(page))
    assert len(found) > 20
    for left, code in found:
        try:
            check(code)
        except (AttributeError, TypeError) as error:
            raise AssertionError(f"{page}, row {left.strip()}: {code}: {error}") from error


def test_calls_that_do_not_exist_are_found() -> None:
    for code in ("kit.attach_all()", "kit.merge(nme='a')", "ak.Stak('a', 'b')"):
        with pytest.raises((AttributeError, TypeError)):
            check(code)
