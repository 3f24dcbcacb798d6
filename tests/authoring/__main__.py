"""A table of all shipped interfaces: claims, methods and seconds on this version of transformers.

python -m tests.authoring [ROW ...]
"""

from __future__ import annotations

import sys
import time
import warnings

import transformers

from adapterkit.author.check import observe_claims
from adapterkit.author.prove import COLUMNS, prove_methods
from tests.authoring.scenes import interface, scenes, unseen_elsewhere
from tests.models import tiny


def main(rows: list[str]) -> int:
    warnings.simplefilter("ignore")
    print(f"transformers {transformers.__version__}")
    print(f"{'interface':<16} {'models':>6} {'hold':>5} {'refuted':>7} {'unseen':>6} {'proved':>7} {'s':>6}")
    bad = 0
    for row in rows or list(tiny.ROWS):
        start = time.perf_counter()
        seen = list(scenes(row))
        found = observe_claims(interface(row), seen)
        verdicts = prove_methods(interface(row), seen[0])
        unseen = [claim for claim in found.unseen if claim.address not in unseen_elsewhere(row)]
        held = sum(claim.verdict == "holds" for claim in found.claims)
        proved = sum(verdict.state == "proved" for verdict in verdicts)
        cells = f"{len(seen):>6} {held:>5} {len(found.problems):>7} {len(unseen):>6}"
        print(f"{row:<16} {cells} {proved:>3}/{len(COLUMNS)} {time.perf_counter() - start:>6.1f}", flush=True)
        for fact in (
            *found.problems,
            *(c.text for c in unseen),
            *(v for v in verdicts if v.state != "proved"),
        ):
            print("   ", fact)
        bad += bool(found.problems or unseen or proved < len(COLUMNS))
    print(f"{bad} of {len(rows or tiny.ROWS)} are not whole")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
