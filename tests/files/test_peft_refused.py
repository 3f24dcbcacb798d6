"""What cannot be reproduced is refused with a code, on reading and on writing, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import adapterkit as ak
from adapterkit.errors import FileFormatError
from adapterkit.spec.registry import by_name
from tests.files.peft_side import NOISE, codes, edit, put, run, said, same, tensors, theirs
from tests.models.tiny import build

pytestmark = NOISE

HEADED = "BertForSequenceClassification"
LORA = {"target_modules": ["query", "value"]}


def refused(directory: Path, row: str = "bert", cls: str | None = None, **options: Any) -> FileFormatError:
    """The error of loading a directory, which leaves the model as it was."""
    model = build(row, cls)
    before = run(model, row, cls)
    with pytest.raises(FileFormatError) as caught:
        ak.load(model, directory, **options)
    assert torch.equal(run(model, row, cls), before)
    assert not any(".adapterkit." in key for key in model.state_dict())
    return caught.value


# -- fields

FIELDS: dict[str, tuple[str, Any]] = {
    "bias": ("peft-bias", "all"),
    "lora_bias": ("peft-bias", True),
    "init_lora_weights": ("peft-init", "pissa"),
    "layer_replication": ("peft-layers", [[0, 2], [1, 2]]),
    "trainable_token_indices": ("peft-tokens", [1, 2]),
    "ensure_weight_tying": ("peft-tokens", True),
    "target_parameters": ("peft-parameters", ["experts.weight"]),
    "megatron_config": ("peft-megatron", {"hidden_size": 8}),
    "alora_invocation_tokens": ("peft-alora", [7]),
    "use_qalora": ("peft-variant", True),
    "use_bdlora": ("peft-variant", {"nblocks": 2}),
    "arrow_config": ("peft-variant", {"top_k": 3}),
    "kasa_config": ("peft-variant", {"beta": 0.1}),
    "velora_config": ("peft-variant", {"scale": 1.0}),
    "monteclora_config": ("peft-variant", {"num_samples": 4}),
    "a_field_of_tomorrow": ("peft-field", 1),
    "r": ("bad-file", "eight"),
    "lora_alpha": ("bad-file", None),
    "rank_pattern": ("bad-file", ["q"]),
    "target_modules": ("bad-file", "(query"),
    "peft_type": ("peft-type", "ADALORA"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain LoRA of PEFT on BERT."""
    directory = tmp_path_factory.mktemp("plain")
    theirs("bert", None, peft.LoraConfig(**LORA), directory)
    return directory


@pytest.fixture
def copied(plain: Path, tmp_path: Path) -> Path:
    for file in plain.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.mark.parametrize(("field", "code", "value"), [(field, *rest) for field, rest in FIELDS.items()])
def test_a_field_that_cannot_be_honoured(field: str, code: str, value: Any, copied: Path) -> None:
    edit(copied, **{field: value})
    error = refused(copied)
    assert error.code == code
    assert field in str(error)


def test_prefixes_of_peft(tmp_path: Path) -> None:
    """Not the same numbers here: see `docs/errors.md`."""
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    peft.get_peft_model(build("llama", "LlamaForCausalLM"), config).save_pretrained(tmp_path / "theirs")
    assert codes(refused(tmp_path / "theirs", "llama", "LlamaForCausalLM")) == {"peft-prompt"}


def test_empty_fields_of_other_versions_say_nothing(copied: Path) -> None:
    edit(copied, of_yesterday=None, of_tomorrow=False, of_both={}, bias="none", rank_pattern=None)
    ak.load(build("bert"), copied)


def test_all_problems_are_reported_at_once(copied: Path) -> None:
    edit(copied, bias="lora_only", use_qalora=True, news=3)
    assert codes(refused(copied)) == {"peft-bias", "peft-variant", "peft-field"}


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "new"])
def test_a_start_that_changed_the_base_model(start: str, copied: Path) -> None:
    edit(copied, init_lora_weights=start)
    error = refused(copied)
    assert error.code == "peft-init" and "path_initial_model_for_weight_conversion" in str(error)


# -- tensors

Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]
MODEL = "base_model.model"
Q = f"{MODEL}.encoder.layer.0.attention.self.query"
WORDS = f"{MODEL}.embeddings.word_embeddings"


def without(ending: str) -> Change:
    return lambda named: {key: value for key, value in named.items() if not key.endswith(ending)}


