"""Interleaved timing: every round times each contestant once, so that noise hits all of them."""

from __future__ import annotations

import gc
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Times:
    """Seconds of one contestant over all rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return low, high


def interleaved(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int,
    repeat: int = 1,
    before: Mapping[str, Callable[[], object]] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Times]:
    """Time each contestant `rounds` times, in a new order each round.

    Args: repeat: calls for one time. before: what to do before each time, untimed. clock: what is read.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    shuffle = random.Random(0)
    gc.collect()
    gc.freeze()  # what is there already is not looked through before every time
    gc.disable()
    try:
        for _ in range(rounds):
            shuffle.shuffle(order)
            for name in order:
                if before and name in before:
                    before[name]()
                gc.collect()
                start = clock()
                for _ in range(repeat):
                    contestants[name]()
                seconds[name].append((clock() - start) / repeat)
    finally:
        gc.enable()
        gc.unfreeze()
    return {name: Times(tuple(found)) for name, found in seconds.items()}


def paired_ratio(a: Times, b: Times) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of a / b, round by round."""
    ratios = [x / y for x, y in zip(a.seconds, b.seconds, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return low, middle, high


def environment() -> dict[str, object]:
    """What the numbers were measured on."""
    import peft
    import transformers

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "threads": torch.get_num_threads(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "machine": platform.machine(),
        "python": platform.python_version(),
    }


def show(title: str, rows: list[dict[str, object]]) -> None:
    """Rows as a text table, then as JSON in one line."""
    print(f"\n{title}")
    columns = list(rows[0])
    wide = {c: max(len(c), *(len(str(row[c])) for row in rows)) for c in columns}
    print("  ".join(c.ljust(wide[c]) for c in columns))
    for row in rows:
        print("  ".join(str(row[c]).ljust(wide[c]) for c in columns))
    print("json", json.dumps({"title": title, "rows": rows}))
