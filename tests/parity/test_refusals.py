"""Every reason to refuse a file of AdapterHub; the files are recorded ones, edited."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import adapterkit as ak
from adapterkit.errors import FileFormatError
from tests.models import tiny
from tests.parity.compare import base
from tests.parity.editing import Tensors, edited, without
from tests.parity.recordings import COMPACT, Case

BERT = Case(COMPACT, "bert", "BertModel", "lora_all")
VERA = Case(COMPACT, "bert", "BertModel", "vera")
Q = "encoder.layer.0.attention.self.query.loras.a"


def refused(model: nn.Module, directory: Path, **options: Any) -> FileFormatError:
    """The error of loading, after which nothing of it is in the model."""
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(FileFormatError) as caught:
        ak.load(model, directory, **{"head": False, **options})
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert all(problem.file for problem in caught.value.problems)
    return caught.value


# ---------------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ({"architecture": "soft_prefix"}, "unsupported-method"),
        ({"rank": 8}, "unknown-option"),
        ({"r": "many"}, "bad-option"),
        ({"attn_matrices": ["q", "z"]}, "bad-option"),
        ({"use_dora": True, "use_gating": True}, "unsupported-option"),
        ({"vera_d": 0.1, "vera_b": 0.0, "use_gating": True}, "unsupported-option"),
        ({"composition_mode": "scale", "use_dora": True}, "unsupported-option"),
        ({"architecture": "mtl_lora", "task_specific_matrix_type": "linear"}, "unsupported-option"),
        ({"attn_matrices": ["o"], "intermediate_lora": False, "output_lora": False}, "empty-adapter"),
    ],
)
def test_options_that_are_refused(config: dict[str, Any], code: str, tmp_path: Path) -> None:
    directory = edited(BERT, tmp_path, config=config, tensors=lambda _: {})
    assert refused(tiny.build("bert", "BertModel"), directory).code == code


def test_an_adapter_of_another_family_is_refused(tmp_path: Path) -> None:
    directory = edited(BERT, tmp_path, model_type="roberta")
    assert refused(tiny.build("bert", "BertModel"), directory).code == "other-model"


def test_a_family_that_adapterhub_has_not_got(tmp_path: Path) -> None:
    directory = edited(BERT, tmp_path, model_type="phi3")
    assert refused(tiny.build("phi3", "Phi3Model"), directory).code == "not-in-adapterhub"


@pytest.mark.parametrize("option", [{"pre_norm": True}, {"ln_before_adapter": False}])
def test_a_model_whose_own_adapters_leave_more_behind_than_a_norm(
    option: dict[str, bool], tmp_path: Path
) -> None:
    case = Case(COMPACT, "xmod", "XmodModel", "lora_all")
    error = refused(tiny.build("xmod", "XmodModel", **option), edited(case, tmp_path))
    assert error.code == "not-reproducible"
    assert error.address in option


@pytest.mark.parametrize(("count", "fits"), [(5, True), (6, False)])
def test_positions_that_one_of_two_towers_lacks(count: int, fits: bool, tmp_path: Path) -> None:
    """Their library edits as many tokens of a text as an image has patches, and one."""
    case = Case(COMPACT, "clip", "CLIPModel", "loreft")
    model, directory = base(case, "eager"), edited(case, tmp_path, config={"prefix_positions": count})
    if fits:
        assert ak.load(model, directory, head=False)["a"].config.prefix_positions == count
    else:
        error = refused(model, directory)
        assert (error.code, error.address) == ("not-reproducible", "prefix_positions")


# ---------------------------------------------------------------------------------------------- tensors


def added(key: str) -> Callable[[Tensors], Tensors]:
    """One tensor more."""
    return lambda tensors: {**tensors, key: tensors[f"{Q}.lora_A"]}


@pytest.mark.parametrize(
    ("change", "code", "key"),
    [
        (added("encoder.layer.7.output.dense.loras.a.lora_A"), "unknown-tensors", "layer.7"),
        (added("encoder.layer.0.output.dense.weight"), "unknown-tensors", "output.dense.weight"),
        (added("encoder.layer.0.output.dense.loras.b.lora_A"), "unknown-tensors", "loras.b"),
        (added(f"{Q}.lora_E"), "unknown-tensors", "query.lora_E"),
        (added("shared_parameters.a.lora_A"), "unknown-tensors", "shared_parameters"),
        (added(f"bert.{Q}.lora_A"), "bad-file", "bert.encoder.layer.0.attention.self.query"),
        (without(r"0.attention.self.query.*lora_B"), "missing-tensors", "query.lora_B"),
        (without(r"0.attention.self.query"), "missing-tensors", "query.lora_A"),
        (lambda t: {**t, f"{Q}.lora_A": t[f"{Q}.lora_A"][:2]}, "other-shape", "query.lora_A"),
    ],
)
def test_tensors_that_do_not_fit(
    change: Callable[[Tensors], Tensors], code: str, key: str, tmp_path: Path
) -> None:
    error = refused(tiny.build("bert", "BertModel"), edited(BERT, tmp_path, tensors=change))
    assert {problem.code for problem in error.problems} == {code}
    assert key in str(error)


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    directory = edited(BERT, tmp_path, tensors=without(r"layer\.0"))
    error = refused(tiny.build("bert", "BertModel"), directory)
    assert len(error.problems) == 10
    assert {problem.code for problem in error.problems} == {"missing-tensors"}


def test_a_deeper_model_is_refused(tmp_path: Path) -> None:
    model = tiny.build("bert", "BertModel", num_hidden_layers=3)
    assert refused(model, edited(BERT, tmp_path)).code == "missing-tensors"


def test_torch_files_only_when_allowed(tmp_path: Path) -> None:
    directory = BERT.directory / "adapters" / "a"
    assert (directory / "pytorch_adapter.bin").exists()
    model = base(BERT, "eager")
    assert refused(model, directory).code == "bin-file"
    assert "a" in ak.load(model, directory, head=False, allow_bin=True)


def test_a_directory_without_weights(tmp_path: Path) -> None:
    directory = edited(BERT, tmp_path)
    (directory / "adapter.safetensors").unlink()
    assert refused(tiny.build("bert", "BertModel"), directory).code == "bad-file"


def test_their_heads_are_not_dropped_in_silence(tmp_path: Path) -> None:
    directory = edited(BERT, tmp_path)
    (directory / "head_config.json").write_text("{}", encoding="utf-8")
    model = tiny.build("bert", "BertModel")
    assert refused(model, directory, head="auto").code == "head-unknown"
    assert "a" in ak.load(model, directory, head=False)


def test_a_head_of_the_model_is_not_left_at_random(tmp_path: Path) -> None:
    model = tiny.build("bert", "BertForSequenceClassification")
    assert refused(model, edited(BERT, tmp_path), head="auto").code == "head-missing"


# -------------------------------------------------------------------------------- methods they compute oddly


def test_shared_matrices_that_were_not_saved() -> None:
    directory = VERA.directory / "adapters" / "a"
    assert refused(base(VERA, "eager"), directory, allow_bin=True).code == "shared-not-saved"


def test_shared_matrices_of_another_size(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> Tensors:
        return {**tensors, "shared_parameters.a.lora_A": tensors["shared_parameters.a.lora_A"][:, :16]}

    assert refused(base(VERA, "eager"), edited(VERA, tmp_path, tensors=change)).code == "other-shape"


@pytest.mark.parametrize("name", ["vera_D", "vera_B"])
def test_vera_with_whole_matrices(name: str, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> Tensors:
        tensors[f"{Q}.{name}"][0, 1] = 1e-6
        return tensors

    assert refused(base(VERA, "eager"), edited(VERA, tmp_path, tensors=change)).code == "full-vera"


def test_gates_for_rows_that_are_no_roles(tmp_path: Path) -> None:
    case = Case(COMPACT, "deberta", "DebertaModel", "lora_gating")
    assert refused(base(case, "eager"), edited(case, tmp_path)).code == "gated-blocks"


@pytest.mark.parametrize(
    "option", [{"use_dora": True}, {"vera_d": 0.1, "vera_b": 0.0}, {"architecture": "mtl_lora"}]
)
@pytest.mark.parametrize("fused", [True, False], ids=["attention", "mlp"])
def test_methods_that_fused_or_transposed_matrices_do_not_have(
    option: dict[str, Any], fused: bool, tmp_path: Path
) -> None:
    case = Case(COMPACT, "gpt2", "GPT2Model", "lora_all")
    directory = edited(case, tmp_path, config={**option, "selfattn_lora": fused})
    error = refused(base(case, "eager"), directory)
    # a transposed matrix alone is in the way of DoRA only; for the others the tensors are not theirs
    code = "unsupported-slot" if fused or "use_dora" in option else "missing-tensors"
    assert code in {problem.code for problem in error.problems}


@pytest.mark.parametrize(("word", "case"), [("refused", "lora_all"), ("no_prefix", "prefix_tuning_flat")])
def test_what_an_interface_says_of_their_files(word: str, case: str) -> None:
    interface = {"adapterkit": 1, "like": "bert", "adapterhub": {word: "their library saves other weights"}}
    recorded = Case(COMPACT, "bert", "BertModel", case)
    directory = recorded.directory / "adapters" / "a"
    error = refused(base(recorded, "eager"), directory, interface=interface, allow_bin=True)
    assert error.code == "not-reproducible" and "saves other weights" in str(error)
