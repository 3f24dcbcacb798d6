"""Stack, Average and Split equal models that were rewritten by hand, in float64.

Bottlenecks: layers with a forward of their own. LoRA and (IA)^3: hooks on the linear maps of a plain model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.composition import Setup
from tests.laws.branch_cases import randomise
from tests.laws.matrix import run
from tests.laws.test_branches_patched import FAMILIES
from tests.models import tiny
from tests.oracles import bottleneck

KINDS: dict[str, dict[str, Any]] = {
    "branch": {},
    "sum": {"original_ln_before": True},
    "plus": {"original_ln_before": True, "original_ln_after": False, "residual_before_ln": False},
    "parallel": {"is_parallel": True},
    "own": {"original_ln_after": False},
}
"""Options of one bottleneck: what it reads, its residual, and whether the model's add and norm follow."""
Names = tuple[str, ...]
LENGTHS = (3, tiny.inputs("bert")["input_ids"].shape[1] - 3)


def attached(row: str, kinds: Names) -> ak.Kit:
    model = tiny.build(row, dtype=torch.float64)
    for seed, kind in enumerate(kinds):
        options = {"method": "bottleneck", "reduction_factor": 4, "non_linearity": "gelu", **KINDS[kind]}
        kit = ak.attach(model, options, name=f"{kind}{seed}", seed=seed, head=False)
        randomise(kit, f"{kind}{seed}", seed=seed)
    return kit


def step(kind: str, tensors: dict[str, Tensor], h: Tensor, x: Tensor, norm: Any) -> Tensor:
    """What one bottleneck makes of the branch h: its result before the model's add."""
    options = KINDS[kind]
    if options.get("is_parallel"):
        return bottleneck.update(x, tensors, "gelu", 1.0) + h
    z = norm(h + x) if options.get("original_ln_before") else h
    residual = z if options.get("residual_before_ln") is False else h
    return bottleneck.update(z, tensors, "gelu", 1.0) + residual


def end(kind: str, result: Tensor, x: Tensor, norm: Any) -> Tensor:
    """The model's add and norm, if they follow."""
    return norm(result + x) if KINDS[kind].get("original_ln_after", True) else result


def stacked(kinds: Names, tensors: list[dict[str, Tensor]], h: Tensor, x: Tensor, norm: Any) -> Tensor:
    for kind, own in zip(kinds, tensors, strict=True):
        h = step(kind, own, h, x, norm)
    return end(kinds[-1], h, x, norm)


def averaged(kinds: Names, tensors: list[dict[str, Tensor]], h: Tensor, x: Tensor, norm: Any) -> Tensor:
    results = [step(kind, own, h, x, norm) for kind, own in zip(kinds, tensors, strict=True)]
    return end(kinds[-1], 0.75 * results[0] + 0.25 * results[1], x, norm)


def cut(kinds: Names, tensors: list[dict[str, Tensor]], h: Tensor, x: Tensor, norm: Any) -> Tensor:
    parts, start = [], 0
    for kind, own, length in zip(kinds, tensors, LENGTHS, strict=True):
        here = slice(start, start + length)
        parts.append(end(kind, step(kind, own, h[:, here], x[:, here], norm), x[:, here], norm))
        start += length
    return torch.cat(parts, dim=1)


BLOCKS: dict[str, tuple[Callable[..., Setup], Callable[..., Tensor]]] = {
    "stack": (ak.Stack, stacked),
    "average": (lambda *names: ak.Average(*names, weights=[3, 1]), averaged),
    "split": (lambda *names: ak.Split(*names, splits=LENGTHS), cut),
}
PAIRS = [("branch", "sum"), ("plus", "branch"), ("parallel", "branch"), ("own", "plus"), ("branch", "own")]


