"""`ak.check` on shipped interfaces: what is said is seen in models that run, and wrong words are refuted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import adapterkit as ak
from adapterkit.author import prove
from adapterkit.author.check import observe_claims
from adapterkit.author.prove import COLUMNS, Broken, prove_method
from adapterkit.model.resolve import resolve
from adapterkit.spec import registry
from adapterkit.testing import prove as prove_in_pytest
from tests.authoring.scenes import interface, scenes, unseen_elsewhere
from tests.cli.conftest import Ran, run  # noqa: F401 - a fixture
from tests.models import tiny

STRUCTURES = ("bert", "clip", "custom", "deberta_v2", "gemma2", "modernbert", "phi", "t5", "xmod")
"""Norms before, behind and around; towers; fused rows; parallel sublayers; two stacks; an own adapter."""


def some(default: Any = STRUCTURES) -> list[Any]:
    return [pytest.param(row, marks=[] if row in default else [pytest.mark.full]) for row in tiny.ROWS]


@pytest.mark.parametrize("row", STRUCTURES)
def test_every_claim_of_a_shipped_interface_holds(row: str) -> None:
    found = observe_claims(interface(row), list(scenes(row, whole=False)))
    assert [str(problem) for problem in found.problems] == []


@pytest.mark.parametrize("row", some(("gpt2",)))
def test_every_claim_holds_in_every_class_and_is_seen_in_one(row: str) -> None:
    found = observe_claims(interface(row), list(scenes(row)))
    assert [str(problem) for problem in found.problems] == []
    assert {claim.address for claim in found.unseen} <= unseen_elsewhere(row)


@pytest.mark.parametrize("row", some(("custom", "gpt2", "vit")))
def test_every_method_keeps_its_laws(row: str) -> None:
    scene = next(scenes(row))
    for verdict in prove.prove_methods(interface(row), scene):
        assert verdict.state == "proved", verdict


def wrong(text: str, tmp_path: Path, *changes: tuple[str, str]) -> Path:
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    return path


LLAMA = Path("interfaces/llama.yaml")


@pytest.fixture
def llama() -> str:
    return (Path(__file__).parents[2] / LLAMA).read_text(encoding="utf-8")


def test_a_wrong_word_is_refuted_with_its_place(llama: str, tmp_path: Path) -> None:
    path = wrong(llama, tmp_path, ("k: self_attn.k_proj", "k: self_attn.v_proj"))
    found = ak.check(path)
    wanted = (
        f"{path}:13:10: error[refuted] stacks.decoder.attention.k\n"
        "  k: self_attn.v_proj makes the keys\n"
        "  self_attn.k_proj makes them (layer layers.0)"
    )
    assert wanted in map(str, found.problems)
    # one module has two roles now, and another has none
    assert {problem.line for problem in found.problems} == {8, 13, 14}
    assert not found.ok
    assert found.methods == ()


def test_a_missing_word_is_refuted(llama: str, tmp_path: Path) -> None:
    path = wrong(llama, tmp_path, ("      gate: mlp.gate_proj\n", ""), ("    final_norm: norm\n", ""))
    found = {problem.address: problem for problem in ak.check(path).problems}
    assert found["stacks.decoder.final_norm"].expected == "norm is called there"
    assert "mlp.gate_proj" in found["stacks.decoder.mlp.gate"].expected


def test_a_branch_that_is_there_is_not_lacking(llama: str, tmp_path: Path) -> None:
    lacking = "      down: mlp.down_proj\n      without: {branch: it is said to be none}\n"
    path = wrong(llama, tmp_path, ("      down: mlp.down_proj\n", lacking))
    (problem,) = ak.check(path).problems
    assert problem.address == "stacks.decoder.mlp.without.branch"
    assert problem.expected.startswith("what layers.0.mlp gives is added as it is")


def test_nothing_else_than_the_sublayers_changes_the_stream(llama: str, tmp_path: Path) -> None:
    said = ("    layers: layers\n", "    layers: layers\n    aside: a convolution is said to stand here\n")
    (problem,) = ak.check(wrong(llama, tmp_path, said)).problems
    assert (problem.address, problem.expected) == ("stacks.decoder.aside", "nothing does")


WRONG: dict[str, tuple[str, str, Any, str]] = {
    # a row, the words, what is said there (None: nothing), what was observed
    "ones of a mask of patches": ("vit", "encoder.inputs.mask_hides", True, "they show"),
    "ones of no mask of states": ("whisper", "decoder.reads.mask_hides", True, "WhisperDecoder takes none"),
    "a block around an own adapter": (
        "xmod",
        "encoder.mlp.any_of.0.own_adapter",
        {"path": "output"},
        "down and tail and norm.after_residual of it",
    ),
    "a norm that is called again behind an own adapter": (
        "xmod",
        "encoder.mlp.any_of.0.norm",
        None,
        "output.LayerNorm normalises the sum (layer encoder.layer.0)",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_else_is_wrong_is_refuted(name: str) -> None:
    row, words, said, observed = WRONG[name]
    data = registry.dump(interface(row))
    *way, last = (int(word) if word.isdigit() else word for word in words.split("."))
    place: Any = data["stacks"]
    for word in way:
        place = place[word]
    place.pop(last, None)
    if said is not None:
        place[last] = said
    found = observe_claims(ak.Interface.load(data), list(scenes(row, whole=False)))
    assert observed in {problem.expected for problem in found.problems}


def test_what_stands_between_is_told_from_what_was_forgotten() -> None:
    said = ak.Interface.load("llava")
    assert ak.check(said, "llava", methods=()).ok
    data = registry.dump(said)
    del data["between"]
    found = {problem.address: problem for problem in ak.check(data, "llava", methods=()).problems}
    assert found["heads"].expected == "multi_modal_projector leads to a layer"


def test_a_tower_without_an_interface_is_left_as_it_is() -> None:
    said = ak.Interface.load("clap")
    assert ak.check(said, "clap", methods=()).ok
    data = registry.dump(said)
    del data["parts"]
    (problem,) = ak.check(data, "clap", methods=()).problems
    assert "audio_model.audio_encoder.layers" in problem.expected


def test_what_no_model_shows_is_said() -> None:
    scene = next(scenes("bart"))
    states = {"encoder_outputs": (torch.zeros(2, 7, 32),), **scene.inputs}
    states.pop("input_ids")
    found = observe_claims(interface("bart"), [type(scene)("decoder alone", scene.model, states)])
    assert "stacks.encoder.layers" in {claim.address for claim in found.unseen}
    assert "not seen" in found.summary()


def test_a_broken_law_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = next(scenes("vit"))
    blueprint = resolve(scene.model, interface("vit"))

    def proof() -> prove.Verdict:
        return prove_method("lora", interface("vit"), scene, blueprint)

    assert proof().state == "proved"
    with monkeypatch.context() as patch:
        whole, calls = ak.Kit.detach, []

        def leave(self: ak.Kit, name: str | None = None) -> Any:
            calls.append(name)
            done = whole(self, name)
            if len(calls) > 1:  # the first is for loading
                self.model.register_buffer("left", torch.zeros(1))
            return done

        patch.setattr(ak.Kit, "detach", leave)
        assert "detached" in proof().reason
    with monkeypatch.context() as patch:
        patch.setattr(ak.Kit, "merge", lambda self, name: next(self.model.parameters()).data.zero_())
        patch.setattr(ak.Kit, "unmerge", lambda self: None)
        assert "folded" in proof().reason
    with monkeypatch.context() as patch:
        patch.setattr(prove, "randomise", lambda kit: None)
        assert "random step" in proof().reason
    with pytest.raises(Broken, match="bit for bit: outputs differ"):
        prove._same("start", [torch.zeros(2)], [torch.tensor([0.0, 1e-7])])


def test_a_column_that_a_model_cannot_have_is_refused_and_said() -> None:
    row = "whisper"
    scene = next(s for s in scenes(row) if s.name.startswith("WhisperForAudioClassification"))
    blueprint = resolve(scene.model, interface(row))
    verdict = prove_method("invertible", interface(row), scene, blueprint)
    assert (verdict.state, verdict.code) == ("refused", "no-embeddings")
    with pytest.raises(AssertionError, match="invertible: refused"):
        prove_in_pytest(interface(row), [scene], methods=["invertible"])
    prove_in_pytest(interface(row), [scene], methods=["invertible"], may_refuse=["invertible"])


def test_prove_says_what_does_not_hold(llama: str, tmp_path: Path) -> None:
    path = wrong(llama, tmp_path, ("norm: {before: input_layernorm}", "norm: {after: input_layernorm}"))
    with pytest.raises(AssertionError) as caught:
        prove_in_pytest(path, methods=())
    text = str(caught.value)
    assert "error[refuted] stacks.decoder.attention.norm.after" in text
    assert "it begins with input_layernorm" in text
    assert prove_in_pytest("llama", methods=["lora"]).ok


def factory() -> Any:
    return tiny.build("custom"), tiny.inputs("custom")


def test_the_command(run: Callable[..., Ran], llama: str, tmp_path: Path) -> None:  # noqa: F811
    custom = str(Path(__file__).parents[1] / "models" / "custom.yaml")
    found = run("check", custom, "--forward", "--model", "tests.authoring.test_check:factory")
    assert (found.code, found.err) == (0, "")
    assert "q makes" not in found.out
    assert "fused.layout: the rows of q in qkv (blocks, q, k, v)" in found.out
    assert found.out.splitlines()[-1].endswith(f"{len(COLUMNS)} of {len(COLUMNS)} methods proved")
    path = wrong(llama, tmp_path, ("up: mlp.up_proj", "up: mlp.gate_proj"))
    found = run("check", str(path), "--forward", "--json")
    assert found.code == 1
    (file,) = json.loads(found.out)["files"]
    # and `up_proj` is a linear map of the layers that nothing names any more
    expected = {("stacks.decoder.mlp.up", 19), ("stacks.decoder.layers", 8)}
    assert {(p["address"], p["line"]) for p in file["problems"]} == expected
    assert {claim["verdict"] for claim in file["claims"]} == {"holds", "refuted"}
