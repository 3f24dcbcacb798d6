"""Laws of the methods between sublayers: what moves, what is trained, what is left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import adapterkit as ak
from tests.laws.branch_cases import REFT, SIX, BranchCase, cases, few, generating, randomise
from tests.laws.matrix import loss, run
from tests.laws.test_detach import bits, snapshot

# said by EncoderDecoderModel whenever it is given labels
pytestmark = pytest.mark.filterwarnings("ignore:Version v4.12.0 introduces a better way:FutureWarning")

BFLOAT16_ERROR = 0.1
TOKENS = 4
IDENTICAL = ("par_bn", "scaled_par_bn", "lora|par_bn")
"""Methods whose last matrix starts at zero."""


def flow(kit: ak.Kit) -> dict[str, Any]:
    """What the thread still remembers of the last pass; entries of stacks are overwritten by the next."""
    found = kit._runtime.override.flow
    return {key: value for key, value in found.items() if not key.endswith((".mask", ".past"))}


@pytest.mark.parametrize("branch_case", list(cases()))
def test_what_moves_what_is_trained_and_what_is_left_behind(branch_case: BranchCase) -> None:
    case = branch_case
    model, inputs = case.model(), case.inputs(labels=True)
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 != 1)
    before, tensors, output = snapshot(model), bits(model), run(model, inputs)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    kit = case.attach(model)
    if case.method in IDENTICAL:
        assert torch.equal(run(model, inputs), output)
    randomise(kit, heads=False)
    assert (run(model, inputs) - output).abs().max() > 1e-4 * output.abs().max()
    assert flow(kit) == {}
    with kit.disabled():
        assert torch.equal(run(model, inputs), output)

    own = {id(t): name for name, t in kit["default"].named_parameters() if t.requires_grad}
    assert own.keys() == {id(t) for t in model.parameters() if t.requires_grad}
    loss(model, inputs).backward()
    got = {id(t) for t in model.parameters() if t.grad is not None and t.grad.any()}
    assert got <= own.keys(), "a tensor of the base got a gradient"
    assert {own[tensor] for tensor in got} == {name for name in own.values() if not case.unreached(name)}
    assert flow(kit) == {}

    kit.detach()
    model.zero_grad(set_to_none=True)
    assert snapshot(model) == before
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained
    after = bits(model)
    assert list(after) == list(tensors)
    assert all(torch.equal(after[key], value) for key, value in tensors.items())
    assert torch.equal(run(model, inputs), output)


@pytest.mark.parametrize("branch_case", list(few(*SIX)))
def test_a_saved_adapter_comes_back_bit_for_bit(branch_case: BranchCase, tmp_path: Path) -> None:
    case = branch_case
    kit, inputs = case.attached(), case.inputs()
    saved, output = kit["default"].state_dict(), run(kit.model, inputs)
    kit.save(tmp_path / "adapter")
    model = case.model()
    # torch multiplies by a matrix that wants a gradient in another order
    loaded = ak.load(model, tmp_path / "adapter", interface=case.interface, trainable=True)
    assert torch.equal(run(model, inputs), output)
    found = loaded["default"].state_dict()
    assert saved.keys() == found.keys()
    for key, value in saved.items():
        assert torch.equal(found[key], value) and found[key].dtype == value.dtype, key


@pytest.mark.parametrize("branch_case", list(few(*SIX)))
def test_a_model_in_bfloat16(branch_case: BranchCase) -> None:
    case = branch_case
    kit = case.attached(torch.bfloat16)
    assert {tensor.dtype for tensor in kit["default"].parameters()} == {torch.bfloat16}
    inputs = case.inputs(torch.bfloat16, labels=True)
    loss(kit.model, inputs).backward()
    assert all(tensor.grad is None or tensor.grad.isfinite().all() for tensor in kit["default"].parameters())
    found = run(kit.model, inputs)
    wide = run(kit.model.float(), case.inputs(labels=True))
    assert found.dtype == torch.bfloat16
    assert (found.float() - wide).norm() < BFLOAT16_ERROR * wide.norm()


@pytest.mark.parametrize("branch_case", list(generating()))
def test_generate_gives_the_same_with_and_without_a_cache(branch_case: BranchCase) -> None:
    case = branch_case
    model = case.model()
    config = dict(case.config)
    if case.method in REFT:
        config |= {"suffix_positions": 0}
    randomise(ak.attach(model, config, interface=case.interface, seed=0))
    inputs = case.inputs()

    def generate(use_cache: bool) -> Any:
        return model.generate(
            **inputs,
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            do_sample=False,
            use_cache=use_cache,
            return_dict_in_generate=True,
            output_logits=True,
        )

    cached, whole = generate(True), generate(False)
    assert torch.equal(cached.sequences, whole.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(whole.logits), rtol=1e-4, atol=1e-5)
