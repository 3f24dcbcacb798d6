"""One interface after another in a process of its own: what holds, what is refuted, which methods are proved.

A subject is a row of the table, in all its scenes, or a model type, as `adapterkit check --forward` sees it.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from adapterkit.author.cast import of_type
from adapterkit.author.check import Report, observe_claims
from adapterkit.author.prove import prove_methods
from adapterkit.author.scene import Scene
from adapterkit.errors import ConfigError
from adapterkit.spec import registry
from adapterkit.spec.schema import Interface
from tests.authoring.scenes import interface, scenes, unseen_elsewhere
from tests.models import tiny

Record = dict[str, Any]
ROW, TYPE = "row", "type"


def types() -> list[str]:
    """Every model type of the shipped interfaces that this version of transformers has."""
    shipped = registry.model_types().items()
    return [kind for kind, name in shipped if registry.is_shipped(name) and kind in CONFIG_MAPPING]


def subjects(names: Iterable[str], *, every_type: bool = False) -> list[tuple[str, str]]:
    """(row or type, name). A name that is both means the row."""
    found = [(ROW if name in tiny.ROWS else TYPE, name) for name in names]
    if every_type:
        return [*found, *((TYPE, name) for name in types())]
    return found or [(ROW, name) for name in tiny.ROWS]


def look(subject: tuple[str, str], *, methods: bool) -> Record:
    """The verdicts on one subject."""
    kind, name = subject
    if kind == ROW:
        said, elsewhere = interface(name), unseen_elsewhere(name)
    else:
        said, elsewhere = registry.by_name(registry.model_types()[name]), set()
    try:
        seen = list(scenes(name)) if kind == ROW else list(of_type(said, name))
    except ConfigError as error:
        return {"state": "no model", "facts": [error.problems[0].message]}
    found = observe_claims(said, seen)
    unseen = [claim.text for claim in found.unseen if claim.address not in elsewhere]
    record: Record = {
        "state": "refuted" if found.problems else "holds",
        "models": len(seen),
        "held": sum(claim.verdict == "holds" for claim in found.claims),
        "facts": [_short(problem) for problem in found.problems],
        "unseen": unseen,
    }
    if methods and not found.problems:
        record |= _proved(said, seen, found)
    return record


def _proved(said: Interface, seen: list[Scene], found: Report) -> Record:
    verdicts = prove_methods(said, seen[0])
    broken = any(verdict.state == "broken" for verdict in verdicts)
    return {
        "state": "broken" if broken else "holds",
        "methods": {verdict.method: verdict.state for verdict in verdicts},
        "facts": [str(verdict) for verdict in verdicts if verdict.state != "proved"],
    }


def _short(problem: object) -> str:
    return " | ".join(line.strip() for line in str(problem).splitlines())


def run(chosen: list[tuple[str, str]], *, methods: bool, jobs: int, timeout: float) -> Iterator[Record]:
    """Records as they come."""
    tiny.build("bert")  # so that what models import at first use is imported once, not in every process
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(_apart, one, methods, timeout) for one in chosen]
        for future in as_completed(futures):
            yield future.result()


def _apart(subject: tuple[str, str], methods: bool, timeout: float) -> Record:
    """A subject in a process of its own, ended when it takes too long."""
    start = time.perf_counter()
    context = multiprocessing.get_context("fork")  # which has imported everything already
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=partial(_child, there), args=(subject, methods), daemon=True)
    process.start()
    there.close()
    record: Record = {"state": "too long"}
    with contextlib.suppress(EOFError):  # it died
        if here.poll(timeout):
            record = {"state": "died"} | here.recv()
    process.kill()
    process.join()
    seconds = round(time.perf_counter() - start, 1)
    return {
        "transformers": transformers.__version__,
        "subject": subject[0],
        "name": subject[1],
        "tried": methods,
        **record,
        "seconds": seconds,
    }


def _child(there: Connection, subject: tuple[str, str], methods: bool) -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    try:
        there.send(look(subject, methods=methods))
    except Exception as error:  # a defect of the judge, or of what it judges
        there.send({"state": "error", "facts": [f"{type(error).__name__}: {str(error)[:300]}"]})


def read(path: Path) -> list[Record]:
    """Records of earlier runs."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []


def missing(
    chosen: list[tuple[str, str]], known: Iterable[Record], *, methods: bool
) -> list[tuple[str, str]]:
    """Subjects whose last record on this version is not good, or which have none."""
    last = {
        (r["subject"], r["name"]): r
        for r in known
        if r["transformers"] == transformers.__version__ and (r["tried"] or not methods)
    }
    good = {key for key, record in last.items() if record["state"] == "holds"}
    return [one for one in chosen if one not in good]