def plus(key: str, *shape: int) -> Change:
    return lambda named: named | {key: torch.ones(shape)}


def renamed(old: str, new: str) -> Change:
    return lambda named: {key.replace(old, new): value for key, value in named.items()}


def doubled(named: dict[str, Tensor]) -> dict[str, Tensor]:
    return named | {key.replace("model.encoder", "model.bert.encoder"): v.clone() for key, v in named.items()}


TENSORS: dict[str, tuple[str, Change]] = {
    "a tensor lacks": ("missing-tensors", without("layer.0.attention.self.query.lora_B.weight")),
    "a module lacks": ("missing-tensors", lambda n: {k: v for k, v in n.items() if not k.startswith(Q)}),
    "another rank": ("other-shape", plus(f"{Q}.lora_A.weight", 3, 32)),
    "another width": ("other-shape", plus(f"{Q}.lora_A.weight", 8, 33)),
    "a tensor of nothing": ("unknown-tensors", plus(f"{WORDS}.weight", 64, 32)),
    "a magnitude without DoRA": ("unknown-tensors", plus(f"{Q}.lora_magnitude_vector", 32)),
    "a module that is not there": ("no-such-slot", renamed("layer.1.", "layer.2.")),
    "a module that is no slot": ("no-such-slot", renamed("layer.0.attention.self.query", "pooler.dense")),
    "a module that the config does not name": ("peft-unmatched", renamed("self.query", "self.key")),
    "an update of an embedding": ("peft-embedding", plus(f"{WORDS}.lora_embedding_A", 8, 64)),
    "a bias of an update": ("peft-bias", plus(f"{Q}.lora_B.bias", 32)),
    "a module under two names": ("peft-ambiguous", doubled),
    "no adapter at all": ("bad-file", lambda n: {f"{WORDS}.weight": torch.ones(2)}),
}


@pytest.mark.parametrize(("code", "change"), TENSORS.values(), ids=TENSORS)
def test_tensors_that_do_not_fit(code: str, change: Change, copied: Path) -> None:
    put(copied, change(tensors(copied)))
    assert code in codes(refused(copied))


def test_dora_without_its_magnitudes(copied: Path) -> None:
    edit(copied, use_dora=True)
    assert codes(refused(copied)) == {"missing-tensors"}


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_damaged_files(name: str, copied: Path) -> None:
    (copied / name).write_bytes((copied / name).read_bytes()[:40])
    assert refused(copied).code == "bad-file"


def test_missing_tensors_file(copied: Path) -> None:
    (copied / "adapter_model.safetensors").unlink()
    assert refused(copied).code == refused(copied, allow_bin=True).code == "bad-file"


def test_a_tower_that_the_names_do_not_tell_apart(tmp_path: Path) -> None:
    """A file of a text tower alone says `encoder.layers.0...`; a model of both towers has that twice."""
    theirs("clip", "CLIPModel", peft.LoraConfig(target_modules=["q_proj"]), tmp_path)
    put(
        tmp_path,
        {k.replace("text_model.", ""): v for k, v in tensors(tmp_path).items() if "text_model" in k},
    )
    assert codes(refused(tmp_path, "clip", "CLIPModel")) == {"peft-ambiguous"}


def test_ia3_on_the_side_that_the_config_does_not_say(tmp_path: Path) -> None:
    config = peft.IA3Config(target_modules=["query", "output.dense"], feedforward_modules=["output.dense"])
    theirs("bert", None, config, tmp_path)
    edit(tmp_path, feedforward_modules=["query"])
    assert codes(refused(tmp_path)) == {"other-shape"}


@pytest.mark.filterwarnings("ignore:Specified to not save vera_A and vera_B:UserWarning")
def test_vera_without_its_frozen_matrices(tmp_path: Path) -> None:
    config = peft.VeraConfig(r=4, target_modules=["query"], save_projection=False)
    theirs("bert", None, config, tmp_path)
    error = refused(tmp_path)
    assert error.code == "peft-projection" and "save_projection=True" in str(error)


def test_vera_with_its_frozen_matrices_whatever_the_config_says(tmp_path: Path) -> None:
    want = theirs("bert", None, peft.VeraConfig(r=4, target_modules=["query"]), tmp_path)
    edit(tmp_path, save_projection=False)
    model = build("bert")
    ak.load(model, tmp_path)
    same(run(model, "bert"), want)


