"""Laws of `Split` on every family: each segment of a sequence is what its adapter makes of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import adapterkit as ak
from adapterkit.composition import Average, Setup, Split, Stack
from adapterkit.errors import CompositionError
from tests.laws import matrix
from tests.laws.branch_cases import randomise
from tests.laws.composition_cases import METHODS, SetupCase, fields
from tests.models import tiny
from tests.oracles.lora import lora_delta
from tests.unit.kit_scene import refused

PER_POSITION = (
    *("lora", "ia3", "vera", "dora", "dvora", "mtl_lora", "lora|par_bn"),
    *("seq_bn", "double_seq_bn", "par_bn", "scaled_par_bn", "compacter", "compacter++"),
)
"""Methods whose units look at one position at a time; the default run takes one for each family, in turn."""
START = 3


def scene(row: str, config: Any, dtype: torch.dtype = torch.float64) -> tuple[ak.Kit, dict[str, Any], int]:
    """Adapters a and b on the first stack of a family, its inputs, and how many positions that stack sees."""
    cls = tiny.classes(row)[0]
    interface = SetupCase(row, cls, "lora").interface
    model, given = tiny.build(row, cls, dtype=dtype), tiny.inputs(row, cls, padded=False)
    given = {key: value.to(dtype) if value.is_floating_point() else value for key, value in given.items()}
    own = limited(ak.plan(model, config, interface=interface))
    for seed, name in enumerate("ab"):
        kit = ak.attach(model, own, name=name, seed=seed, interface=interface)
        randomise(kit, name, seed=seed)
    slot = next(slot for slot in kit["a"].plan.slots if slot.layer == 0)
    seen: list[int] = []
    hook = slot.module.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    with kit.using(None):
        fields(kit, given)
    hook.remove()
    return kit, given, seen[0]


def limited(plan: ak.Plan) -> Any:
    """The config for the stack that is adapted first, without maps that relative positions go through."""
    stack = plan.slots[0].stack
    layers = [f"{stack}.{i}" for i in range(plan.blueprint.stacks[stack].num_layers)]
    odd = {slot.role for slot in plan.slots if slot.batch != "first"}
    found = []
    for member in getattr(plan.config, "configs", (plan.config,)):
        options: dict[str, Any] = {**member.to_dict(), "layers": layers}
        if "targets" in options and options["targets"] != "all":
            options["targets"] = [role for role in options["targets"] if role not in odd] or ["v"]
        found.append(options)
    return found[0] if len(found) == 1 else {"method": "union", "configs": found}


def under(kit: ak.Kit, setup: Setup, given: dict[str, Any]) -> dict[str, Tensor]:
    with kit.using(setup):
        return fields(kit, given)


@pytest.mark.parametrize("row", list(tiny.ROWS))
def test_every_map_is_cut_where_the_setup_says(row: str) -> None:
    """What each adapted map gives under Split, by the weights of its model and the formula of LoRA."""
    kit, given, length = scene(row, "lora[r=3, alpha=6]")
    plain = tiny.build(row, tiny.classes(row)[0], dtype=torch.float64)
    tensors = {name: kit[name].state_dict() for name in "ab"}
    seen: list[tuple[str, Tensor, Tensor]] = []
    paths = dict.fromkeys(slot.path for slot in kit["a"].plan.slots)
    for path in paths:
        kit.model.get_submodule(path).register_forward_hook(
            lambda module, args, out, path=path: seen.append((path, args[0], out.clone()))
        )
    under(kit, Split("a", "b", splits=[START, length - START]), given)
    assert {path for path, _, _ in seen} == set(paths)
    for path, x, out in seen:
        with torch.no_grad():
            expected = plain.get_submodule(path)(x)
            for slot in (slot for slot in kit["a"].plan.slots if slot.path == path):
                parts = zip("ab", (x[:, :START], x[:, START:]), strict=True)
                deltas = [(tensors[n], part) for n, part in parts]
                delta = torch.cat(
                    [p @ lora_delta(t[f"{slot.address}.A"], t[f"{slot.address}.B"], 6).T for t, p in deltas],
                    dim=1,
                )
                if slot.rows is None:
                    expected = expected + delta
                else:
                    view = slot.rows.view(expected)
                    view += delta.unflatten(-1, view.shape[-2:])
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)


def cases() -> Iterator[Any]:
    for number, row in enumerate(tiny.ROWS):
        for method in PER_POSITION:
            marks = [] if method == PER_POSITION[number % len(PER_POSITION)] else [pytest.mark.full]
            yield pytest.param(row, method, id=f"{row}-{method}", marks=marks)


WITH_POSITIONS = ("deberta", "deberta_v2")
"""Families that call maps of queries or keys, or maps of their own, with relative positions as well."""


@pytest.mark.parametrize(("row", "method"), list(cases()))
def test_segments_that_do_the_same_do_what_one_does(row: str, method: str) -> None:
    """Twins: the same numbers in another adapter. What is cut and put together again is as it was."""
    kit, given, length = scene(row, METHODS[method])
    if row in WITH_POSITIONS and method in matrix.METHODS and method != "ia3":  # at all maps
        split = Split("a", "b", splits=[START, length - START])
        error = refused(CompositionError, "undefined-block", kit.activate, split)
        assert "no row for each position" in str(error)
        return
    with torch.no_grad():
        for key, tensor in kit["b"].state_dict().items():
            tensor.copy_(kit["a"].state_dict()[key])
    alone = under(kit, "a", given)
    base = under(kit, Average("a", weights=[0.0], normalize=False), given)
    for start in (1, START, length - 1):
        for setup in (
            Split("a", "b", splits=[start, length - start]),
            Split(Stack("b"), Split("a", "b", splits=[0, length - start]), splits=[start, length - start]),
        ):
            found = under(kit, setup, given)
            for name, value in alone.items():
                torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-8)
    assert any(not torch.allclose(value, base[name], atol=1e-4) for name, value in alone.items())
    with torch.no_grad():
        for tensor in kit["b"].parameters():
            tensor.mul_(-1.5).add_(0.3)
    found = under(kit, Split("a", "b", splits=[START, length - START]), given)
    assert any(not torch.allclose(value, alone[name], atol=1e-4) for name, value in found.items())
    whole = under(kit, Split("a", "b", splits=[length, 0]), given)
    assert all(torch.equal(value, alone[name]) for name, value in whole.items())
