"""How far the tools reach: every model type of transformers, built tiny, observed, drafted, proved.

    python -m benchmarks.reach --out r.jsonl           # all types; about 30 minutes of one idle core
    python -m benchmarks.reach --types bert gpt2       # some
    python -m benchmarks.reach --only lora             # one column in place of nine; --only: drafts alone
    python -m benchmarks.reach --out r.jsonl --again   # only those that have failed
    python -m benchmarks.reach --shard 1/4 --out r1.jsonl
    python -m benchmarks.reach --report r*.jsonl       # the numbers of these files

A run can be stopped and begun again: what is in the file of `--out` is not run a second time. Each type runs
in a process that is ended after `--limit` seconds of processor time. No network.

Prints four numbers, the last three as shares of the types that ran with attention:

- built tiny: a tiny instance was built from the default config, and inputs were found that it runs on;
- ran with attention: attention was seen in that forward pass;
- drafted completely: the draft has no gap. Every layer that ran has its attention and its MLP, each with the
  module that gives it its output, and everything that the draft names resolves. Towers that the inputs do not
  reach are left out, with a remark in the draft; most are model types of their own here;
- passing LoRA, all columns: the drafted interface passes every law of the column in `author.prove`: attach,
  first output bit for bit that of the base where the method says so, moved after a random step, disabled bit
  for bit the base, every tensor alive and none of the base trained, for Parallel each child as alone, the
  same when saved and loaded, for LoRA the same when merged, detached without a trace.

A column that a draft refuses is no pass, unless the reason is a fact of the model that was observed: the
draft itself says `unsupported` with that reason (`author.lacks`: a stream without an axis of examples has
neither positions nor prompts, a stack that is given what was made for every position before has no place for
a prompt, a stream that comes out of no module has no place for an invertible adapter), or, for Parallel, none
of its matrices is called with an axis of examples (`batch: none`). The share without any such fact is printed
too.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def types() -> list[str]:
    """Every model type that AutoModel knows."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    return sorted(MODEL_MAPPING_NAMES)


NINE = (
    "lora",
    "bottleneck",
    "compacter",
    "prefix_tuning",
    "prompt_tuning",
    "reft",
    "invertible",
    "fusion",
    "parallel",
)
"""The columns of the usual table of methods."""
FACT = "fact: "
"""How the reason of a column begins that a model cannot have."""


# ------------------------------------------------------------------------------------------- one model type


