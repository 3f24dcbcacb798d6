"""A user of the wheel: imports are typed, commands work, a model is adapted."""

from __future__ import annotations

import pytest

from tests.packaging.conftest import Environment

SCRIPT = """
from torch import nn
import adapterkit as ak


def adapt(model: nn.Module, folder: str) -> nn.Module:
    plan: ak.Plan = ak.plan(model, "lora[r=4]")
    kit: ak.Kit = ak.attach(model, ak.LoRAConfig(r=4, targets=("q", "v")), name="a", seed=0)
    trained: int = kit["a"].num_parameters
    counts: dict[str, int] = plan.counts
    with kit.using("a"), kit.disabled():
        print(trained, counts, kit.active, kit.summary())
    kit.activate("a")
    kit.train("a").freeze("a")
    kit.save(folder, "a")
    try:
        return ak.load(model, folder, name="b").merge_and_detach("b")
    except ak.errors.FileFormatError as error:
        print(error.code, error.problems[0].line)
        return ak.of(model).detach()
"""

WRONG = (
    SCRIPT
    + """

def wrong(model: nn.Module) -> str:
    ak.attach(model, 3)
    return ak.attach(model, "lora")["default"].num_parameters
"""
)

WORK = """
import torch
import adapterkit as ak
from transformers import AutoConfig, AutoModel
tiny = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=99)
model = AutoModel.from_config(AutoConfig.for_model("bert", **tiny)).eval()
kit = ak.attach(model, "lora", seed=0)
print(ak.__file__, kit["default"].num_parameters, kit.verify(input_ids=torch.arange(8).view(2, 4)))
"""


@pytest.mark.full
def test_types_reach_the_user(installed: Environment) -> None:
    """`mypy --strict` accepts a right script and finds both mistakes in a wrong one."""
    (installed.root / "right.py").write_text(SCRIPT, encoding="utf-8")
    (installed.root / "wrong.py").write_text(WRONG, encoding="utf-8")
    assert "Success" in installed.must("-m", "mypy", "--strict", "right.py")
    found = installed.run("-m", "mypy", "--strict", "wrong.py").stdout
    assert found.count("error:") == 2 and "[arg-type]" in found and "[return-value]" in found, found


@pytest.mark.full
def test_commands_that_need_torch(installed: Environment) -> None:
    assert "lora" in installed.must("-m", "adapterkit", "list")
    assert "encoder.attention.q" in installed.must("-m", "adapterkit", "plan", "bert", "lora")


@pytest.mark.full
def test_a_model_is_adapted(installed: Environment) -> None:
    found = installed.must("-c", WORK)
    assert str(installed.root) in found
    assert "2048 all 8 adapter tensors move the output" in found
