"""Setups on every family: what each row of the output is, said by the meaning of the blocks alone.

A row belongs to one example, and equals what that example gets from a setup without blocks for batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

import adapterkit as ak
from adapterkit.composition import Average, BatchSplit, MultiTask, Parallel, Route, Setup, Split, Stack
from tests.laws import branch_cases, matrix
from tests.models import tiny

BATCH = 4
CHOSEN = (1, -1, 0, 1)
"""What `rows` say: the number of a child for each example, -1 for none."""
TASKS = (1, 0, 0, 1)
METHODS: dict[str, Any] = {
    **matrix.METHODS,
    **{name: config for name, config in branch_cases.METHODS.items() if name != "glow"},
    "prefix_tuning": {"method": "prefix_tuning", "prefix_length": 3, "bottleneck_size": 6},
    "prefix_tuning_flat": {"method": "prefix_tuning_flat", "prefix_length": 3},
    "prompt_tuning": {"method": "prompt_tuning", "prompt_length": 3},
    "mam": "prefix_tuning_flat[prefix_length=3]|par_bn[reduction_factor=4]",
    "unipelt": "prefix_tuning_flat[prefix_length=3, use_gating=true]"
    "|seq_bn[reduction_factor=4, use_gating=true]|lora[gating=true]",
}
OTHER: dict[str, dict[str, Any]] = {
    "lora": {"r": 3, "alpha": 2},
    "dora": {"r": 2},
    "mtl_lora": {"r": 3},
    "vera": {"r": 4},
    "dvora": {"r": 4},
    "seq_bn": {"reduction_factor": 8},
    "prefix_tuning": {"prefix_length": 5},
    "prefix_tuning_flat": {"prefix_length": 2},
}
"""Method -> options of a second adapter, where it may be of another size."""
SETUPS: dict[str, Setup] = {
    "Stack": Stack("a"),
    "Parallel": Parallel("a", "b", "a"),
    "BatchSplit": BatchSplit("a", "b", batch_sizes=[1, 3]),
    "Route": Route("a", "b"),
    "MultiTask": MultiTask("a", "b"),
    "Average": Average("a", "b", weights=[0, 2]),
    "nested": Stack("a", Parallel("b", Stack("b", "a"))),
    "groups": Parallel(BatchSplit("a", "b", batch_sizes=[3, 1]), Route("a", "b"), "b"),
    "routes": BatchSplit("a", Route("a", "b"), batch_sizes=[1, 3]),
    "means": Parallel(Average("a", "b", weights=[1, 3]), Average("b")),
}
"""Word -> a setup of two adapters."""
_NO_MEAN = ("prefix_tuning", "prefix_tuning_flat", "prompt_tuning", "seq_bn_inv", "mam", "unipelt")


@dataclass(frozen=True)
class SetupCase(matrix.Case):
    """Two adapters of one method on one class of a family, under one setup."""

    block: str = ""

    @property
    def config(self) -> Any:
        return METHODS[self.method]

    @property
    def setup(self) -> Setup:
        return SETUPS[self.block]

    @property
    def refused(self) -> str | None:
        """The code with which the setup must be refused, None if it has a meaning."""
        if self.block == "means" and self.method in _NO_MEAN:
            return "undefined-block"
        return "uneven-prompts" if self.method == "prompt_tuning" and self.block == "nested" else None

    @property
    def rows(self) -> tuple[int, ...]:
        """Which child each example takes. Without a prompt for all of them none can have one."""
        return TASKS if self.method == "prompt_tuning" else CHOSEN

    def kit(self) -> ak.Kit:
        """The model with both adapters away from their start; the same object for all setups."""
        return _kit(self.row, self.cls, self.method)

    def batch(self) -> dict[str, Any]:
        return tiny.inputs(self.row, self.cls, batch=BATCH)


@lru_cache(maxsize=1)
def _kit(row: str, cls: str, method: str) -> ak.Kit:
    case = SetupCase(row, cls, method)
    model = case.model()
    for seed, name in enumerate("ab"):
        config = case.config
        if seed and method in OTHER:
            config = {**config, **OTHER[method]}
        kit = ak.attach(model, config, name=name, interface=case.interface, seed=seed)
        branch_cases.randomise(kit, name, seed=seed)
    return kit


def cases() -> Iterator[Any]:
    """Every family and method under every setup; by default one method for each family, taken in turn, under
    three setups and one of the others.
    """
    methods, blocks = list(METHODS), list(SETUPS)
    for number, row in enumerate(tiny.ROWS):
        turn = methods[number % len(methods)]
        few = {"Stack", "Parallel", "Route", blocks[number % len(blocks)]}
        for method in methods:
            for block in blocks:
                case = SetupCase(row, tiny.classes(row)[0], method, "", block)
                marks = [] if method == turn and block in few else [pytest.mark.full]
                yield pytest.param(case, id=f"{row}-{method}-{block}", marks=marks)


def headed() -> Iterator[Any]:
    """Every other class of every family, whose adapters have heads of their own; by default three classes."""
    some = ("BertForSequenceClassification", "BeitForSemanticSegmentation", "CLIPForImageClassification")
    for row in tiny.ROWS:
        for cls in tiny.classes(row)[1:]:
            for block in SETUPS:
                case = SetupCase(row, cls, "seq_bn", "", block)
                marks = [] if cls in some else [pytest.mark.full]
                yield pytest.param(case, id=f"{cls}-{block}", marks=marks)


# ------------------------------------------------------------------------------------------ what is expected


def reduced(
    setup: Setup | None, batch: Sequence[int], rows: Sequence[int], tasks: Sequence[int]
) -> list[tuple[int, Setup | None]]:
    """(example, what acts on it) for every row of the output, without blocks that look at the batch.

    Args: batch: the examples that get here, in order. rows, tasks: what is said of every example.
    """
    match setup:
        case None | str() | ak.Fuse():
            return [(example, setup) for example in batch]
        case Parallel(children=children):
            return [row for child in children for row in reduced(child, batch, rows, tasks)]
        case BatchSplit(children=children, batch_sizes=sizes):
            found, start = [], 0
            for child, size in zip(children, sizes, strict=True):
                found += reduced(child, batch[start : start + size], rows, tasks)
                start += size
            return found
        case Route(children=children):
            chosen = [children[rows[e]] if rows[e] >= 0 else None for e in batch]
            return [r for e, c in zip(batch, chosen, strict=True) for r in reduced(c, [e], rows, tasks)]
        case MultiTask(children=children):
            return [r for e in batch for r in reduced(children[tasks[e]], [e], rows, tasks)]
    assert isinstance(setup, Stack | Average | Split)
    if not batch:
        return []
    parts = [reduced(child, batch, rows, tasks) for child in setup.children]
    wide = max(map(len, parts))
    whole = zip(*(part * (wide // len(part)) for part in parts), strict=True)
    return [(own[0][0], _again(setup, [inner for _, inner in own])) for own in whole]


def _again(setup: Setup, children: Sequence[Setup | None]) -> Setup | None:
    """A Stack, Average or Split of other children."""
    if isinstance(setup, Stack):
        found = [child for child in children if child is not None]
        return Stack(*found) if len(found) > 1 else found[0] if found else None
    if isinstance(setup, Split):
        return _only(setup.splits, children) or Split(*children, splits=setup.splits)
    assert isinstance(setup, Average)
    if only := _only(setup.shares, children):
        return only
    # what is missing to 1 is the share of those that do nothing
    pairs = [(child, share) for child, share in zip(children, setup.shares, strict=True) if child is not None]
    names, shares = [child for child, _ in pairs], [share for _, share in pairs]
    return Average(*names, weights=shares, normalize=False) if pairs else None


def _only(numbers: Sequence[float], children: Sequence[Any]) -> Setup | None:
    """The child that has everything."""
    having = [child for number, child in zip(numbers, children, strict=True) if number]
    return having[0] if len(having) == 1 and (sum(numbers) == 1 or max(numbers) > 1) else None


def fields(kit: ak.Kit, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Outputs that have a row for each example; similarities between examples have none."""
    with torch.no_grad():
        found = tiny.fields(kit.model(**inputs))
    return {name: value for name, value in found.items() if not name.startswith("logits_per_")}


def assert_rows(
    kit: ak.Kit, setup: Setup, inputs: Mapping[str, Any], rows: Any = CHOSEN, tasks: Any = TASKS
) -> None:
    """Every row of the output under a setup is what its example gets alone."""
    said = {"rows": torch.tensor(rows)} if "Route" in repr(setup) else {}
    said |= {"task_ids": torch.tensor(tasks)} if "MultiTask" in repr(setup) else {}
    with kit.using(setup, **said):
        found = fields(kit, inputs)
    wanted = reduced(setup, range(BATCH), rows, tasks)
    alone: dict[Setup | None, dict[str, Tensor]] = {}
    for own in dict.fromkeys(own for _, own in wanted):
        with kit.using(own):
            alone[own] = fields(kit, inputs)
    for name, value in found.items():
        expected = torch.stack([alone[own][name][example] for example, own in wanted])
        assert value.shape == expected.shape, name
        scale = max(1.0, float(expected.abs().max()))
        difference = float((value - expected).abs().max()) / scale
        assert difference <= 2e-6, f"{name}: {difference:.2g}"
