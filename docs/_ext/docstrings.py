"""Docstrings in our style: a section may stand on one line, as in `Raises: PlanError: it is gone.`"""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx

SECTION = re.compile(r"^(Args|Raises|Returns|Shapes|Source|Init): (\S.*)$")


def spread(lines: list[str]) -> list[str]:
    """One-line sections, with their indented continuation, as paragraphs that begin with a bold word."""
    result: list[str] = []
    inside = False
    for line in lines:
        found = SECTION.match(line)
        if found:
            result += ["", f"**{found[1]}:** {found[2]}"]
        elif inside and line.startswith(" "):
            result.append(line.strip())
        else:
            result.append(line)
        inside = bool(found) or (inside and line.startswith(" "))
    return [re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``", line) for line in result]


def process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = spread(lines)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", process, priority=400)  # before napoleon
    return {"version": "1", "parallel_read_safe": True}
