"""Where sublayers are called in an unusual way: in chunks, several times, by two stacks, and cut short."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.errors import PlanError
from tests.laws.branch_cases import randomise
from tests.laws.matrix import run
from tests.models import tiny

BOTTLENECK = {"method": "bottleneck", "reduction_factor": 4, "non_linearity": "gelu"}
WHOLE: list[dict[str, Any]] = [
    {"is_parallel": True},
    {"original_ln_before": True},
    {"residual_before_ln": "post_add"},
    {"original_ln_after": False},
    {"use_gating": True},
    {"stochastic_depth": 0.1},
]
PLUS = {"original_ln_before": True, "original_ln_after": False, "residual_before_ln": False}


def adapted(model: nn.Module, options: dict[str, Any], name: str = "a", **more: Any) -> ak.Kit:
    kit = ak.attach(model, {**BOTTLENECK, **options}, name=name, seed=0, **more)
    randomise(kit, name)
    return kit


@pytest.mark.parametrize("options", WHOLE, ids=lambda options: next(iter(options)))
@pytest.mark.parametrize("row", ["bert", "albert", "xmod"])
def test_what_needs_whole_examples_is_refused_where_they_are_cut(row: str, options: dict[str, Any]) -> None:
    model = tiny.build(row, chunk_size_feed_forward=7)
    with pytest.raises(PlanError) as refused:
        adapted(model, options)
    assert refused.value.code == "chunked-feed-forward"
    assert {problem.address for problem in refused.value.problems} == {
        f"encoder.{i}.mlp" for i in range(len(refused.value.problems))
    }
    adapted(model, {**options, "locations": ("attention",)})


@pytest.mark.parametrize("row", ["bert", "albert", "xmod"])
def test_the_rest_gives_the_same_in_chunks(row: str) -> None:
    given = tiny.inputs(row, padded=False)
    whole, cut = tiny.build(row), tiny.build(row, chunk_size_feed_forward=1)
    adapted(whole, {})
    adapted(cut, {})
    torch.testing.assert_close(run(cut, given), run(whole, given), rtol=1e-5, atol=1e-5)


class CutShortError(Exception):
    pass


def interrupt(module: nn.Module) -> Any:
    def hook(*_: Any) -> None:
        raise CutShortError

    return module.register_forward_pre_hook(hook)


@pytest.mark.parametrize(
    ("row", "path"),
    [
        ("bert", "encoder.layer.1.output.LayerNorm"),
        ("bert", "encoder.layer.1.output.dropout"),
        ("vit", "pooler"),
        ("phi", "layers.1.mlp.fc2"),
        ("llama", "layers.1.mlp.down_proj"),
    ],
)
def test_a_pass_that_is_cut_short_does_not_spoil_the_next(row: str, path: str) -> None:
    model, given = tiny.build(row), tiny.inputs(row)
    bare = run(model, given)
    kit = adapted(model, PLUS, "a")
    adapted(model, {}, "b")
    expected = {}
    for name in ("a", "b"):
        kit.activate(name)
        expected[name] = run(model, given)
    for first in ("a", "b"):
        for second in ("a", "b", None):
            kit.activate(first)
            handle = interrupt(model.get_submodule(path))
            with pytest.raises(CutShortError):
                run(model, tiny.inputs(row, seed=1))
            handle.remove()
            kit.activate(second)
            assert torch.equal(run(model, given), expected.get(second, bare)), (first, second)
    kit.activate("a")
    run(model, given)
    assert kit._runtime.override.flow == {}


@pytest.mark.parametrize("row", ["bert", "llama", "phi", "vit", "albert"])
@pytest.mark.parametrize("options", [PLUS, {"is_parallel": True}], ids=["plus", "parallel"])
def test_no_activation_is_kept_alive(row: str, options: dict[str, Any]) -> None:
    model, given = tiny.build(row), tiny.inputs(row)
    seen: list[weakref.ref[Tensor]] = []
    for module in model.modules():
        if isinstance(module, nn.LayerNorm | nn.Linear):
            module.register_forward_hook(
                lambda _, args, out: seen.extend((weakref.ref(args[0]), weakref.ref(out))) or None
            )
    kit = adapted(model, options)
    run(model, given)
    gc.collect()
    assert len(seen) > 10
    assert [ref for ref in seen if ref() is not None] == []
    assert kit._runtime.override.flow == {}


def test_shared_layers_have_one_unit_that_acts_at_every_depth() -> None:
    given = tiny.inputs("albert")
    model = tiny.build("albert")  # four passes through two layers
    kit = adapted(model, {"is_parallel": True})
    assert [slot.address for slot in kit["a"].plan.slots] == [
        f"encoder.{i}.{sublayer}" for i in (0, 1) for sublayer in ("attention", "mlp")
    ]
    calls: list[str] = []
    for address, unit in kit["a"].units.items():
        unit.down.register_forward_hook(lambda *_, address=address: calls.append(address))
    run(model, given)
    assert sorted(calls) == sorted(2 * list(kit["a"].units))


def test_two_towers_have_units_of_their_own_widths() -> None:
    kit = adapted(tiny.build("clip", "CLIPModel"), {"locations": ("text.mlp", "vision.mlp")})
    widths = {slot.stack: slot.shape for slot in kit["a"].plan.slots}
    assert widths == {"text": (32, 32), "vision": (48, 48)}


def test_the_parts_of_a_pair_are_addressed() -> None:
    model = tiny.build("encoder_decoder", **tiny.ROWS["encoder_decoder"].variants["roberta-gpt2"])
    kit = adapted(model, {"locations": ("encoder/encoder.mlp", "decoder/decoder.cross_attention")})
    shapes = {slot.address: slot.shape for slot in kit["a"].plan.slots}
    assert shapes == {
        **{f"encoder/encoder.{i}.mlp": (48, 48) for i in (0, 1)},
        **{f"decoder/decoder.{i}.cross_attention": (32, 32) for i in (0, 1)},
    }
    given = tiny.inputs("encoder_decoder")
    found = run(model, given)
    with kit.disabled():
        assert not torch.allclose(run(model, given), found, atol=1e-2)


def test_audio_both_stacks() -> None:
    model, given = tiny.build("whisper"), tiny.inputs("whisper")
    kit = adapted(model, {"locations": ("encoder.mlp", "decoder.cross_attention")})
    run(model, given)
    assert kit.verify(**given).dead == ()
