"""For the tests of those who write interfaces: `prove(spec, factory)` in a pytest of their own.

from adapterkit.testing import prove

def test_interface():
    prove("my.yaml", lambda: (MyModel(tiny), {"ids": ids, "mask": mask}))
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from adapterkit.author.check import Report, check
from adapterkit.spec.schema import Interface


def prove(
    spec: str | Path | dict[str, Any] | Interface,
    factory: Any = None,
    *,
    methods: Iterable[str] | None = None,
    may_refuse: Iterable[str] = (),
    may_be_unseen: Iterable[str] = (),
) -> Report:
    """All claims of an interface and all laws of every method; an AssertionError says what does not hold.

    Args:
        spec: the interface: path, name, dict or Interface.
        factory: gives (model, inputs), for a model small enough to run often; or as `model` of `ak.check`.
        methods: columns to prove; default: all.
        may_refuse: columns that the model cannot have; each must then be refused.
        may_be_unseen: addresses of claims that this model cannot show.
    Raises: AssertionError: with every claim that is refuted, every law that is broken, every column that is
        refused and every claim that no model could show.
    """
    report = check(spec, factory, methods=methods)
    allowed, quiet = set(may_refuse), set(may_be_unseen)
    faults = [str(problem) for problem in report.problems]
    for verdict in report.methods:
        if verdict.state == "refused" and verdict.method not in allowed:
            faults.append(f"{verdict}\n  expected in may_refuse, if the model cannot have it")
        elif verdict.state == "proved" and verdict.method in allowed:
            faults.append(f"{verdict.method} stands in may_refuse, but it is proved")
    unseen = [claim for claim in report.unseen if claim.address not in quiet]
    faults += [f"{claim.address}: {claim.text}\n  no model that was run shows it" for claim in unseen]
    if faults:
        raise AssertionError("\n".join([report.summary(), *faults]))
    return report
