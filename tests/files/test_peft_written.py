"""What is written for PEFT says there what it says here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.tuners_utils import check_target_module_exists

import adapterkit as ak
from adapterkit.files.peft.writing import exactly
from tests.files.peft_side import NOISE, edit, loaded_there, run, said, same, shake
from tests.models.tiny import build

pytestmark = NOISE


def write(row: str, cls: str | None, method: Any, directory: Path) -> torch.Tensor:
    """Save a random adapter for PEFT; the output of the model with it."""
    model = build(row, cls)
    kit = ak.attach(model, method, seed=0)
    shake(p for p in kit["default"].parameters() if p.requires_grad)
    kit.save(directory, format="peft")
    return run(model, row, cls)


LORA, DORA, IA3, VERA = ak.LoRAConfig, ak.DoRAConfig, ak.IA3Config, ak.VeRAConfig
WRITTEN: dict[str, tuple[str, Any]] = {
    "rank and alpha by role": (
        "bert",
        LORA(targets=("q", "v", "down"), r={"q": 2, "v": 4, "down": 4}, alpha={"q": 3, "v": 8}),
    ),
    "rank by address": (
        "llama",
        LORA(targets=("q", "up"), r={"q": 2, "decoder.1.attention.q": 5, "up": 3}),
    ),
    "rslora": ("bert", LORA(r={"q": 2, "v": 9}, alpha=7, rslora=True)),
    "layers of two stacks": (
        "t5",
        LORA(targets=("q", "decoder.cross_attention.v"), layers=("decoder.1", "encoder.0")),
    ),
    "roles of a fused matrix": ("gpt2", LORA(targets=("q", "v"), r=3, alpha=5)),
    "roles with own ranks and scales": (
        "phi3",
        LORA(targets=("q", "v", "gate"), r={"q": 2, "v": 4, "gate": 3}, alpha={"q": 4, "v": 1, "gate": 3}),
    ),
    "roles with rslora": ("modernbert", LORA(targets=("k", "v"), r=4, rslora=True)),
    "heads side by side": ("deberta", LORA(targets=("q", "v"), r=3)),
    "a fused matrix and roles of it": ("gpt2", LORA(targets=("fused", "k"), r=4, alpha=9)),
    "PiSSA": ("bert", LORA(r=3, init="pissa", alpha=5)),
    "OLoRA of roles": ("gpt2", LORA(r=3, init="olora", rslora=True)),
    "DoRA of roles": ("gpt2", DORA(targets=("q", "v", "down"), r=3)),
    "DoRA of a fused matrix": ("phi3", DORA(targets=("fused",), r=3)),
    "IA3 of roles": ("gpt2", IA3()),
    "IA3 on unusual sides": (
        "bert",
        IA3(targets=("k", "up", "down"), sides={"k": "input", "down": "output"}),
    ),
    "IA3 with one side in one layer": (
        "bert",
        IA3(targets=("q", "down"), sides={"encoder.1.attention.q": "input"}),
    ),
    "VeRA": ("t5", VERA(targets=("q", "down"), r=6)),
}


@pytest.mark.parametrize(("row", "method"), WRITTEN.values(), ids=WRITTEN)
def test_options_give_the_same_outputs_in_peft(row: str, method: Any, tmp_path: Path) -> None:
    want = write(row, None, method, tmp_path / "adapter")
    same(loaded_there(row, None, tmp_path / "adapter"), want)
    assert not torch.allclose(run(build(row), row), want, atol=1e-3)
    back = build(row)
    ak.load(back, tmp_path / "adapter")
    same(run(back, row), want)


def test_targets_are_whole_paths_and_the_ranks_are_those_of_the_modules(tmp_path: Path) -> None:
    write(
        "llama", None, ak.LoRAConfig(targets=("q",), r={"decoder.0.attention.q": 2, "q": 4}), tmp_path / "a"
    )
    config = said(tmp_path / "a")
    assert config["target_modules"] == ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"]
    ranks = {config["r"]} | set(config["rank_pattern"].values())
    assert ranks == {2, 4}
    assert config["task_type"] is None and config["bias"] == "none"


def test_a_path_that_ends_another_is_written_as_a_pattern(tmp_path: Path) -> None:
    """In EncoderDecoder a path of one part may end a path of the other; PEFT looks at ends."""
    among = ["layer.0.q", "encoder.layer.0.q", "encoder.layer.1.q", "other.q"]
    assert exactly(["encoder.layer.0.q"], among, dotted=True) == ["encoder.layer.0.q"]
    pattern = exactly(["layer.0.q", "encoder.layer.1.q"], among, dotted=True)
    config = peft.LoraConfig(target_modules=pattern)
    assert [p for p in among if check_target_module_exists(config, p)] == ["layer.0.q", "encoder.layer.1.q"]


def test_changed_files_are_read_as_they_are(tmp_path: Path) -> None:
    """The scale is that of the config in the file, not one that was kept elsewhere."""
    write("bert", None, ak.LoRAConfig(r=4, alpha=4), tmp_path / "a")
    edit(tmp_path / "a", lora_alpha=12)
    model = build("bert")
    ak.load(model, tmp_path / "a")
    same(run(model, "bert"), loaded_there("bert", None, tmp_path / "a"))
