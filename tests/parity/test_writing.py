"""Adapters written for AdapterHub's library: as it would write them, and read again as the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import adapterkit as ak
from adapterkit.errors import FileFormatError
from tests.models import tiny
from tests.parity.compare import adapter_directory, base, loaded, stored
from tests.parity.recordings import ALONE, COMPACT, Case, cases, refusal

STARTS = {"init_weights", "init_weights_seed", "dtype", "random_uniform_scale", "prompt_init"}
"""How tensors started, which a file says for no use."""
FEW = (
    "BertModel-(unipelt|bn_ln_before|loreft_r3_suffix|compacter|vera|seq_bn_inv|ia3_gating|mtl_lora_single)"
    "|.*prefix_no_cross|ViTModel-lora_all|GPT2Model-(lora_gating|mam)|clip-.*prefix_tuning|T5Model-lora_leave_out"
)


def written() -> list[Any]:
    """Recorded adapters that can be written; a few of them in the default run."""
    import re

    found = []
    for case in cases(COMPACT, ALONE):
        if refusal(case) or case.name.startswith("direft") or _has_no_roles(case):
            continue
        few = re.search(FEW, str(case))
        found.append(pytest.param(case, id=str(case), marks=() if few else pytest.mark.full))
    return found


def _has_no_roles(case: Case) -> bool:
    """DeBERTa's thirds of fused rows; tensors that two models share, which theirs keeps for each of them."""
    thirds = case.family == "deberta" and case.name.startswith(("lora", "ia3", "merge_"))
    return thirds or (case.family == "encoder-decoder" and case.name in ("vera", "compacter"))


@pytest.mark.parametrize("case", written())
def test_as_their_library_writes_it(case: Case, tmp_path: Path) -> None:
    kit = loaded(case, base(case, "eager"), tmp_path)
    kit.save(tmp_path / "out", "a", format="adapterhub", head=False)
    source = adapter_directory(case, tmp_path)
    is_base = case.cls.endswith(("Model", "Encoder")) and not case.cls.endswith("LMHeadModel")
    prefix = "" if is_base else kit.blueprint.model.base_model_prefix + "."
    want = in_our_keys({key.removeprefix(prefix): value for key, value in stored(source).items()}, case)
    found = load_file(tmp_path / "out" / "adapter.safetensors")
    assert found.keys() == want.keys()
    for key, value in found.items():
        # a matrix of many that give the same; a unit that theirs stores for no position
        unread = ".reft_layer." in key and not value.any()
        if ".parametrizations." not in key and not unread:
            assert torch.equal(value, want[key]), key
    other = ak.load(base(case, "eager"), tmp_path / "out", head=False)
    before, after = kit["a"].state_dict(), other["a"].state_dict()
    assert before.keys() == after.keys()
    assert all(torch.allclose(value, after[key], atol=1e-5) for key, value in before.items())
    assert not other["a"].config.model_dump().keys() ^ kit["a"].config.model_dump().keys()


