"""Law of files: what was saved comes back bit for bit in another process's model, with its heads."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import adapterkit as ak
from tests.laws.matrix import Case, run

# where the base of a class lies, if not where `base_model_prefix` says
BASES = {
    "TinyClassifier": ("tokens.", "positions.", "blocks.", "norm."),
    "CLIPForImageClassification": ("vision_model.",),
    "T5ForQuestionAnswering": ("shared.", "encoder.", "decoder."),
    "MT5ForQuestionAnswering": ("shared.", "encoder.", "decoder."),
    "WhisperForAudioClassification": ("encoder.",),
}


def newly_initialised(case: Case, model: nn.Module) -> list[str]:
    """Names of parameters that `from_pretrained` of a base checkpoint leaves at random: head and pooler."""
    if not case.headed:
        return []
    inside = BASES.get(case.cls) or (f"{model.base_model_prefix}.",)
    names = [name for name, _ in model.named_parameters()]
    return [name for name in names if not name.startswith(inside) or ".pooler." in name]


@torch.no_grad()
def forget(model: nn.Module, names: list[str]) -> None:
    for name in names:
        parameter = model.get_parameter(name)
        parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(99)))


def test_a_saved_adapter_comes_back_bit_for_bit(case: Case, tmp_path: Path) -> None:
    kit, inputs = case.attached(), case.inputs()
    saved, output = kit["default"].state_dict(), run(kit.model, inputs)
    kit.save(tmp_path / "adapter")

    model = case.model()
    names = newly_initialised(case, model)
    forget(model, names)
    other = run(model, inputs)
    loaded = ak.load(model, tmp_path / "adapter", interface=case.interface)

    assert not torch.equal(other, output)
    assert torch.equal(run(model, inputs), output)
    found = loaded["default"].state_dict()
    assert saved.keys() <= found.keys()
    for key, value in saved.items():
        assert torch.equal(found[key], value) and found[key].dtype == value.dtype, key
    with loaded.disabled():
        assert torch.equal(run(model, inputs), other), "the model's own head was written"


def test_a_head_that_a_base_checkpoint_lacks_is_in_the_file(headed_case: Case, tmp_path: Path) -> None:
    case = headed_case
    model = case.model()
    outside = {name for name in newly_initialised(case, model) if ".pooler." not in name}
    assert outside
    case.attach(model).save(tmp_path / "adapter")
    found = ak.load(case.model(), tmp_path / "adapter", interface=case.interface)["default"].heads
    names = {f"{address}.{name}" for address, head in found.items() for name, _ in head.named_parameters()}
    assert names == {f"head.{name}" for name in outside}
