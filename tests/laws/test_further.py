"""Types outside the table: the residual stream is what the interface says, and every method keeps its laws.

A slice of different structures by default, all types and variants in the full run.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.errors import ConfigError, PlanError
from adapterkit.model.blueprint import Blueprint
from adapterkit.model.resolve import resolve
from adapterkit.spec.schema import Stack
from tests.laws.matrix import randomise
from tests.models import further
from tests.oracles import residual

# an old version of one source file is scripted when it is imported
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

METHODS = (
    "lora[targets=all, r=2]",
    "ia3",
    "vera[targets=all, r=2]",
    "dora[targets=all, r=2]",
    "seq_bn[reduction_factor=4]",
    "par_bn[reduction_factor=4]",
    "compacter[reduction_factor=4, phm_dim=2]",
    "prefix_tuning_flat[prefix_length=3]",
    "prompt_tuning[prompt_length=3]",
    "loreft[r=2]",
)
IDENTITY = ("lora", "ia3", "vera", "dora")
SLICE = (  # one of each structure
    "bloom",
    "deepseek_v2",
    "dinov2",
    "falcon-grouped",
    "gemma3",
    "glm4",
    "gpt_neox",
    "granite",
    "internvl_vision",
    "lfm2_moe",
    "minimax",
    "mpnet",
    "nllb-moe",
    "opt-post-norm",
    "qwen3_5_text",
    "swinv2",
    "wav2vec2-stable",
)


def names() -> list[Any]:
    everything = (*further.types(), *further.VARIANTS)
    return [pytest.param(n, marks=[] if n in SLICE else [pytest.mark.full]) for n in everything]


def built(name: str) -> tuple[nn.Module, Mapping[str, Any]]:
    try:
        return further.build(name)
    except ConfigError as error:
        pytest.skip(f"no tiny model runs: {error.problems[0].message[:80]}")


def numbers(value: Any) -> list[Tensor]:
    """All floats of outputs but caches."""
    if isinstance(value, Tensor):
        return [value.flatten()] if value.is_floating_point() else []
    items = (
        value.items()
        if isinstance(value, Mapping)
        else enumerate(value if isinstance(value, tuple | list) else ())
    )
    return [tensor for key, item in items if "past" not in str(key) for tensor in numbers(item)]


def run(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """All outputs as one flat tensor; what a model draws (patches to hide, say) is the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.cat(numbers(model(**copy.deepcopy(dict(inputs)))))


def weighted(out: Tensor) -> Tensor:
    return (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2))).sum()


def said(blueprint: Blueprint, stack: str) -> Stack:
    """The stack in its interface."""
    return blueprint.stacks[stack].interface.stacks[stack.rpartition("/")[2]]


def unreached(model: nn.Module, inputs: Mapping[str, Any]) -> Iterator[str]:
    """Addresses of what the tiny inputs do not reach, and of what the bare model itself does not train by its
    output.
    """
    blueprint = resolve(model)
    calls = residual.Watch(model, inputs, blueprint).calls
    bare = copy.deepcopy(model).requires_grad_(True)
    weighted(run(bare, inputs)).backward()
    for address, slot in {**blueprint.slots, **blueprint.places}.items():
        own = list(bare.get_submodule(slot.path).parameters())
        if (id(slot.module), "in") not in calls or (own and not any(map(_moved, own))):
            yield f"{address}."


@pytest.mark.parametrize("name", names())
def test_the_stream_is_the_sum_that_the_interface_says(name: str) -> None:
    model, inputs = built(name)
    blueprint = resolve(model)
    by_default = [s for s, info in blueprint.stacks.items() if info.by_default]
    found = [text for text in residual.broken(model, inputs, blueprint) if text.startswith(tuple(by_default))]
    # the tiny inputs hold no states to attend to
    found = [text for text in found if not text.endswith("cross_attention is not called")]
    aside = tuple(f"{address}." for address in blueprint.stacks if said(blueprint, address).aside)
    assert [text for text in found if not text.startswith(aside)] == []
    assert all(any(text.startswith(stack) for text in found) for stack in aside), "nothing else is added"


@pytest.mark.parametrize("name", names())
def test_every_method_keeps_its_laws(name: str) -> None:
    """Identity where it is promised, effect, a gradient for every tensor, the old bits after detaching."""
    template, inputs = built(name)
    with torch.no_grad():
        base = run(template, inputs)
    keys, done = list(template.state_dict()), 0
    quiet = tuple(unreached(template, inputs))
    for method in METHODS:
        model, kind = copy.deepcopy(template), method.partition("[")[0]
        try:
            kit = ak.attach(model, method, head=False, seed=0)
        except PlanError as error:
            assert {p.code for p in error.problems} <= {
                "unsupported",
                "no-such-role",
                "no-such-branch",
                "no-embeddings",
                "nothing-selected",
            }, error
            continue
        done += 1
        with torch.no_grad():
            if kind in IDENTITY:
                assert torch.equal(run(model, inputs), base), method
            randomise(kit, heads=False)
            moved = run(model, inputs)
        assert moved.isfinite().all()
        assert moved.shape != base.shape or not torch.allclose(moved, base, atol=1e-6), method
        weighted(run(model, inputs)).backward()
        still = [n for n, p in kit["default"].named_parameters() if p.requires_grad and not _moved(p)]
        assert [n for n in still if not any(place in n for place in quiet)] == [], method
        kit.detach()
        with torch.no_grad():
            assert torch.equal(run(model, inputs), base), method
        assert list(model.state_dict()) == keys
    assert done >= 2


def _moved(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and bool(parameter.grad.any())