def test_an_interface_that_does_not_know_the_names(copied: Path) -> None:
    silent = by_name("bert").model_copy(update={"peft": None})
    assert refused(copied, interface=silent).code == "peft-names"
    kit = ak.attach(build("bert"), "lora", interface=silent)
    with pytest.raises(FileFormatError) as caught:
        kit.save(copied / "written", format="peft")
    assert caught.value.code == "peft-names"


# -- heads


def test_a_head_that_the_file_lacks(tmp_path: Path) -> None:
    theirs("bert", HEADED, peft.LoraConfig(**LORA), tmp_path)
    assert codes(refused(tmp_path, cls=HEADED)) == {"head-missing"}


def test_modules_to_save_that_are_no_heads(tmp_path: Path) -> None:
    theirs("bert", None, peft.LoraConfig(**LORA, modules_to_save=["intermediate.dense"]), tmp_path)
    assert codes(refused(tmp_path)) == {"peft-modules"}


def test_a_module_to_save_without_tensors(tmp_path: Path) -> None:
    theirs("bert", HEADED, peft.LoraConfig(**LORA), tmp_path)
    edit(tmp_path, modules_to_save=["classifier"])
    assert codes(refused(tmp_path, cls=HEADED)) == {"missing-tensors"}


# -- writing

UNSAID: dict[str, tuple[str, str, Any]] = {
    "a gate": ("peft-gating", "bert", ak.LoRAConfig(gating=True)),
    "a gate of IA3": ("peft-gating", "bert", ak.IA3Config(gating=True)),
    "a factor of IA3": ("peft-option", "bert", ak.IA3Config(alpha=2.0)),
    "a scale of VeRA": ("peft-option", "bert", ak.VeRAConfig(r=4, alpha=2.0)),
    "VeRA on a role of a fused matrix": ("peft-rows", "gpt2", ak.VeRAConfig(r=4)),
    "an unscaled norm": ("peft-option", "bert", ak.DoRAConfig(norm_scaled=False)),
    "a scaled bias": ("peft-option", "bert", ak.DoRAConfig(scale_bias=True)),
    "DoRA of a fused matrix and of a role": ("peft-both", "gpt2", ak.DoRAConfig(targets=("fused", "q"), r=4)),
    "IA3 of an input and a role": (
        "peft-both",
        "gpt2",
        ak.IA3Config(targets=("fused", "k"), sides={"fused": "input"}),
    ),
    "DVoRA": ("peft-method", "bert", "dvora[r=4]"),
    "MTL-LoRA": ("peft-method", "bert", "mtl_lora"),
    "a prefix": ("peft-prompt", "llama", "prefix_tuning_flat"),
    "a prompt": ("peft-prompt", "llama", "prompt_tuning"),
}


@pytest.mark.parametrize(("code", "row", "method"), UNSAID.values(), ids=UNSAID)
def test_what_peft_cannot_say(code: str, row: str, method: Any, tmp_path: Path) -> None:
    kit = ak.attach(build(row), method)
    with pytest.raises(FileFormatError) as caught:
        kit.save(tmp_path / "adapter", format="peft")
    assert codes(caught.value) == {code}
    assert not (tmp_path / "adapter").exists()


def test_a_head_whose_name_ends_that_of_another_module(tmp_path: Path) -> None:
    """PEFT would take both for modules to save."""
    model = build("bert", HEADED)
    model.bert.encoder.my_classifier = torch.nn.Linear(2, 2)
    kit = ak.attach(model, "lora")
    with pytest.raises(FileFormatError) as caught:
        kit.save(tmp_path / "adapter", format="peft")
    assert caught.value.code == "peft-ambiguous" and "bert.encoder.my_classifier" in str(caught.value)
    kit.save(tmp_path / "adapter", format="peft", head=False)
    assert said(tmp_path / "adapter")["modules_to_save"] is None


def test_an_unscaled_norm_says_the_same_where_there_is_no_bias(tmp_path: Path) -> None:
    """LLaMA has no biases, so that nothing depends on whether they are scaled."""
    kit = ak.attach(build("llama"), ak.DoRAConfig(scale_bias=True))
    kit.save(tmp_path / "adapter", format="peft")
    assert said(tmp_path / "adapter")["use_dora"] is True
