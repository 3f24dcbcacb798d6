"""Heads: each adapter owns its copy, the model's own is never written, none is ever left at random."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import TapasConfig, TapasForQuestionAnswering

import adapterkit as ak
from adapterkit.errors import FileFormatError, PlanError
from adapterkit.model.heads import find_heads, find_loose
from tests.laws.matrix import CUSTOM
from tests.models import tiny
from tests.models.custom import TinyClassifier
from tests.unit.kit_scene import CLS, bert, move, refused, run

LABELS = tiny.inputs("bert", CLS, labels=True)


def head_of(model: nn.Module) -> dict[str, Tensor]:
    """The model's own head."""
    return {
        key: value.clone()
        for key, value in model.state_dict().items()
        if key.startswith("classifier.") and ".adapterkit." not in key
    }


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def step(kit: ak.Kit, name: str) -> None:
    """One step of training."""
    kit.activate(name)
    optimizer = torch.optim.SGD(kit[name].parameters(), lr=0.5)
    kit.model(**LABELS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_each_adapter_trains_its_own_copy_of_the_head() -> None:
    kit = ak.attach(bert(), "lora", name="a").attach("lora", name="b")
    before, output = head_of(kit.model), run(bert())
    assert all(
        torch.equal(kit[name].heads["head.classifier"].weight, before["classifier.weight"]) for name in "ab"
    )
    step(kit, "a")
    step(kit, "a")
    step(kit, "b")
    assert same(head_of(kit.model), before)
    own = {name: kit[name].heads["head.classifier"].weight for name in "ab"}
    assert not torch.equal(own["a"], own["b"])
    assert not any(torch.equal(weight, before["classifier.weight"]) for weight in own.values())
    with kit.disabled():
        assert torch.equal(run(kit.model), output)
    kit.detach()
    assert torch.equal(run(kit.model), output)


def test_using_switches_the_head() -> None:
    kit = ak.attach(bert(), "lora", name="a").attach("lora", name="b").attach("lora", name="c", head=False)
    outputs = {}
    for value, name in enumerate("ab", start=1):
        head = kit[name].heads["head.classifier"]
        nn.init.zeros_(head.weight)
        nn.init.constant_(head.bias, value)
        with kit.using(name):
            outputs[name] = run(kit.model)
    assert (outputs["a"] == 1).all()
    assert (outputs["b"] == 2).all()
    assert kit["c"].heads == {}
    kit.activate("c")
    assert torch.equal(run(kit.model), run(bert()))


def test_a_head_of_several_modules_and_the_path_to_the_vocabulary() -> None:
    roberta = ak.attach(tiny.build("roberta", "RobertaForSequenceClassification"), "lora")["default"]
    assert list(roberta.heads) == ["head.classifier"]
    assert {name for name, _ in roberta.heads["head.classifier"].named_parameters()} == {
        "dense.weight",
        "dense.bias",
        "out_proj.weight",
        "out_proj.bias",
    }
    for row, cls in (("bert", "BertForMaskedLM"), ("llama", "LlamaForCausalLM"), ("bert", "BertModel")):
        model = tiny.build(row, cls)
        assert ak.plan(model, "lora").heads == ()
        assert ak.plan(model, "lora", head=False).heads == ()
        refused(PlanError, "no-head", ak.attach, model, "lora", head=True)


def test_saved_heads_and_poolers_come_back_into_a_newly_initialised_model(tmp_path: Path) -> None:
    kit = ak.attach(bert(), "lora", name="a")
    output = move(kit, "a")
    kit.save(tmp_path / "a")
    model = bert()
    for module in (model.classifier, model.bert.pooler.dense):
        nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(9))
    own, plain = {key: value.clone() for key, value in model.state_dict().items()}, run(model)
    loaded = ak.load(model, tmp_path / "a")
    assert torch.equal(run(model), output)
    assert list(loaded["a"].poolers) == ["encoder.pooler"]
    assert not any(
        tensor.requires_grad for tensor in loaded.train()["a"].poolers["encoder.pooler"].parameters()
    )
    with loaded.disabled():
        assert torch.equal(run(model), plain)
    loaded.detach()
    assert same(own, model.state_dict())
    assert ak.load(bert(), tmp_path / "a")["a"].poolers == {}


