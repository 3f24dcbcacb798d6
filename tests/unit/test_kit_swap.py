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