def in_our_keys(stored: dict[str, Tensor], case: Case) -> dict[str, Tensor]:
    """Their tensors where ours are written in another way, with which their library computes the same bits.

    A model made of two names the invertible adapter of its encoder two times more. In a fused matrix alpha of
    (IA)^3 scales the rows without a vector as well; ours have a vector of ones then.
    """
    found = {}
    for key, value in stored.items():
        start, inside, name = key.partition("invertible_adapters.")
        if inside and case.family == "encoder-decoder" and start != "encoder.":
            assert torch.equal(value, stored[f"encoder.{inside}{name}"])
        elif case.name == "ia3_alpha2" and ".c_attn." in key:
            found[key] = torch.cat([torch.ones(len(value) // 2, 1), value])
        else:
            found[key] = value
    return found


@pytest.mark.parametrize(
    "name", ["lora_all", "bn_gating", "prefix_gating", "prompt_tuning", "compacter_unshared"]
)
def test_the_config_is_theirs(name: str, tmp_path: Path) -> None:
    case = Case(COMPACT, "bert", "BertModel", name)
    loaded(case, base(case, "eager"), tmp_path).save(tmp_path / "out", format="adapterhub")
    said = json.loads((adapter_directory(case, tmp_path) / "adapter_config.json").read_text())
    ours = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert ours["version"] == said["version"] and ours["model_type"] == said["model_type"]
    want = {key: value for key, value in said["config"].items() if key not in STARTS}
    if name == "lora_all":
        want["attn_matrices"].remove("o")  # which it accepts and leaves as it is
    assert {key: value for key, value in ours["config"].items() if key not in STARTS} == want


def test_an_adapter_of_our_own(tmp_path: Path) -> None:
    """Options that only we have, where theirs has others for the same numbers."""
    kit = ak.attach(tiny.build("bert"), "lora[r=4, rslora=true, alpha=6]", name="a", head=False)
    kit.save(tmp_path / "out", format="adapterhub")
    again = ak.load(tiny.build("bert"), tmp_path / "out")
    unit = again["a"].units["encoder.0.attention.q"]
    assert unit.scaling == kit["a"].units["encoder.0.attention.q"].scaling == 3


def test_factors_by_any_word_for_a_layer(tmp_path: Path) -> None:
    kit = ak.attach(
        tiny.build("bert"), "seq_bn[reduction_factor={1: 4, encoder.0.mlp: 8}]", name="a", head=False
    )
    kit.save(tmp_path / "out", format="adapterhub")
    said = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["config"]["reduction_factor"]
    assert said == {"0": 8, "1": 4, "default": 16}
    again = ak.load(tiny.build("bert"), tmp_path / "out")
    assert [u.down.out_features for u in again["a"].units.values()] == [4, 8]


@pytest.mark.parametrize(
    ("row", "method", "words"),
    [
        ("bert", "direft", "NoReFT"),
        ("bert", "ia3", "side at"),
        ("bert", "dora", "norm_scaled"),
        ("bert", "lora[targets=[q, o]]", "attention.o"),
        ("bert", "lora[targets=[q, v], r={q: 2, v: 4}]", "several ranks"),
        ("bert", "lora[targets=[encoder.0.attention.q, encoder.1.attention.v]]", "exactly these places"),
        ("bert", "prompt_tuning", "insert"),
        ("bert", "double_seq_bn[reduction_factor={encoder.1.mlp: 4}]", "factors in one layer"),
        ("gemma2", "double_seq_bn", "branch"),
        ("bert", "silence", "nothing"),
    ],
)
def test_what_their_format_cannot_say(row: str, method: str, words: str, tmp_path: Path) -> None:
    if method == "silence":
        row = "xmod"
    kit = ak.attach(tiny.build(row), method, name="a", head=False)
    with pytest.raises(FileFormatError) as caught:
        kit.save(tmp_path / "out", format="adapterhub")
    assert caught.value.code == "not-in-format"
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_model_in_which_their_prompt_has_no_place(tmp_path: Path) -> None:
    """It is told as what a file or a format cannot be, not as a plan that cannot be."""
    kit = ak.attach(tiny.build("llama"), "prompt_tuning", name="a", head=False)
    with pytest.raises(FileFormatError) as unwritten:
        kit.save(tmp_path / "out", format="adapterhub")
    assert unwritten.value.code == "not-reproducible"
    theirs = "prompt_tuning[insert=out, keep_positions=true]"
    ak.attach(tiny.build("bert"), theirs, name="a").save(tmp_path / "bert", format="adapterhub")
    file = tmp_path / "bert" / "adapter_config.json"
    file.write_text(file.read_text().replace('"model_type": "bert"', '"model_type": "llama"'))
    with pytest.raises(FileFormatError) as unread:
        ak.load(tiny.build("llama"), tmp_path / "bert")
    assert unread.value.code == "not-reproducible"


def test_heads_are_not_dropped_in_silence(tmp_path: Path) -> None:
    kit = ak.attach(tiny.build("bert", "BertForSequenceClassification"), "lora", name="a")
    with pytest.raises(FileFormatError) as caught:
        kit.save(tmp_path / "out", format="adapterhub")
    assert caught.value.code == "not-in-format"
    kit.save(tmp_path / "out", format="adapterhub", head=False)
    assert (tmp_path / "out" / "adapter.safetensors").is_file()


def test_a_family_that_they_have_not_got(tmp_path: Path) -> None:
    kit = ak.attach(tiny.build("phi3"), "lora", name="a", head=False)
    with pytest.raises(FileFormatError) as caught:
        kit.save(tmp_path / "out", format="adapterhub")
    assert caught.value.code == "not-in-adapterhub"