def reach(model_type: str, methods: Sequence[str] = NINE) -> Record:
    """How far one model type gets.

    Args: methods: columns that are proved; none: the draft alone.
    """
    from adapterkit.author import draft, tiny
    from adapterkit.author.observe import observe
    from adapterkit.errors import AdapterkitError

    record: Record = {"type": model_type, "built": False, "ran": False, "attention": 0, "complete": False}
    try:
        model, inputs = tiny.build(model_type)
    except AdapterkitError as error:
        message = error.problems[0].message
        return record | {"built": "no inputs were found" in message, "why": message}
    record |= {"built": True, "ran": True, "inputs": sorted(inputs)}
    record["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    record["attention"] = len(observe(model, inputs).attentions)
    if not record["attention"]:
        return record
    try:
        found = draft.of_model(model, inputs, like=False)
    except AdapterkitError as error:
        return record | {"why": str(error)}
    record["complete"] = found.is_complete
    record["gaps"] = [f"{'.'.join(loc)}: {text}" for loc, text in found.notes.gaps]
    record["stacks"] = list(found.data["stacks"])
    if methods and found.is_complete:
        record["columns"] = columns(found, methods)
    return record


def columns(found: Any, methods: Sequence[str]) -> dict[str, str]:
    """Columns of methods: '' if all laws hold, else why not."""
    from adapterkit.author.prove import prove_method
    from adapterkit.author.scene import Scene
    from adapterkit.model.resolve import resolve

    scene = Scene(type(found.model).__name__, found.model, found.inputs)
    blueprint = resolve(found.model, found.interface)
    usual = [slot for slot in blueprint if blueprint.stacks[slot.stack].by_default]
    told: dict[str, str] = {}
    for name in methods:
        one = prove_method(name, found.interface, scene, blueprint)
        no_rows = name == "parallel" and all(slot.batch == "none" for slot in usual)
        is_fact = one.state == "refused" and (one.code == "unsupported" or no_rows)
        told[name] = "" if one.state == "proved" else f"{FACT if is_fact else ''}{one.state}: {one.reason}"
    return told


def _failing(record: Record) -> dict[str, str]:
    """Columns that are neither proved nor impossible."""
    return {name: why for name, why in record["columns"].items() if why and not why.startswith(FACT)}


# ------------------------------------------------------------------------------------------------ processes


MEMORY = 8 * 2**30
"""Bytes that a process may ask for: every tensor of a forward pass is held while it is recorded."""
HANGING = 20
"""Times the limit that a process may take by the clock: others may hold the processor."""


class _Late(BaseException):
    """The processor time of a type is used up; no verdict on the type, so that nothing may catch it."""


def _end(signum: int, frame: Any) -> None:
    raise _Late


def _serve(link: Connection, methods: Sequence[str], limit: float) -> None:
    """One process: model types in, records out."""
    signal.signal(signal.SIGPROF, _end)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    sys.stdout = sys.stderr = Path(os.devnull).open("w", encoding="utf-8")
    warnings.simplefilter("ignore")
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    link.send(None)
    while True:
        model_type = link.recv()
        start = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, limit)
        try:
            record = reach(model_type, methods)
        except _Late:
            record = {"type": model_type, "why": f"not done after {limit:g} seconds", "crashed": True}
        except Exception as error:  # a model may raise anything; that is a result
            record = {
                "type": model_type,
                "why": f"{type(error).__name__}: {str(error)[:300]}",
                "crashed": True,
            }
        signal.setitimer(signal.ITIMER_PROF, 0)
        record["seconds"] = round(time.process_time() - start, 2)
        link.send(record)


class _Worker:
    """A process that is replaced when it hangs or dies."""

    def __init__(self, methods: Sequence[str], limit: float) -> None:
        self.methods, self.limit = methods, limit
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.link, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, self.methods, self.limit), daemon=True)
        self.process.start()
        other.close()
        self.type: str | None = None
        self.since = time.monotonic()
        self.ready = False

    def give(self, model_type: str) -> None:
        self.type, self.since = model_type, time.monotonic()
        self.link.send(model_type)

    def take(self) -> Record | None:
        """What it found; None if it has only just started."""
        try:
            record = self.link.recv()
        except EOFError:
            return self.replace("the process died")
        self.ready = True
        if record is None:
            return None
        self.type = None
        return dict(record)

    @property
    def is_late(self) -> bool:
        """Whether it hangs: the process itself ends what takes too much processor time."""
        return self.type is not None and time.monotonic() - self.since > HANGING * self.limit

    def replace(self, why: str) -> Record:
        record = {"type": self.type, "why": why, "crashed": True, "seconds": time.monotonic() - self.since}
        self.process.kill()
        self.process.join()
        self.start()
        return record


def run(wanted: Iterable[str], jobs: int, limit: float, methods: Sequence[str]) -> Iterator[Record]:
    """Records as they come."""
    left = list(wanted)[::-1]
    workers = [_Worker(methods, limit) for _ in range(min(jobs, len(left)))]
    while left or any(worker.type for worker in workers):
        for worker in workers:
            if worker.ready and worker.type is None and left:
                worker.give(left.pop())
        links = [worker.link for worker in workers]
        for link in wait(links, timeout=1.0):
            worker = next(one for one in workers if one.link is link)
            record = worker.take()
            if record is not None and record["type"] is not None:
                yield record
        for worker in workers:
            if worker.is_late:
                yield worker.replace("the process hung")
    for worker in workers:
        worker.process.kill()


# --------------------------------------------------------------------------------------------------- report


