"""Laws of prefix tuning, for every family."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adapterkit as ak
from tests.laws.matrix import CUSTOM, generating, loss, run
from tests.models import tiny

# said by EncoderDecoderModel whenever it is given labels
pytestmark = pytest.mark.filterwarnings("ignore:Version v4.12.0 introduces a better way:FutureWarning")

P = 3
MLP = {"method": "prefix_tuning", "prefix_length": P, "bottleneck_size": 6}
FLAT = {"method": "prefix_tuning", "flat": True, "prefix_length": P}
GATED = {**MLP, "use_gating": True, "shared_gating": False}
METHODS = {
    "mlp": MLP,
    "flat": FLAT,
    "gated": GATED,
    "mam": "prefix_tuning[prefix_length=3,bottleneck_size=6]|par_bn",
}
TRANSFORMERS = [row for row in tiny.ROWS if row != "custom"]

rows = pytest.mark.parametrize("row", tiny.ROWS)
families = pytest.mark.parametrize("row", TRANSFORMERS)
methods = pytest.mark.parametrize("method", METHODS)
writers = pytest.mark.parametrize("row", [row for row in tiny.ROWS if generating(row)])


def attach(model: nn.Module, row: str, method: Any = MLP, **options: Any) -> ak.Kit:
    """A kit whose adapter is away from its start."""
    kit = ak.attach(model, method, interface=CUSTOM if row == "custom" else None, **{"seed": 0, **options})
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, tensor in kit[options.get("name", "default")].named_parameters():
            if not key.startswith("head."):
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return kit


@rows
@methods
def test_output_moves_and_comes_back(row: str, method: str) -> None:
    model, inputs = tiny.build(row), tiny.inputs(row)
    before = run(model, inputs)
    kit = attach(model, row, METHODS[method])
    after = run(model, inputs)
    assert (after - before).abs().max() > 1e-3 * before.abs().max()
    with kit.disabled():
        assert torch.equal(run(model, inputs), before)
    assert torch.equal(run(model, inputs), after)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(twin, inputs), after)
    kit.detach()
    assert torch.equal(run(model, inputs), before)
    assert "adapterkit" not in str(model.state_dict().keys())


@rows
@methods
def test_every_tensor_and_no_base_tensor_gets_a_gradient(row: str, method: str) -> None:
    model, inputs = tiny.build(row), tiny.inputs(row, labels=True)
    kit = attach(model, row, METHODS[method])
    own = {id(tensor): name for name, tensor in kit["default"].named_parameters()}
    assert {id(tensor) for tensor in model.parameters() if tensor.requires_grad} == own.keys()
    loss(model, inputs).backward()
    got = {own[id(tensor)] for tensor in model.parameters() if tensor.grad is not None and tensor.grad.any()}
    assert got == set(own.values())
    assert kit.verify(**inputs).ok


@rows
@methods
def test_a_saved_adapter_comes_back_bit_for_bit(row: str, method: str, tmp_path: Path) -> None:
    model, inputs = tiny.build(row), tiny.inputs(row)
    kit = attach(model, row, METHODS[method])
    output = run(model, inputs)
    kit.save(tmp_path / "adapter")
    fresh = tiny.build(row)
    loaded = ak.load(fresh, tmp_path / "adapter", interface=CUSTOM if row == "custom" else None)
    assert torch.equal(run(fresh, inputs), output)
    assert loaded["default"].config == kit["default"].config


@rows
def test_an_ejected_prefix_is_flat_and_gives_the_same_bits(row: str, tmp_path: Path) -> None:
    model, inputs = tiny.build(row), tiny.inputs(row)
    for method in (GATED, METHODS["mam"]):
        kit = attach(model, row, method)
        output, tensors = run(model, inputs), set(kit["default"].state_dict())
        kit.eject("default")
        assert torch.equal(run(model, inputs), output)
        found = kit["default"].state_dict()
        assert any(key.endswith("core.key") and value.shape[0] == P for key, value in found.items())
        assert found.keys() != tensors and not any(key.startswith("shared.") for key in found)
        kit.save(tmp_path / "flat")
        kit.detach()
        ak.load(model, tmp_path / "flat", interface=CUSTOM if row == "custom" else None).detach()


@families
def test_eager_and_sdpa_agree(row: str) -> None:
    if not tiny.model_class(row)._supports_sdpa:
        return
    inputs = tiny.inputs(row, padded=False)
    both = {}
    for attn in ("eager", "sdpa"):
        model = tiny.build(row, attn=attn)
        bare = run(model, inputs)
        kit = attach(model, row)
        both[attn] = run(model, inputs)
        other = "sdpa" if attn == "eager" else "eager"
        model.set_attn_implementation(other)
        torch.testing.assert_close(run(model, inputs), both[attn], rtol=1e-4, atol=2e-5) if same(
            row
        ) else None
        model.set_attn_implementation(attn)
        kit.detach()
        assert torch.equal(run(model, inputs), bare)
    if same(row):
        torch.testing.assert_close(both["eager"], both["sdpa"], rtol=1e-4, atol=2e-5)


def same(row: str) -> bool:
    """Whether the bare model gives the same by both functions: sdpa has no soft cap."""
    inputs = tiny.inputs(row, padded=False)
    eager, sdpa = (run(tiny.build(row, attn=attn), inputs) for attn in ("eager", "sdpa"))
    return torch.allclose(eager, sdpa, atol=1e-4)


@writers
@pytest.mark.parametrize("beams", [1, 2])
def test_generate_gives_the_same_with_and_without_a_cache(row: str, beams: int) -> None:
    cls = generating(row)[0]
    model, inputs = tiny.build(row, cls), tiny.inputs(row, cls)
    given = {
        "max_new_tokens": 5,
        "min_new_tokens": 5,
        "do_sample": False,
        "num_beams": beams,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    bare = model.generate(**inputs, **given)
    kit = attach(model, row)
    cached, whole = (model.generate(**inputs, **given, use_cache=use) for use in (True, False))
    assert torch.equal(cached.sequences, whole.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(whole.logits), rtol=1e-4, atol=2e-5)
    assert not torch.allclose(bare.logits[0], cached.logits[0], atol=1e-3)
    with kit.disabled():
        assert torch.equal(model.generate(**inputs, **given).sequences, bare.sequences)


@families
def test_attentions_do_not_show_the_prefix(row: str) -> None:
    model, inputs = tiny.build(row, attn="eager"), tiny.inputs(row)
    bare = model(**inputs, output_attentions=True)
    attach(model, row)
    found = model(**inputs, output_attentions=True)
    for name in ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions"):
        if bare.get(name):
            assert [a.shape for a in found[name]] == [a.shape for a in bare[name]]
            assert all((a.sum(-1) < 1 - 1e-4).any() for a in found[name]), (
                "the prefix takes its part of each row"
            )


@families
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(row: str, reentrant: bool) -> None:
    model, inputs = tiny.build(row), tiny.inputs(row)
    if not getattr(model, "supports_gradient_checkpointing", False):
        return
    kit = attach(model.train(), row)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        loss(model, inputs).backward()
        return {name: tensor.grad.clone() for name, tensor in kit["default"].named_parameters()}

    plain = gradients()
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-4, atol=1e-5)
