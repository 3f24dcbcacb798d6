"""The stock Trainer: training, checkpoints, resuming, the best model, adapters taken out of checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import adapterkit as ak
from tests.mechanisms.scene import run, same, tensors
from tests.models import tiny

CLASSES = {
    "bert": "BertForSequenceClassification",
    "vit": "ViTForImageClassification",  # modules have other names in its checkpoints than in the model
    "gpt2": "GPT2LMHeadModel",
}
STEPS, HALF = 8, 4
rows = pytest.mark.parametrize("row", CLASSES)
# the trainer asks a data loader to pin memory for an accelerator that is not there
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


def examples(row: str) -> list[dict[str, Tensor]]:
    """Sixteen examples with labels."""
    given = tiny.inputs(row, CLASSES[row], batch=16, padded=False, labels=True)
    return [{key: value[i] for key, value in given.items()} for i in range(16)]


def model_for(row: str, method: str, seed: int = 0) -> nn.Module:
    model = tiny.build(row, CLASSES[row])
    ak.attach(model, method, name="a", seed=seed)
    return model


def trainer_for(model: nn.Module, row: str, directory: Path, **options: Any) -> Trainer:
    settings = {
        "max_steps": STEPS,
        "save_steps": HALF,
        "save_strategy": "steps",
        "eval_strategy": "steps",
        "eval_steps": HALF,
        "logging_steps": 1,
        "learning_rate": 0.03,
        "per_device_train_batch_size": 8,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 7,
    }
    arguments = TrainingArguments(str(directory), **settings | options)
    return Trainer(model, arguments, train_dataset=examples(row), eval_dataset=examples(row))


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def stored(directory: Path) -> dict[str, Tensor]:
    """Adapter tensors in a checkpoint, by what follows the mark in their keys."""
    found = load_file(directory / "model.safetensors")
    return {key.rpartition(".adapterkit.")[2]: value for key, value in found.items() if ".adapterkit." in key}


def live(model: nn.Module) -> dict[str, Tensor]:
    found = model.state_dict()
    return {key.rpartition(".adapterkit.")[2]: value for key, value in found.items() if ".adapterkit." in key}


@rows
@pytest.mark.parametrize(
    "method", ["lora[r=4]", pytest.param("vera[r=16,targets=all,d_initial=1]", marks=pytest.mark.full)]
)
def test_train_and_resume(row: str, method: str, tmp_path: Path) -> None:
    model = model_for(row, method)
    base = {key: value.clone() for key, value in model.state_dict().items() if ".adapterkit." not in key}
    whole = trainer_for(model, row, tmp_path / "whole")
    start = whole.evaluate()["eval_loss"]
    whole.train()
    curve = losses(whole)
    assert len(curve) == STEPS and whole.evaluate()["eval_loss"] < 0.98 * start
    assert all(torch.equal(model.state_dict()[key], value) for key, value in base.items())

    checkpoint = tmp_path / "whole" / f"checkpoint-{HALF}"
    again = model_for(row, method, seed=5)  # other weights at first, so that they must come from the file
    assert not same(live(again), stored(checkpoint))
    rest = trainer_for(again, row, tmp_path / "rest")
    rest.train(resume_from_checkpoint=str(checkpoint))
    assert rest.state.global_step == STEPS and losses(rest)[:HALF] == curve[:HALF]
    assert same(tensors(ak.of(again)), tensors(ak.of(model)))


@rows
def test_the_best_model_is_restored(row: str, tmp_path: Path) -> None:
    model = model_for(row, "lora[r=4]")
    # the larger loss counts as the better one, so that the best model is not the last one
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer = trainer_for(model, row, tmp_path, **best)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{HALF}")
    first, last = (stored(tmp_path / f"checkpoint-{step}") for step in (HALF, STEPS))
    assert first.keys() == last.keys() and not same(first, last)
    assert same(live(model), first)
    trainer.save_model(str(tmp_path / "final"))
    assert same(stored(tmp_path / "final"), first)


@rows
@pytest.mark.parametrize(
    "method", ["lora[r=4]", pytest.param("vera[r=16,targets=all,d_initial=1]", marks=pytest.mark.full)]
)
def test_adapters_are_taken_out_of_a_checkpoint(row: str, method: str, tmp_path: Path) -> None:
    given = tiny.inputs(row, CLASSES[row])
    model = model_for(row, method)
    trainer_for(model, row, tmp_path, eval_strategy="no", max_steps=2, save_steps=2).train()
    fresh = tiny.build(row, CLASSES[row])
    before = run(fresh, given)
    kit = ak.load(fresh, tmp_path / "checkpoint-2")
    assert list(kit) == ["a"] and kit.active == "a"
    adapted = run(model.eval(), given)
    assert torch.equal(run(fresh, given), adapted) and not torch.allclose(adapted, before, atol=1e-3)
    ak.load(fresh, tmp_path / "checkpoint-2", name="b")
    kit.activate("b")
    assert torch.equal(run(fresh, given), adapted)


@rows
@pytest.mark.parametrize("size", ["1GB", "20KB"], ids=["one file", "several files"])
def test_save_pretrained(row: str, size: str, tmp_path: Path) -> None:
    given = tiny.inputs(row, CLASSES[row])
    plain = tiny.build(row, CLASSES[row])
    base = run(plain, given)
    plain.save_pretrained(tmp_path / "plain")
    model = model_for(row, "lora[r=4]")
    with torch.no_grad():
        for parameter in ak.of(model)["a"].parameters():
            parameter.add_(0.1)
    model.save_pretrained(tmp_path / "adapted", max_shard_size=size)
    assert (tmp_path / "adapted" / "model.safetensors.index.json").exists() == (size == "20KB")
    again = type(plain).from_pretrained(tmp_path / "adapted")
    assert torch.equal(run(again, given), base)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("plain", "adapted")]
    assert configs[0] == configs[1]
    ak.load(again, tmp_path / "adapted")
    assert torch.equal(run(again, given), run(model, given))


def test_checkpointing_in_the_trainer(tmp_path: Path) -> None:
    """The same weights as without, since the same gradients."""
    fields = TrainingArguments.__dataclass_fields__
    word = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"
    kinds: dict[str, dict[str, Any]] = {"plain": {}}
    for reentrant in (True, False):
        kinds[str(reentrant)] = {word: True, f"{word}_kwargs": {"use_reentrant": reentrant}}
    found = {}
    for kind, options in kinds.items():
        model = model_for("bert", "lora[r=4]")
        settings = {"eval_strategy": "no", "save_strategy": "no", "max_steps": 3}
        trainer_for(model, "bert", tmp_path / kind, **settings | options).train()
        found[kind] = tensors(ak.of(model))
    for kind in ("True", "False"):
        for key, value in found["plain"].items():
            assert torch.allclose(found[kind][key], value, atol=1e-5), (kind, key)
