"""Setups and fusions written for AdapterHub's library: as it would write them, and read again as the same."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import adapterkit as ak
from adapterkit.errors import ConfigError, FileFormatError
from tests.laws.branch_cases import randomise
from tests.laws.matrix import run
from tests.models import tiny
from tests.parity.compare import base, differences, in_their_words, loaded
from tests.parity.recordings import COMPACT, FUSE, SETUPS, Case, cases, refusal

FEW = (
    "BertModel-(fuse_named|fuse_par|fuse_stacks|batch_split_stack|mtl_lora|parallel_(mam|stack)|split_nested"
    "|stack_(fuse|inv|batch_split|seq_bn_prefix_reft))|T5Model-stack_parallel|gemma2-.*fuse2_double|gptj-.*fuse2"
)


def written() -> list[Any]:
    """Recorded setups that can be written; a few of them in the default run."""
    pattern = re.compile(rf"{FUSE}|{SETUPS}")
    found = [c for c in cases(COMPACT, pattern) if not refusal(c) and not c.name.startswith("skip")]
    return [
        pytest.param(c, id=str(c), marks=() if re.search(FEW, str(c)) else pytest.mark.full) for c in found
    ]


def fused(block: Any) -> list[str]:
    """Names of the directories of fusions in a setup of theirs."""
    if isinstance(block, str):
        return []
    last = [child if isinstance(child, str) else child["children"][-1] for child in block["children"]]
    own = [block.get("name", ",".join(map(str, last)))] if block["type"] == "Fuse" else []
    return own + [name for child in block["children"] for name in fused(child)]


@pytest.mark.parametrize("case", written())
def test_as_their_library_writes_it(case: Case, tmp_path: Path) -> None:
    """Names, weights and words of the setup are the recorded ones; so are the numbers when it is read."""
    setup = case.said().get("setup", "a")
    kit = loaded(case, base(case, "eager"), tmp_path)
    out = kit.save(tmp_path / "out", setup=kit.active, format="adapterhub", head=False)
    said = json.loads((out / "adapter_setup.json").read_text())
    stack = setup if isinstance(setup, dict) else {"type": "Stack", "children": [setup]}
    assert said == {"adapter_setup": in_their_words(stack), "head_setup": None, "version": "adapters.1.3.0"}
    fusions = fused(setup)
    assert {path.name for path in out.iterdir()} - {"adapter_setup.json"} == {
        *fusions,
        *map(str, leaves(stack)),
    }
    for name in fusions:
        theirs = stored_fusion(case.directory / "fusions" / name.replace(",", "+"))
        ours = load_file(out / name / "model_adapter_fusion.safetensors")
        same = {key for key in theirs if ".dense." not in key}  # which nothing reads
        assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in same)
        told, wanted = (
            json.loads((place / "adapter_fusion_config.json").read_text())
            for place in (out / name, case.directory / "fusions" / name.replace(",", "+"))
        )
        assert {**told, "model_name": ""} == {**wanted, "model_name": ""}
    again = base(case, "eager")
    assert ak.load(again, out, head=False).active == (
        kit.active if isinstance(setup, dict) else ak.Stack("a")
    )
    assert max(differences(case, again, load_file(case.directory / "expected.safetensors")))[0] <= 1e-4


def leaves(block: Any) -> list[str]:
    return [block] if isinstance(block, str) else [n for child in block["children"] for n in leaves(child)]


def stored_fusion(directory: Path) -> dict[str, torch.Tensor]:
    file = directory / "model_adapter_fusion.safetensors"
    if file.exists():
        return dict(load_file(file))
    found: dict[str, torch.Tensor] = torch.load(
        directory / "pytorch_model_adapter_fusion.bin", weights_only=True
    )
    return found


def crew(row: str, *methods: str) -> ak.Kit:
    """Adapters a, b, c, ... of these methods."""
    model = tiny.build(row).eval()
    for name, method in zip("abcd", methods, strict=False):
        kit = ak.attach(model, method, name=name, head=False, activate=False)
    return kit


A, B, C = "abc"
LEFT: list[tuple[str, tuple[str, ...], Any, str, str]] = [
    ("bert", ("lora", "lora"), ak.Route(A, B), "not-in-format", "Route"),
    ("bert", ("lora", "lora"), ak.Average(A, B), "not-reproducible", "once more"),
    ("bert", ("lora", "lora"), ak.Stack(A, B), "not-reproducible", "drops it"),
    ("bert", ("lora", "lora"), ak.Split(A, B, splits=6), "not-in-format", "Split of changes of weights"),
    ("bert", ("lora", "seq_bn"), ak.Parallel(A, B), "not-in-format", "at different places"),
    (
        "bert",
        ("seq_bn", "seq_bn[leave_out=[encoder.0]]"),
        ak.Split(A, B, splits=6),
        "not-in-format",
        "different",
    ),
    ("bert", ("seq_bn",) * 2, ak.Parallel(ak.Parallel(A, B), A), "not-in-format", "Parallel in Parallel"),
    ("bert", ("seq_bn",) * 3, ak.Stack(A, ak.Stack(B, C)), "not-in-format", "Stack in Stack"),
    (
        "bert",
        ("seq_bn",) * 3,
        ak.Parallel(A, ak.Stack(B, ak.Split(A, C, splits=6))),
        "not-in-format",
        "Split in",
    ),
    ("clip", ("lora", "lora"), ak.Parallel(A, B), "not-in-format", "for which its library has none"),
    ("bert", ("seq_bn", "loreft"), ak.Stack(A, B), "not-in-format", "first_only=False"),
    (
        "bert",
        ("seq_bn", "seq_bn"),
        ak.Parallel(ak.Stack(A, B), B),
        "not-in-format",
        "original_ln_first=False",
    ),
    ("bert", ("prompt_tuning", "prompt_tuning"), ak.Stack(A, B), "not-in-format", "insert"),
    ("gpt2", ("lora", "lora"), ak.Parallel(A, B), "not-in-format", "acts alone only"),
    ("vit", ("lora", "lora"), ak.Parallel(A, B), "not-in-format", "mixes the examples"),
    ("phi3", ("lora", "lora"), ak.Parallel(A, B), "not-in-adapterhub", "phi3"),
]
"""Rows, methods of a, b and c, a setup, and why it cannot be written."""


@pytest.mark.parametrize(("row", "methods", "setup", "code", "words"), LEFT, ids=str)
def test_setups_that_their_format_cannot_hold(
    row: str, methods: tuple[str, ...], setup: Any, code: str, words: str, tmp_path: Path
) -> None:
    kit = crew(row, *methods)
    with pytest.raises(FileFormatError) as caught:
        kit.save(tmp_path / "out", setup=setup, format="adapterhub")
    assert caught.value.code == code
    assert words in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_what_a_kit_adds_to_a_setup(tmp_path: Path) -> None:
    kit = crew("bert", "seq_bn", "seq_bn")
    kit.activate(ak.Stack(A, B), skip_layers=["encoder.0"])
    for change in (None, lambda: (kit.activate(ak.Stack(A, B)), kit.share(A, B))):
        if change is not None:
            change()
        with pytest.raises(FileFormatError) as caught:
            kit.save(tmp_path / "out", setup=ak.Stack(A, B), format="adapterhub")
        assert caught.value.code == "not-in-format"
    assert not list(tmp_path.iterdir())
    kit.unshare()
    kit.save(tmp_path / "out", setup=ak.Stack(A, B), format="adapterhub")
    assert ak.load(tiny.build("bert"), tmp_path / "out").active == ak.Stack(A, B)


@pytest.mark.parametrize(
    ("methods", "config", "words"),
    [
        (("lora", "lora"), "dynamic", "updates of weights"),
        (("seq_bn", "seq_bn"), {"temperature": 2.0}, "temperature=2.0"),
        (("par_bn", "par_bn"), "dynamic", "adds_stream=False"),
        (("seq_bn", "seq_bn[leave_out=[encoder.0]]"), {"partial": True}, "acts without 'b'"),
        (
            ("seq_bn[locations=mlp]|seq_bn[locations=attention]", "double_seq_bn"),
            "dynamic",
            "which is a union",
        ),
    ],
)
def test_fusions_that_their_format_cannot_hold(
    methods: tuple[str, ...], config: Any, words: str, tmp_path: Path
) -> None:
    kit = crew("bert", *methods)
    kit.fuse(A, B, config=config)
    with pytest.raises(FileFormatError) as caught:
        kit.save(tmp_path / "out", "a+b", format="adapterhub")
    assert caught.value.code == "not-in-format" and words in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_fusion_of_adapters_that_lack_layers(tmp_path: Path) -> None:
    """Theirs fuses those that act in a layer, if the last one does; it computed the same of such a setup."""
    kit = crew("bert", "seq_bn[leave_out=[encoder.0]]", "seq_bn[leave_out=[encoder.1]]", "seq_bn")
    kit.fuse(*"abc", config={"partial": True}, seed=1)
    for name in kit:
        randomise(kit, name)
    kit.save(tmp_path / "out", setup=ak.Stack("c", ak.Fuse(*"abc")), format="adapterhub")
    model, given = tiny.build("bert"), tiny.inputs("bert")
    again = ak.load(model, tmp_path / "out")
    assert again["a+b+c"].config.partial and again.active == ak.Stack("c", ak.Fuse(*"abc"))
    kit.activate(again.active)
    assert torch.equal(run(model, given), run(kit.model, given))
    assert not torch.allclose(run(model, given), run(tiny.build("bert"), given), atol=1e-2)


@pytest.mark.parametrize(("dropout", "said"), [(0.0, 1e-12), (0.1, None), (0.3, 0.3)])
def test_dropout_of_a_fusion(dropout: float, said: float | None, tmp_path: Path) -> None:
    """Theirs takes 0 for what was not said, and then that of the model."""
    kit = crew("bert", "seq_bn", "seq_bn")
    kit.model.config.attention_probs_dropout_prob = 0.1
    kit.fuse(A, B, config={"dropout": dropout}, name="mine")
    kit.save(tmp_path / "mine", "mine", format="adapterhub")
    told = json.loads((tmp_path / "mine" / "adapter_fusion_config.json").read_text())
    assert told["config"]["dropout_prob"] == said
    assert told["name"] == "mine" and told["adapter_names"] == [A, B]
    model = crew("bert", "seq_bn", "seq_bn").model
    model.config.attention_probs_dropout_prob = 0.1
    again = ak.load(model, tmp_path / "mine")["mine"]
    assert again.config.dropout == dropout
    assert all(
        torch.equal(tensor, kit["mine"].state_dict()[key]) for key, tensor in again.state_dict().items()
    )


def test_only_a_setup_of_theirs_is_replaced(tmp_path: Path) -> None:
    kit = crew("bert", "seq_bn", "seq_bn")
    kit.fuse(A, B)
    kit.save(tmp_path / "out", setup=ak.Fuse(A, B), format="adapterhub")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {A, B, "a,b", "adapter_setup.json"}
    kit.save(tmp_path / "out", setup=A, format="adapterhub")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {A, "adapter_setup.json"}
    (tmp_path / "out" / "notes").write_text("keep")
    for form in ("adapterhub", "adapterkit"):
        with pytest.raises(FileFormatError) as caught:
            kit.save(tmp_path / "out", setup=B, format=form)  # type: ignore[arg-type]
        assert caught.value.code == "bad-file"
    assert (tmp_path / "out" / "notes").read_text() == "keep"
    with pytest.raises(ConfigError):
        kit.save(tmp_path / "peft", setup=B, format="peft")