def test_merge_and_detach_keeps_the_head_and_the_pooler_of_the_adapter(tmp_path: Path) -> None:
    kit = ak.attach(bert(), "lora", name="a")
    output = move(kit, "a")
    kit.save(tmp_path / "a")
    model = bert()
    nn.init.normal_(model.bert.pooler.dense.weight, generator=torch.Generator().manual_seed(9))
    model = ak.load(model, tmp_path / "a").merge_and_detach("a")
    torch.testing.assert_close(run(model), output, rtol=1e-5, atol=1e-6)
    assert same(
        {"classifier.weight": kit["a"].heads["head.classifier"].weight},
        dict(list(head_of(model).items())[:1]),
    )


def test_running_statistics_of_a_head_stay_when_it_is_merged() -> None:
    """They are no parameters, but the head computes with them."""
    cls = "BeitForSemanticSegmentation"
    model = tiny.build("beit", cls)
    kit = ak.attach(model, "lora")
    model.train()
    with torch.no_grad():
        model(**tiny.inputs("beit", cls))
    before = run(model.eval(), "beit", cls)
    with kit.disabled():
        assert not torch.allclose(run(model, "beit", cls), before, atol=1e-2)
    assert torch.equal(run(kit.merge_and_detach("default"), "beit", cls), before)


def test_a_head_with_another_number_of_labels_is_refused(tmp_path: Path) -> None:
    ak.attach(bert(), "lora", name="a").save(tmp_path / "a")
    model = bert(num_labels=5)
    output = run(model)
    error = refused(FileFormatError, "head-shape", ak.load, model, tmp_path / "a")
    assert {problem.code for problem in error.problems} == {"other-shape", "head-shape"}
    assert "or head=False" in str(error)
    assert torch.equal(run(model), output)
    refused(ak.errors.NotAttachedError, "not-attached", ak.of, model)
    assert ak.load(model, tmp_path / "a", head=False)["a"].heads == {}


@pytest.mark.parametrize(
    ("saved", "loaded", "code"),
    [
        (CLS, "BertModel", "head-unknown"),
        ("BertModel", CLS, "head-missing"),
        (CLS, "BertForQuestionAnswering", None),
    ],
)
def test_a_file_with_other_heads_than_the_model_is_refused(
    tmp_path: Path, saved: str, loaded: str, code: str | None
) -> None:
    kit = ak.attach(bert(saved), "lora", name="a")
    kit.save(tmp_path / "a")
    model = bert(loaded)
    with pytest.raises(FileFormatError) as caught:
        ak.load(model, tmp_path / "a")
    assert {problem.code for problem in caught.value.problems} == (
        {code} if code else {"head-unknown", "head-missing"}
    )
    assert "head=False" in str(caught.value)
    found = ak.load(model, tmp_path / "a", head=False)["a"].state_dict()
    assert found
    assert all(torch.equal(value, kit["a"].state_dict()[key]) for key, value in found.items())


def test_a_head_can_be_left_out_of_the_file(tmp_path: Path) -> None:
    kit = ak.attach(bert(), "lora", name="a")
    kit.save(tmp_path / "a", head=False)
    error = refused(FileFormatError, "head-missing", ak.load, bert(), tmp_path / "a")
    assert "the model has a head 'classifier' that the file lacks" in str(error)
    loaded = ak.load(bert(), tmp_path / "a", head=False)
    assert loaded["a"].heads == {} and loaded["a"].poolers == {}


class Chained(TinyClassifier):
    """A classifier whose head is a chain that calls one of its members twice."""

    def __init__(self) -> None:
        super().__init__()
        again = nn.Linear(3, 3)
        self.head = nn.Sequential(nn.Linear(32, 3), again, again)


