"""Every skip stands in SKIPS.md with its reason, and nothing else does."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parents[1]
KINDS = {"skip", "skipif", "xfail", "importorskip"}


def skips(source: str) -> Iterator[str]:
    """What may be skipped: the package that is missing, else the function (or module) that says so."""

    def walk(node: ast.AST, owner: str) -> Iterator[str]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            owner = node.name
        if (
            isinstance(node, ast.Attribute)
            and node.attr in KINDS - {"importorskip"}
            and "pytest" in ast.dump(node)
        ):
            yield owner
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "importorskip":
            assert isinstance(node.args[0], ast.Constant)
            yield str(node.args[0].value)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, owner)

    return walk(ast.parse(source), "module")


def test_the_table_is_complete() -> None:
    text = (TESTS / "SKIPS.md").read_text(encoding="utf-8")
    listed = {
        (file, what)
        for file, what in re.findall(r"^\| (tests/\S+) \| (\S+) \| .{20,} \|$", text, re.MULTILINE)
    }
    found = {
        (str(path.relative_to(TESTS.parent)), what)
        for path in TESTS.rglob("*.py")
        for what in skips(path.read_text(encoding="utf-8"))
    }
    assert listed == found


def test_skips_are_found() -> None:
    source = "@pytest.mark.xfail\ndef a():\n    pytest.skip('x')\n\nq = pytest.importorskip('q')\n"
    assert list(skips(source)) == ["a", "a", "q"]