@pytest.mark.parametrize("kinds", PAIRS, ids="+".join)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("row", ["bert", "llama", "gemma2"])
def test_bottlenecks_in_a_block(row: str, block: str, kinds: Names) -> None:
    made, expect = BLOCKS[block]
    alike = KINDS[kinds[0]].get("original_ln_after", True) == KINDS[kinds[1]].get("original_ln_after", True)
    if block == "average" and not alike:
        kinds = (kinds[0], kinds[0])  # a mean of results of two kinds is refused in post-norm models
    kit, plain = attached(row, kinds), tiny.build(row, dtype=torch.float64)
    names = [f"{kind}{seed}" for seed, kind in enumerate(kinds)]
    given = tiny.inputs(row, padded=False)
    states = [kit[name].state_dict() for name in names]
    patch, stacks, _ = FAMILIES[row]

    def acting(layer: str) -> Any:
        def act(sublayer: str, h: Tensor, x: Tensor, norm: Any) -> Tensor:
            start = f"{layer}.{sublayer}."
            own = [
                {key.removeprefix(start): v for key, v in state.items() if key.startswith(start)}
                for state in states
            ]
            return expect(kinds, own, h, x, norm) if own[0] else norm(h + x)

        return act

    with torch.no_grad():
        for stack, path in stacks.items():
            for index, layer in enumerate(plain.get_submodule(path)):
                patch(layer, acting(f"{stack}.{index}"))
        expected = run(plain, given)
        with kit.using(made(*names)):
            found = run(kit.model, given)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert kit._runtime.override.flow == {}


# -- updates of linear maps


LINEAR: dict[str, tuple[Setup, dict[str, Any], Callable[[list[Tensor]], Tensor]]] = {
    "stack": (ak.Stack("a", "b"), {}, lambda d: d[0] + d[1]),
    "average": (ak.Average("a", "b", weights=[1, 3]), {}, lambda d: 0.25 * d[0] + 0.75 * d[1]),
    "sum": (ak.Average("a", "b", weights=[1, 2], normalize=False), {}, lambda d: d[0] + 2 * d[1]),
    "split": (
        ak.Split("a", "b", splits=LENGTHS),
        {},
        lambda d: torch.cat([d[0][:, : LENGTHS[0]], d[1][:, LENGTHS[0] :]], dim=1),
    ),
    "groups": (
        ak.BatchSplit("a", "b", batch_sizes=[1, 2]),
        {},
        lambda d: torch.cat([d[0][:1], d[1][1:]]),
    ),
    "even groups": (
        ak.BatchSplit("b", "a", "b", batch_sizes=1),
        {},
        lambda d: torch.stack([d[1][0], d[0][1], d[1][2]]),
    ),
    "route": (
        ak.Route("a", "b"),
        {"rows": ["b", "a", None]},
        lambda d: torch.stack([d[1][0], d[0][1], torch.zeros_like(d[0][2])]),
    ),
    "nested": (
        ak.Stack("a", ak.Route("b", ak.Average("a", "b"))),
        {"rows": [0, 1, 1]},
        lambda d: d[0] + torch.cat([d[1][:1], (0.5 * d[0] + 0.5 * d[1])[1:]]),
    ),
    "split of groups": (
        ak.Split("a", ak.BatchSplit("a", "b", batch_sizes=[2, 1]), splits=LENGTHS),
        {},
        lambda d: torch.cat(
            [d[0][:, : LENGTHS[0]], torch.cat([d[0][:2, LENGTHS[0] :], d[1][2:, LENGTHS[0] :]])], dim=1
        ),
    ),
}


@pytest.mark.parametrize("targets", ["[q,v,up]", "all"])
@pytest.mark.parametrize("block", LINEAR)
@pytest.mark.parametrize("row", ["bert", "gpt2", "llama", "phi3"])
def test_lora_in_a_block(row: str, block: str, targets: str) -> None:
    setup, rows, mix = LINEAR[block]
    model, plain = (tiny.build(row, dtype=torch.float64) for _ in range(2))
    for seed, name in enumerate("ab"):
        config = f"lora[r={2 + 2 * seed},alpha={3 + seed},targets={targets}]"
        kit = ak.attach(model, config, name=name, seed=seed, head=False)
        randomise(kit, name, seed=seed)
    slots = {slot.address: slot for slot in kit["a"].plan.slots}
    given = tiny.inputs(row, batch=3, padded=False)

    def hook(address: str) -> Any:
        own = [kit[name].state_dict() for name in "ab"]

        def add(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
            deltas = [
                (3 + seed) / (2 + 2 * seed) * args[0] @ state[f"{address}.A"].T @ state[f"{address}.B"].T
                for seed, state in enumerate(own)
            ]
            part = mix(deltas)
            layout = slots[address].rows
            if layout is None:
                return out + part
            whole = torch.zeros_like(out)
            layout.view(whole).copy_(part.unflatten(-1, (layout.groups, layout.length)))
            return out + whole

        return add

    for address, slot in slots.items():
        plain.get_submodule(slot.path).register_forward_hook(hook(address))
    with kit.using(setup, **rows):
        found = run(model, given)
    torch.testing.assert_close(found, run(plain, given), rtol=1e-9, atol=1e-9)
