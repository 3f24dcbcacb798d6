"""Hot swap: other weights in place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import adapterkit as ak
from adapterkit.errors import FileFormatError
from tests.models import tiny

ROW, CLS = "bert", "BertForSequenceClassification"


def _randomise(kit: ak.Kit, name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in kit[name].parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def _outputs(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return tiny.output(model(**tiny.inputs(ROW, CLS)))


def test_swapped_weights_act_in_place(tmp_path: Path) -> None:
    model = tiny.build(ROW, CLS)
    kit = ak.attach(model, "lora[r=2]", seed=0)
    _randomise(kit, "default", 1)
    wanted = _outputs(model)
    kit.save(tmp_path / "one")
    _randomise(kit, "default", 2)
    held = list(kit["default"].parameters())
    assert not torch.equal(_outputs(model), wanted)
    kit.swap("default", tmp_path / "one")
    assert torch.equal(_outputs(model), wanted)
    assert all(new is old for new, old in zip(kit["default"].parameters(), held, strict=True))


def _other_pooler() -> torch.nn.Module:
    model = tiny.build(ROW, CLS)
    with torch.no_grad():
        model.bert.pooler.dense.weight.mul_(-2)
    return model


def test_a_pooler_comes_with_the_weights_or_they_are_refused(tmp_path: Path) -> None:
    """The pooler is saved with an adapter: under another one its head would give other numbers."""
    theirs = ak.attach(_other_pooler(), "lora[r=2]", seed=0)
    _randomise(theirs, "default", 1)
    wanted = _outputs(theirs.model)
    theirs.save(tmp_path / "one")
    _randomise(theirs, "default", 2)
    theirs.save(tmp_path / "two")

    kit = ak.attach(tiny.build(ROW, CLS), "lora[r=2]", seed=0)  # on the model's own pooler
    before = _outputs(kit.model)
    with pytest.raises(FileFormatError) as caught:
        kit.swap("default", tmp_path / "one")
    assert caught.value.code == "other-adapter" and caught.value.address == "encoder.pooler"
    assert torch.equal(_outputs(kit.model), before)

    kit = ak.load(tiny.build(ROW, CLS), tmp_path / "two")  # on a pooler of its own
    assert not torch.equal(_outputs(kit.model), wanted)
    kit.swap("default", tmp_path / "one")
    assert torch.equal(_outputs(kit.model), wanted)


@pytest.mark.parametrize(
    ("method", "code"),
    [("lora[r=3]", "other-adapter"), ("ia3", "other-adapter"), ("lora[r=2,targets=[q]]", "other-adapter")],
)
def test_another_adapter_is_refused_and_nothing_changes(tmp_path: Path, method: str, code: str) -> None:
    other = ak.attach(tiny.build(ROW, CLS), method, seed=0)
    other.save(tmp_path / "other")
    model = tiny.build(ROW, CLS)
    kit = ak.attach(model, "lora[r=2]", seed=0)
    _randomise(kit, "default", 1)
    before = _outputs(model)
    with pytest.raises(FileFormatError) as caught:
        kit.swap("default", tmp_path / "other")
    assert code in {problem.code for problem in caught.value.problems}
    assert torch.equal(_outputs(model), before)
