"""Verdicts on shipped interfaces, one line each as they come: claims, methods and seconds on this version.

python -m tests.authoring                       the rows of the table, in all their scenes
python -m tests.authoring bert esm              some rows, or model types
python -m tests.authoring --every-type --claims --out sweep.jsonl --only-missing
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import transformers

from adapterkit.author.prove import COLUMNS
from tests.authoring import sweep


def main(given: list[str]) -> int:
    asked = _parser().parse_args(given)
    chosen = sweep.subjects(asked.names, every_type=asked.every_type)
    methods = not asked.claims
    if asked.only_missing and asked.out is not None:
        chosen = sweep.missing(chosen, sweep.read(asked.out), methods=methods)
    print(f"transformers {transformers.__version__}, {len(chosen)} subjects")
    print(f"{'interface':<32} {'verdict':<9} {'models':>6} {'hold':>5} {'unseen':>6} {'proved':>7} {'s':>6}")
    states: Counter[str] = Counter()
    for record in sweep.run(chosen, methods=methods, jobs=asked.jobs, timeout=asked.timeout):
        states[record["state"]] += 1
        if asked.out is not None:
            with asked.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        _show(record)
    print(", ".join(f"{count} {state}" for state, count in states.most_common()))
    return int(bool(states.keys() - {"holds"}))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.authoring", description=__doc__)
    parser.add_argument("names", nargs="*", help="rows or model types; default: all rows")
    parser.add_argument("--every-type", action="store_true", help="all model types of shipped interfaces")
    parser.add_argument("--claims", action="store_true", help="claims alone, without the methods")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=600, help="seconds for each")
    parser.add_argument("--out", type=Path, help="file of records, one JSON object a line, added to")
    parser.add_argument("--only-missing", action="store_true", help="what does not hold yet in --out")
    return parser


def _show(record: sweep.Record) -> None:
    states = record.get("methods", {})
    proved = f"{sum(state == 'proved' for state in states.values())}/{len(COLUMNS)}" if states else "-"
    cells = f"{record.get('models', 0):>6} {record.get('held', 0):>5} {len(record.get('unseen', ())):>6}"
    name, state = record["name"], record["state"]
    print(f"{name:<32} {state:<9} {cells} {proved:>7} {record['seconds']:>6.1f}", flush=True)
    for fact in (*record.get("facts", ()), *(f"unseen: {text}" for text in record.get("unseen", ()))):
        print("   ", fact, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
