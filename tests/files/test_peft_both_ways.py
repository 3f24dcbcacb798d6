"""Adapters of PEFT in adapterkit and the other way: the same outputs, on every row where PEFT can attach."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import adapterkit as ak
from adapterkit.files.peft.names import hosts
from adapterkit.model.resolve import resolve
from tests.files.peft_side import NOISE, loaded_there, run, same, shake, theirs
from tests.models.tiny import ROWS, build, classes

pytestmark = NOISE

ALL = [row for row in ROWS if row != "custom"]
METHODS = ("lora", "dora", "ia3", "vera")
# Conv1D and fused, grouped queries, two stacks, towers, shared layers, two models
SPECIMENS = ("gpt2", "phi3", "t5", "clip", "albert", "encoder_decoder")


def headed(row: str) -> str:
    """A class with a task head, where the row has one."""
    return next((cls for cls in ROWS[row].classes if cls.endswith("Classification")), ROWS[row].classes[0])


def cases() -> list[Any]:
    """(row, class, method): LoRA on all rows and every method on the specimens by default."""
    found = []
    for row in ALL:
        for cls in ROWS[row].classes:
            for method in METHODS:
                default = cls == headed(row) and (method == "lora" or row in SPECIMENS)
                marks = () if default else (pytest.mark.full,)
                found.append(pytest.param(row, cls, method, marks=marks, id=f"{cls}-{method}"))
    return found


def need(row: str, cls: str) -> None:
    """Skip a class that this version of transformers has not got, or not in working order."""
    if cls not in classes(row):
        pytest.skip(f"this version of transformers has no working {cls}")


def their_config(method: str, row: str, cls: str) -> peft.PeftConfig:
    """PEFT's config for every linear map that the interface names, heads trained along."""
    blueprint = resolve(build(row, cls))
    paths = list(hosts(blueprint))
    heads: Any = [head.path for head in blueprint.heads] or None
    if method == "ia3":
        forward = [path for path, slot in hosts(blueprint).items() if slot.role == "down"]
        return peft.IA3Config(target_modules=paths, feedforward_modules=forward, modules_to_save=heads)
    if method == "vera":
        return peft.VeraConfig(r=5, target_modules=paths, modules_to_save=heads)
    return peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=paths, modules_to_save=heads, use_dora=method == "dora"
    )


def our_config(method: str, row: str, cls: str) -> dict[str, Any]:
    """The same choice of modules in adapterkit; roles, and for VeRA no parts of fused matrices."""
    if method == "vera":
        addresses = [slot.address for slot in hosts(resolve(build(row, cls))).values()]
        return {"method": method, "targets": addresses, "r": 5}
    return {"method": method, "targets": "all"} | ({} if method == "ia3" else {"r": 4, "alpha": 6.0})


@pytest.mark.parametrize(("row", "cls", "method"), cases())
def test_an_adapter_of_peft_gives_the_same_outputs(row: str, cls: str, method: str, tmp_path: Path) -> None:
    need(row, cls)
    want = theirs(row, cls, their_config(method, row, cls), tmp_path)
    model = build(row, cls)
    base = run(model, row, cls)
    kit = ak.load(model, tmp_path)
    assert kit["default"].config.method == method
    same(run(model, row, cls), want)
    assert not torch.allclose(base, want, atol=1e-3)


@pytest.mark.parametrize(("row", "cls", "method"), cases())
def test_peft_reads_an_adapter_with_the_same_outputs(row: str, cls: str, method: str, tmp_path: Path) -> None:
    need(row, cls)
    model = build(row, cls)
    base = run(model, row, cls)
    kit = ak.attach(model, our_config(method, row, cls), seed=0)
    shake(p for p in kit["default"].parameters() if p.requires_grad)
    want = run(model, row, cls)
    kit.save(tmp_path / "adapter", format="peft")
    same(loaded_there(row, cls, tmp_path / "adapter"), want)
    assert not torch.allclose(base, want, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_written_and_read_again_gives_the_same_bits(method: str, tmp_path: Path) -> None:
    row, cls = "bert", "BertForSequenceClassification"
    kit = ak.attach(build(row, cls), our_config(method, row, cls), seed=0)
    shake(p for p in kit["default"].parameters() if p.requires_grad)
    kit.save(tmp_path / "adapter", format="peft")
    back = ak.load(build(row, cls), tmp_path / "adapter")["default"].state_dict()
    own = kit["default"].state_dict()
    assert {key for key in back if ".pooler." not in key} == own.keys()
    assert all(torch.equal(own[key], back[key]) for key in own)


def test_a_torch_file_is_read_when_it_is_allowed(tmp_path: Path) -> None:
    model = peft.get_peft_model(build("bert"), their_config("lora", "bert", "BertModel"))
    shake(p for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert not (tmp_path / "adapter_model.safetensors").exists()
    with pytest.raises(ak.errors.FileFormatError) as caught:
        ak.load(build("bert"), tmp_path)
    assert caught.value.code == "bin-file"
    fresh = build("bert")
    ak.load(fresh, tmp_path, allow_bin=True)
    same(run(fresh, "bert"), run(model, "bert"))
