"""`adapterkit check --forward`: run tiny models, look for every claim, try every method."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace

from adapterkit.author.check import Report, check
from adapterkit.cli import models, report
from adapterkit.cli.check import Checked
from adapterkit.cli.report import Form
from adapterkit.errors import AdapterkitError, Problem


def run(found: Sequence[Checked], model: str | None) -> list[tuple[Checked, Report | None]]:
    """A report for each file that can be read; what hinders one is a problem of that file."""
    models.see_here()
    done: list[tuple[Checked, Report | None]] = []
    for one in found:
        if one.interface is None:
            done.append((one, None))
            continue
        try:
            with _quiet():
                seen = check(one.interface, model)
        except AdapterkitError as error:
            done.append((replace(one, problems=tuple(_placed(p, one.file) for p in error.problems)), None))
            continue
        problems = tuple(_placed(problem, one.file) for problem in seen.problems)
        seen = replace(seen, interface=one.file, problems=problems)
        done.append((replace(one, problems=problems, verified_on=seen.scenes), seen))
    return done


def _placed(problem: Problem, file: str) -> Problem:
    return problem if problem.file else replace(problem, file=file)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Tiny models have odd configs, of which transformers says so."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def show(done: Sequence[tuple[Checked, Report | None]], form: Form) -> None:
    """One line for each claim and each method; of several files the problems and a line for each."""
    if form == "json":
        files = [{**(seen.to_dict() if seen else {"ok": False}), **_file(one)} for one, seen in done]
        report.as_json({"ok": not any(one.problems for one, _ in done), "files": files})
        return
    if form == "text" and len(done) == 1 and done[0][1] is not None:
        sys.stdout.write(_lines(done[0][1]))
    problems = sorted({p for one, _ in done for p in one.problems}, key=Problem.sort_key)
    if form == "github":
        sys.stdout.writelines(f"{report.annotation(problem)}\n" for problem in problems)
    else:
        report.problems(problems)
    for one, seen in done:
        sys.stdout.write(f"{seen.summary() if seen else f'{one.file}: not checked'}\n")


def _file(one: Checked) -> dict[str, object]:
    return {"file": one.file, "problems": [problem.to_dict() for problem in one.problems]}


def _lines(seen: Report) -> str:
    lines = [f"models: {', '.join(seen.scenes)}"]
    lines += [f"{claim.line:>4}  {claim.verdict:<7}  {claim.text}" for claim in seen.claims]
    lines += [f"      {verdict}" for verdict in seen.methods]
    return "\n".join(lines) + "\n"