def report(records: list[Record]) -> str:
    """The four numbers, and what stopped the others, most frequent first."""
    attention = [r for r in records if r.get("attention")]
    complete = [r for r in attention if r.get("complete")]
    proved = [r for r in complete if r.get("columns")]
    lora = [r for r in proved if r["columns"].get("lora") == ""]
    every = [r for r in proved if set(r["columns"]) >= set(NINE)]
    passing = [r for r in every if not _failing(r)]
    strict = [r for r in passing if not any(r["columns"].values())]
    rows = [
        ("model types", len(records), 0),
        ("built tiny", sum(bool(r.get("built")) for r in records), len(records)),
        ("ran", sum(bool(r.get("ran")) for r in records), len(records)),
        ("ran with attention", len(attention), len(records)),
        ("drafted completely", len(complete), len(attention)),
        ("  ... passing the laws of LoRA", len(lora), len(attention)),
        ("  ... of all columns", len(passing), len(attention)),
        ("      without any fact of the model", len(strict), len(attention)),
    ]
    lines = [
        f"{name:34}{count:5}" + (f"  {count / of:6.1%} of {of}" if of else "") for name, count, of in rows
    ]
    reasons = Counter(
        _class(g) for r in attention if not r.get("complete") for g in r.get("gaps") or [r.get("why", "")]
    )
    lines += ["", "what drafts lack", *(f"{count:5}  {text}" for text, count in reasons.most_common(25))]
    broken = Counter(f"{m}: {_class(w)}" for r in proved for m, w in _failing(r).items())
    lines += ["", "what breaks a column", *(f"{count:5}  {text}" for text, count in broken.most_common(40))]
    lines += [
        "",
        "types that ran with attention and fail",
        *(f"{r['type']}: {w}" for r, w in _reasons(attention)),
    ]
    other = [r for r in records if not r.get("attention")]
    lines += [
        "",
        "types without attention",
        *(f"{r['type']}: {_short(r.get('why', 'none seen'))}" for r in other),
    ]
    return "\n".join(lines)


def _reasons(attention: Iterable[Record]) -> Iterator[tuple[Record, str]]:
    """Types that are not drafted completely or fail a column, with one reason each."""
    for record in attention:
        if not record.get("complete"):
            yield record, f"no complete draft: {_short((record.get('gaps') or [record.get('why', '')])[0])}"
        elif _failing(record):
            by_reason: dict[str, list[str]] = {}
            for name, why in _failing(record).items():
                by_reason.setdefault(_short(why), []).append(name)
            yield record, "; ".join(f"{', '.join(names)}: {why}" for why, names in by_reason.items())


def _short(text: str) -> str:
    return " ".join(text.split())[:160]


def _class(text: str) -> str:
    """A reason without the names of modules and numbers."""
    import re

    return re.sub(r"\b[\w.]*\.[\w.]+\b|\d+", "*", text)[:150]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--types", nargs="*", help="model types; default: all")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds of processor time for one type")
    parser.add_argument("--shard", default="1/1", help="this part of the types, such as 2/4")
    parser.add_argument("--out", type=Path, help="records, one JSON object a line; those there are kept")
    parser.add_argument("--again", action="store_true", help="run those that failed again")
    parser.add_argument(
        "--only", nargs="*", choices=NINE, help="columns to prove; none: stop after the drafts"
    )
    parser.add_argument("--report", nargs="+", type=Path, help="print the numbers of these files only")
    given = parser.parse_args()
    if given.report:
        print(report(list(_read(given.report).values())))
        return
    part, parts = map(int, given.shard.split("/"))
    wanted = (given.types or types())[part - 1 :: parts]
    known = _read([given.out] if given.out else [])
    if given.again:
        known = {name: r for name, r in known.items() if r.get("columns") and not _failing(r)}
    methods = NINE if given.only is None else tuple(given.only)
    missing = [name for name in wanted if name not in known]
    for record in run(missing, given.jobs, given.limit, methods):
        known[record["type"]] = record
        if given.out:
            with given.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
    print(report([known[name] for name in wanted if name in known]))


def _read(paths: list[Path]) -> dict[str, Record]:
    """Records by type, the latest of each."""
    lines = (
        line for path in paths if path.exists() for line in path.read_text(encoding="utf-8").splitlines()
    )
    return {record["type"]: record for record in map(json.loads, lines)}


if __name__ == "__main__":
    main()
