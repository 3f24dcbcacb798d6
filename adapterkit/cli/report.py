"""What the command line prints: problems and results as text, JSON or annotations of GitHub."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, cast

from adapterkit.cli.check import Checked
from adapterkit.errors import ConfigError, Problem, did_you_mean, listing

Form = Literal["text", "json", "github"]
FORMS = ("text", "json", "github")


def form(word: str) -> Form:
    """The form of a report by its name. Raises: ConfigError: there is none of this name."""
    if word not in FORMS:
        message, expected = f"there is no format {word!r}", f"one of {listing(FORMS)}"
        raise ConfigError(Problem("bad-option", message, "--format", expected, did_you_mean(word, FORMS)))
    return cast(Form, word)


def as_json(data: Any) -> None:
    sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def problems(found: Iterable[Problem], *, to_stderr: bool = False) -> None:
    """The text of each problem; the code is coloured on a terminal, unless NO_COLOR is set."""
    stream = sys.stderr if to_stderr else sys.stdout
    if not stream.isatty():
        stream.writelines(f"{problem}\n" for problem in found)
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(file=stream, highlight=False, soft_wrap=True)
    for problem in found:
        text = Text(str(problem))
        text.highlight_words([f"error[{problem.code}]"], "bold red")
        console.print(text)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table in aligned columns; on a terminal with a rule under its head."""
    if sys.stdout.isatty():
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        drawn = Table(*columns, box=SIMPLE_HEAD, pad_edge=False)
        for row in rows:
            drawn.add_row(*(Text(cell) for cell in row))
        Console(highlight=False).print(drawn)
        return
    wide = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
    for row in (columns, *rows):
        sys.stdout.write("  ".join(cell.ljust(wide[i]) for i, cell in enumerate(row)).rstrip() + "\n")


def checked(found: Sequence[Checked], form: Form) -> None:
    """The result of `adapterkit check`."""
    wrong = sorted({problem for one in found for problem in one.problems}, key=Problem.sort_key)
    if form == "json":
        as_json({"ok": not wrong, "files": [_file(one) for one in found]})
        return
    if form == "github":
        sys.stdout.writelines(f"{annotation(problem)}\n" for problem in wrong)
    else:
        problems(wrong)
    sys.stdout.write(f"{_summary(found, len(wrong))}\n")


def _file(one: Checked) -> Mapping[str, Any]:
    return {
        "file": one.file,
        "ok": not one.problems,
        "verified_on": list(one.verified_on),
        "problems": [problem.to_dict() for problem in one.problems],
    }


def _summary(found: Sequence[Checked], wrong: int) -> str:
    bad = sum(bool(one.problems) for one in found)
    if bad:
        return f"{_number(wrong, 'problem')} in {bad} of {_number(len(found), 'file')}"
    what = found[0].file if len(found) == 1 else _number(len(found), "file")
    models = list(dict.fromkeys(model for one in found for model in one.verified_on))
    if not models:
        return f"{what}: structure ok, not verified against a model"
    return f"{what}: structure ok, verified on {listing(models, 4)}"


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def annotation(problem: Problem) -> str:
    """A workflow command that GitHub shows beside the line of the file."""
    place = {
        "file": problem.file,
        "line": problem.line or "",
        "col": problem.column or "",
        "title": problem.code,
    }
    properties = ",".join(f"{key}={_escaped(str(value), ':,')}" for key, value in place.items() if value)
    said = (problem.address, problem.message, problem.expected, problem.hint)
    text = _escaped("\n".join(line for line in said if line))
    return f"::error {properties}::{text}"


def _escaped(text: str, further: str = "") -> str:
    # percent first: it is what the others become
    for letter in "%\r\n" + further:
        text = text.replace(letter, f"%{ord(letter):02X}")
    return text