def test_a_head_that_is_a_sequential_runs_its_own_members_only() -> None:
    model, inputs = Chained(), tiny.inputs("custom")

    def logits() -> Tensor:
        with torch.no_grad():
            return model(**inputs)["logits"]

    before = logits()
    kit = ak.attach(model, "lora", interface=CUSTOM)
    assert torch.equal(logits(), before)
    assert [type(layer) for layer in model.head] == [nn.Linear] * 3
    assert model.head[-1] is model.head[1] and len(model.head[:2]) == 2
    with torch.no_grad():
        for tensor in kit["default"].heads["head.head"].parameters():
            tensor.zero_()
    assert not logits().any()
    with kit.disabled():
        assert torch.equal(logits(), before)
    kit.detach()
    assert type(model.head) is nn.Sequential
    assert torch.equal(logits(), before)


def test_weights_of_a_head_that_are_in_no_module_are_refused(tmp_path: Path) -> None:
    """They are random in a new model: without a word, an adapter would come back to other ones."""
    sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    config = TapasConfig(**sizes, intermediate_size=48, max_position_embeddings=64)
    model = TapasForQuestionAnswering(config)
    refused(PlanError, "loose-head", ak.attach, model, "lora")
    refused(PlanError, "loose-head", ak.plan, model, "lora", head=True)
    kit = ak.attach(model, "lora", head=False)
    assert len(kit["default"].plan.slots) == 2
    kit.save(tmp_path)
    refused(PlanError, "loose-head", ak.load, TapasForQuestionAnswering(config), tmp_path)
    assert list(ak.load(TapasForQuestionAnswering(config), tmp_path, head=False)) == ["default"]
    assert ak.attach(tiny.build("clip", "CLIPModel"), "lora")[
        "default"
    ].heads  # a base with a scale of its own


def test_a_list_of_heads_is_a_head_for_each_member() -> None:
    model = nn.Module()
    model.base, model.scores, model.empty = nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2)]), nn.ModuleList()
    found = find_heads(model, [model.base], [], [])
    assert [(head.address, head.module) for head in found] == [("head.scores.0", model.scores[0])]


def test_so_they_are_where_the_base_goes_by_another_name() -> None:
    """Whisper's classifier has no base model: the encoder stands beside weights that average its layers."""
    model = tiny.build("whisper", "WhisperForAudioClassification", use_weighted_layer_sum=True)
    assert model.base_model is model
    refused(PlanError, "loose-head", ak.attach, model, "lora")
    kit = ak.attach(model, "lora", head=False)
    assert kit.supports("ia3") and kit.blueprint.loose == ("layer_weights",)


def test_parameters_of_the_base_and_of_heads_that_are_modules_are_not_loose() -> None:
    assert not ak.attach(tiny.build("whisper", "WhisperForAudioClassification"), "lora").blueprint.loose
    clip = ak.attach(tiny.build("clip", "CLIPModel"), "lora")  # its temperature belongs to the base
    assert not clip.blueprint.loose and hasattr(clip.model, "logit_scale")
    inner, outer = nn.Linear(2, 2), nn.Module()
    outer.around, outer.head = nn.Module(), nn.Linear(2, 2)
    outer.around.inner = inner
    outer.scale = outer.around.shift = nn.Parameter(torch.ones(2))
    assert find_loose(outer, [inner]) == ("scale", "around.shift")


def test_a_head_keeps_the_type_of_the_models_own() -> None:
    """It computes with what the model hands it."""
    kit = ak.attach(bert(), "lora")
    expected = move(kit, "default")
    kit.to("default", dtype=torch.float16)
    types = {key.partition(".")[0]: tensor.dtype for key, tensor in kit["default"].named_parameters()}
    assert types == {"encoder": torch.float16, "head": torch.float32}
    torch.testing.assert_close(run(kit.model), expected, rtol=0, atol=1e-3)
