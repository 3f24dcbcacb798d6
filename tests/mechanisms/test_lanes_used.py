"""Many adapters in one batch, as they are used: generating, and in the stock Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import adapterkit as ak
from adapterkit.composition import Setup
from adapterkit.errors import CompositionError
from tests.mechanisms.scene import attach
from tests.models import tiny
from tests.models.further import build
from tests.unit.kit_scene import refused

NEW = 5
GREEDY: dict[str, Any] = {"do_sample": False}
BEAMS: dict[str, Any] = {"do_sample": False, "num_beams": 3}
CLASSES = {
    "llama": "LlamaForCausalLM",
    "t5": "T5ForConditionalGeneration",
    "gpt2": "GPT2LMHeadModel",
    "whisper": "WhisperForConditionalGeneration",
}
rows = pytest.mark.parametrize(
    "row", ["llama", "t5", *(pytest.param(row, marks=pytest.mark.full) for row in ("gpt2", "whisper"))]
)


def scene(row: str) -> tuple[nn.Module, ak.Kit, dict[str, Tensor]]:
    model = tiny.build(row, CLASSES[row])
    model.generation_config.eos_token_id = None  # so that all are as long as each other
    for seed, method in enumerate(
        ("lora[r=4]", "seq_bn[reduction_factor=4]", "prefix_tuning_flat[prefix_length=3]")
    ):
        kit = attach(model, method, "abc"[seed], seed=seed, activate=False)
    given = tiny.inputs(row, CLASSES[row], batch=3)
    return model, kit, {key: value for key, value in given.items() if not key.startswith("decoder_")}


def generated(
    kit: ak.Kit, given: dict[str, Tensor], setup: Setup | None, options: Any, **more: Any
) -> Tensor:
    with kit.using(setup, **more):
        found: Tensor = kit.generate(**given, max_new_tokens=NEW, min_new_tokens=NEW, **options)
    return found


@rows
@pytest.mark.parametrize(
    "options", [GREEDY, BEAMS, {**GREEDY, "use_cache": False}], ids=["greedy", "beams", "no cache"]
)
def test_generating_with_several_adapters(row: str, options: dict[str, Any]) -> None:
    _, kit, given = scene(row)
    alone = {name: generated(kit, given, name, options) for name in "abc"}
    assert not torch.equal(alone["a"], alone["b"]) and not torch.equal(alone["b"], alone["c"])
    assert torch.equal(
        generated(kit, given, ak.Parallel("a", "c"), options), torch.cat([alone["a"], alone["c"]])
    )
    found = generated(kit, given, ak.BatchSplit("b", "a", batch_sizes=[1, 2]), options)
    assert torch.equal(found, torch.cat([alone["b"][:1], alone["a"][1:]]))
    found = generated(kit, given, ak.Route("a", "b", "c"), options, rows=["c", None, "b"])
    base = generated(kit, given, None, options)
    assert torch.equal(found, torch.stack([alone["c"][0], base[1], alone["b"][2]]))
    assert kit._runtime.override.flow.keys().isdisjoint({"#generate", "#batch", "#rows", "#tasks", "#picks"})


@rows
def test_sampling_with_a_seed(row: str) -> None:
    """The same numbers are drawn as for the batch that is repeated by hand."""
    _, kit, given = scene(row)
    options = {"do_sample": True, "top_k": 0}
    twice = {key: torch.cat([value, value]) for key, value in given.items()}
    torch.manual_seed(5)
    expected = generated(kit, twice, "b", options)
    torch.manual_seed(5)
    assert torch.equal(generated(kit, given, ak.Parallel("b", ak.Stack("b")), options), expected)
    torch.manual_seed(5)
    assert torch.equal(generated(kit, twice, ak.Route("a", "b"), options, rows=[1] * 6), expected)


@rows
def test_plain_generate_is_refused_where_it_would_be_wrong(row: str) -> None:
    model, kit, given = scene(row)
    with kit.using(ak.Parallel("a", "b")), torch.no_grad():
        code = "cached-parallel" if row in ("llama", "gpt2") else "not-entered"
        assert "kit.generate" in str(
            refused(CompositionError, code, model.generate, **given, max_new_tokens=2)
        )
    with kit.using(ak.Route("a", "b"), rows=[0, 1, 0]), torch.no_grad():
        found = model.generate(**given, max_new_tokens=NEW, min_new_tokens=NEW, **GREEDY)
        assert torch.equal(found, kit.generate(**given, max_new_tokens=NEW, min_new_tokens=NEW, **GREEDY))
        error = refused(
            CompositionError, "batch-mismatch", model.generate, **given, max_new_tokens=2, **BEAMS
        )
    assert row not in ("llama", "gpt2") or "kit.generate" in str(error)


# ------------------------------------------------------------------------------------------------ Trainer


def examples(row: str, column: str) -> list[dict[str, Any]]:
    given = tiny.inputs(row, "BertForSequenceClassification", batch=8, labels=True)
    return [
        {**{key: value[i] for key, value in given.items()}, column: i % 3 - (column == "adapter_rows")}
        for i in range(8)
    ]


@pytest.mark.parametrize("column", ["adapter_rows", "task_ids"])
def test_a_stock_trainer_gives_the_rows_as_a_column(column: str, tmp_path: Path) -> None:
    model = tiny.build("bert", "BertForSequenceClassification")
    for seed, name in enumerate("abc"):
        kit = attach(model, "lora[r=4]", name, seed=seed, activate=False)
    kit.activate(ak.Route("a", "b") if column == "adapter_rows" else ak.MultiTask("a", "b", "c"))
    before = {name: [p.clone() for p in kit[name].parameters()] for name in "abc"}
    settings = {"max_steps": 3, "per_device_train_batch_size": 4, "report_to": [], "use_cpu": True}
    arguments = TrainingArguments(
        str(tmp_path), remove_unused_columns=False, learning_rate=0.05, disable_tqdm=True, **settings
    )
    trainer = Trainer(
        model, arguments, train_dataset=examples("bert", column), eval_dataset=examples("bert", column)
    )
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < start
    changed = {
        name: any(
            not torch.equal(old, new) for old, new in zip(before[name], kit[name].parameters(), strict=True)
        )
        for name in "abc"
    }
    assert changed == {"a": True, "b": True, "c": column == "task_ids"}


def shared_tasks() -> tuple[nn.Module, ak.Kit]:
    """Two tasks of MTL-LoRA with both projections in common."""
    model = tiny.build("bert", "BertForSequenceClassification")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for seed, name in enumerate("ab"):
        kit = attach(model, "mtl_lora[r=3, n_up=2]", name, seed=seed, activate=False)
    kit.share("a", "b").activate(ak.MultiTask("a", "b"))
    return model, kit


def test_a_stock_trainer_trains_tasks_with_shared_parameters(tmp_path: Path) -> None:
    """As steps that are made by hand do; what is shared stays one tensor, and a checkpoint brings it back."""
    column = [{**each, "task_ids": each["task_ids"] % 2} for each in examples("bert", "task_ids")]
    model, kit = shared_tasks()
    settings = {"max_steps": 3, "per_device_train_batch_size": 8, "report_to": [], "use_cpu": True}
    settings |= {"lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0.0, "save_steps": 3}
    arguments = TrainingArguments(
        str(tmp_path), remove_unused_columns=False, learning_rate=0.5, disable_tqdm=True, **settings
    )
    trainer = Trainer(model, arguments, train_dataset=column)
    trainer.train()

    twin, other = shared_tasks()
    optimizer = torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):  # all examples in every step, so that their order does not matter
        optimizer.zero_grad()
        twin(**trainer.data_collator(column)).loss.backward()
        optimizer.step()
    names = [key for key, _ in kit["a"].named_parameters() if key.endswith((".A", ".B"))]
    a, b = dict(kit["a"].named_parameters()), dict(kit["b"].named_parameters())
    assert names and all(a[key] is b[key] for key in names)
    start = dict(shared_tasks()[1]["a"].named_parameters())
    assert all(not torch.equal(a[key], start[key]) for key in names)
    for name in "ab":
        for key, value in other[name].state_dict().items():
            torch.testing.assert_close(kit[name].state_dict()[key], value, rtol=1e-4, atol=1e-5)

    again, third = shared_tasks()
    resumed = Trainer(again, arguments, train_dataset=column)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    a, b = dict(third["a"].named_parameters()), dict(third["b"].named_parameters())
    assert all(a[key] is b[key] for key in names)
    for name in "ab":
        for key, value in kit[name].state_dict().items():
            assert torch.equal(third[name].state_dict()[key], value)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_column_in_a_compiled_model(backend: str) -> None:
    """One graph for all; what names no child is an error there, too."""
    torch._dynamo.reset()
    model = tiny.build("bert", "BertForSequenceClassification")
    for seed, name in enumerate("ab"):
        kit = attach(model, "lora[r=4]", name, seed=seed, activate=False)
    given = tiny.inputs("bert", "BertForSequenceClassification", batch=3)
    kit.activate(ak.Route("a", "b"))
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        for rows in ([1, -1, 0], [0, 0, 1], [-1, -1, -1]):
            column = {"adapter_rows": torch.tensor(rows)}
            found, expected = (tiny.output(called(**given, **column)) for called in (compiled, model))
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        for rows in ([2, 0, 0], [0, -2, 0]):
            with pytest.raises(RuntimeError, match="rows are -1 to 1"):
                compiled(**given, adapter_rows=torch.tensor(rows))
        kit.activate(ak.MultiTask("a", "b"))
        for tasks in ([-1, 0, 0], [0, 2, 0]):
            refused(CompositionError, "unknown-row", model, **given, task_ids=torch.tensor(tasks))
            with pytest.raises(RuntimeError, match="task_ids are 0 to 1"):
                compiled(**given, task_ids=torch.tensor(tasks))
    torch._dynamo.reset()


def test_the_column_is_what_using_says() -> None:
    model = tiny.build("bert")
    for seed, name in enumerate("ab"):
        kit = attach(model, "lora[r=4]", name, seed=seed, activate=False)
    given = tiny.inputs("bert", batch=3)
    kit.activate(ak.Route("a", "b"))
    with torch.no_grad():
        found = tiny.output(model(**given, adapter_rows=torch.tensor([1, -1, 0])))
        refused(CompositionError, "unknown-row", model, **given, adapter_rows=torch.tensor([2, 0, 0]))
        refused(CompositionError, "batch-mismatch", model, **given, adapter_rows=torch.tensor([0, 0]))
        refused(CompositionError, "unknown-row", model, **given, adapter_rows=["a", "b", "a"])
        refused(CompositionError, "unknown-row", model, **given, adapter_rows=torch.tensor([True] * 3))
        with kit.using(ak.Route("a", "b"), rows=["b", None, "a"]):
            assert torch.equal(tiny.output(model(**given)), found)
        for setup in ("a", ak.Parallel("a", "b"), None):
            kit.activate(setup)
            refused(CompositionError, "no-rows", model, **given, adapter_rows=torch.tensor([1, 0, 0]))


# ------------------------------------------------------------------------------- what a model is called with


def test_a_loss_over_the_labels_that_the_trainer_has_counted() -> None:
    """Parallel repeats the labels, so that there are as many more of them; the loss stays the mean."""
    model, kit, given = scene("llama")
    given |= {"labels": given["input_ids"], "num_items_in_batch": torch.tensor(17)}
    with torch.no_grad():
        loss = {}
        for name in "abc":
            with kit.using(name):
                loss[name] = model(**given).loss
        with kit.using(ak.Parallel("a", "b", "c")):
            torch.testing.assert_close(model(**given).loss, sum(loss.values()) / 3)


@pytest.mark.parametrize("kept", [[3], [1, 4, 6]], ids=str)
def test_positions_that_are_kept_are_no_examples(kept: list[int]) -> None:
    model, kit, given = scene("llama")
    size = len(kept)
    given = {key: value[:size] for key, value in given.items()}
    with torch.no_grad():
        with kit.using(ak.Parallel("a", "b")):
            whole = model(**given).logits
            found = model(**given, logits_to_keep=torch.tensor(kept)).logits
    torch.testing.assert_close(found, whole[:, kept], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", ["qwen2_vl", "llava"])
def test_examples_with_any_number_of_images(model_type: str) -> None:
    """Images of all examples stand one after another; who has which, the tokens say."""
    model, given = build(model_type)
    for seed, name in enumerate("ab"):
        kit = attach(model.requires_grad_(False), "lora[r=4]", name, seed=seed, activate=False)
    token = model.config.image_token_id
    ids = torch.cat([given["input_ids"]] * 2, dim=1)  # each with two images
    plain = int(ids[ids != token][0])
    ids[1, ids.shape[1] // 2 :] = plain  # and one with its first alone
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | {
        key: torch.cat([value, value[: len(value) // 2] * 0.5 if value.is_floating_point() else value[:1]])
        for key, value in given.items()
        if key in ("pixel_values", "image_grid_thw")
    }
    if "image_grid_thw" in given:
        given["mm_token_type_ids"] = (ids == token).long()

    def run(setup: Setup | None, **more: Any) -> Tensor:
        with torch.no_grad(), kit.using(setup, **more):
            found: Tensor = model(**given).last_hidden_state
        return found

    a, b, none = run("a"), run("b"), run(None)
    assert not torch.allclose(a, b, atol=1e-2)
    for setup, more, expected in (
        (ak.Route("a", "b"), {"rows": ["b", None]}, [b[:1], none[1:]]),
        (ak.MultiTask("a", "b"), {"task_ids": [1, 0]}, [b[:1], a[1:]]),
        (ak.BatchSplit("a", "b", batch_sizes=1), {}, [a[:1], b[1:]]),
        (ak.Parallel("a", "b"), {}, [a, b]),
    ):
        torch.testing.assert_close(run(setup, **more), torch.cat(expected), rtol=1e-5, atol=1e-5)
    kit.attach("lora[targets=[vision/vision.0.mlp.up]]", name="c", activate=False)
    code = "no-batch-axis" if model_type == "qwen2_vl" else "batch-mismatch"
    refused(CompositionError, code, run, ak.Route("a", "c"), rows=["c", "a"])
