"""Models that adapterkit has never seen, by YAML alone: every claim, every method; and models in wrappers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import adapterkit as ak
from adapterkit.author.draft import of_model
from adapterkit.author.prove import COLUMNS, randomise
from adapterkit.errors import PlanError
from adapterkit.testing import prove
from tests.authoring.custom import models, wrappers

HERE = Path(__file__).parent / "custom"
ROOT = Path(__file__).parents[2]
NAMES = ("vision", "sloped", "rotary", "closed", "pair", "woven", "towers", "parallel")
WRAPPERS: dict[str, Callable[[], Any]] = {"bert": wrappers.sentences, "modernbert": wrappers.classifier}


@pytest.mark.parametrize("name", NAMES)
def test_a_plain_module_has_every_method_by_yaml_alone(name: str) -> None:
    report = prove(HERE / f"{name}.yaml", getattr(models, name))
    assert {verdict.method for verdict in report.methods} == set(COLUMNS)
    assert all(verdict.state == "proved" for verdict in report.methods)


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_model_in_a_wrapper_has_every_method(name: str) -> None:
    # the wrapper shows no class with a vocabulary, nor one that reads states
    quiet = ["stacks.encoder.unembed.through.0", "stacks.encoder.inputs.embeds"]
    report = prove(name, WRAPPERS[name], may_be_unseen=quiet)
    assert all(verdict.state == "proved" for verdict in report.methods)
    model, _ = WRAPPERS[name]()
    kit = ak.attach(model, "lora")
    assert [head.path for head in kit.blueprint.heads] == (["2"] if name == "bert" else ["scores"])


def test_the_interface_travels_in_the_file(tmp_path: Path) -> None:
    model, inputs = models.rotary()
    kit = ak.attach(model, "lora", interface=HERE / "rotary.yaml", seed=0)
    randomise(kit)
    kit.save(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["interface"]
    fresh, _ = models.rotary()
    ak.load(fresh, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(fresh(**inputs)["logits"], model(**inputs)["logits"])


def test_the_file_loads_in_another_process_that_has_no_yaml(tmp_path: Path) -> None:
    model, inputs = models.towers()
    kit = ak.attach(model, "seq_bn[reduction_factor=4]", interface=HERE / "towers.yaml", seed=0)
    randomise(kit)
    kit.save(tmp_path / "adapter")
    with torch.no_grad():
        wanted = model(**inputs)["scores"].double().sum().item()
    code = (
        "import sys, torch, adapterkit as ak\n"
        "from tests.authoring.custom import models\n"
        "model, inputs = models.towers()\n"
        "ak.load(model, sys.argv[1])\n"
        "with torch.no_grad(): print(model(**inputs)['scores'].double().sum().item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "adapter")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert float(done.stdout) == wanted


def test_a_prefix_in_einsum_is_the_prefix_in_matmul() -> None:
    """The same attention written twice, with the same prefix; queries, keys and values have another order."""

    class Matmul(models.Attend):
        def forward(self, x: Any, states: Any, keep: Any, causal: bool = False) -> Any:
            pairs = ((self.q, x), (self.k, states), (self.v, states))
            q, k, v = (f(y).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for f, y in pairs)
            scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
            if keep is not None:
                scores = scores.masked_fill(~keep[:, None, None, :].bool(), -1e4)
            if causal:
                scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -1e4)
            return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    outs = []
    for written in (models.Attend, Matmul):
        model, inputs = models.pair()
        for module in model.modules():
            if type(module) is models.Attend:
                module.__class__ = written
        before = model(**inputs).detach()
        kit = ak.attach(model, "prefix_tuning[prefix_length=3]", interface=HERE / "pair.yaml", seed=0)
        randomise(kit)
        outs.append(model(**inputs).detach())
        assert not torch.allclose(before, outs[-1], atol=1e-3)
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("position", ["before", "after_first"])
def test_a_prompt_in_place_of_fillers_is_a_prompt_among_embedded_tokens(padding: str, position: str) -> None:
    """The same weights in the decoder that can be given embedded tokens, which are put together by hand."""
    model, inputs = models.closed()
    keep = torch.ones_like(inputs["ids"])
    keep[1, {"none": slice(0), "right": slice(-2, None), "left": slice(2)}[padding]] = 0
    inputs["keep"], targets = keep, inputs["targets"]
    plain, _ = models.rotary()
    config = f"prompt_tuning[prompt_length=3, position={position}]"
    kit = ak.attach(model, config, interface=HERE / "closed.yaml", seed=0)
    prompt = next(iter(kit["default"].parameters()))
    at = [int(row.argmax()) + (position == "after_first") for row in keep]

    def wider(rows: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.cat([r[:i], new, r[i:]]) for r, i in zip(rows, at, strict=True)])

    vectors = wider(plain.tok(inputs["ids"]), prompt)
    given = plain(vectors=vectors, keep=wider(keep, keep.new_ones(3)))["logits"]
    wanted = torch.stack([torch.cat([r[:i], r[i + 3 :]]) for r, i in zip(given, at, strict=True)])
    found = model(**inputs)
    torch.testing.assert_close(found["logits"], wanted, rtol=1e-6, atol=1e-6)
    loss = torch.nn.functional.cross_entropy(wanted.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(found["loss"], loss)
    (ours,) = torch.autograd.grad(found["loss"], prompt, retain_graph=True)
    (by_hand,) = torch.autograd.grad(loss, prompt)
    torch.testing.assert_close(ours, by_hand, rtol=1e-5, atol=1e-7)


def test_a_prompt_of_states_that_are_read_in_the_same_pass() -> None:
    """The table gives the prompt and then the tokens, and all that reads the states sees both."""
    model, inputs = models.woven()
    plain, _ = models.woven()
    kit = ak.attach(model, "prompt_tuning[prompt_length=3]", interface=HERE / "woven.yaml", seed=0)
    assert [slot.address for slot in kit["default"].plan.slots] == ["reader.prompt"]
    prompt = next(iter(kit["default"].parameters()))
    wide = torch.nn.functional.pad(inputs["source"], (3, 0))
    plain.foreign.register_forward_hook(
        lambda m, args, out: torch.cat([prompt.expand(len(out), -1, -1), out[:, 3:]], 1)
    )
    keep = torch.nn.functional.pad(inputs["source_keep"], (3, 0), value=1)
    wanted = plain(**{**inputs, "source": wide, "source_keep": keep})
    torch.testing.assert_close(model(**inputs), wanted, rtol=1e-6, atol=1e-6)


def test_a_draft_makes_room_for_prompts_where_layers_are_told_of_the_length() -> None:
    model, inputs = models.closed()
    interface = of_model(model, inputs).interface
    assert [stack.inputs.filler for stack in interface.stacks.values()] == [1]
    (stack,) = of_model(*models.parallel()).interface.stacks.values()
    assert stack.inputs.filler is None  # its layers are told of a mask (B, T) alone


def test_a_filler_that_is_no_token_or_fills_nothing_is_refuted() -> None:
    model, _ = models.closed()
    text = (HERE / "closed.yaml").read_text(encoding="utf-8").replace("filler: 1", "filler: 50")
    with pytest.raises(PlanError, match=r"\[no-vocabulary\](.|\n)*an id below 50"):
        ak.attach(model, "prompt_tuning", interface=yaml.safe_load(text))
    text = (HERE / "rotary.yaml").read_text(encoding="utf-8").replace("mask: keep", "mask: keep, filler: 1")
    report = ak.check(ak.Interface.load(yaml.safe_load(text)), models.rotary)
    assert [(p.address, p.expected) for p in report.problems] == [
        ("stacks.decoder.inputs.filler", "Rotary takes embedded tokens")
    ]


def test_a_draft_of_two_stacks_in_one_forward_pass() -> None:
    """What reads states within another stack is no head, and the states are no argument."""
    found = of_model(*models.woven())
    written = ak.Interface.load(HERE / "woven.yaml")
    assert found.is_complete and [head.path for head in found.interface.heads] == ["speak"]
    for drafted, said in zip(found.interface.stacks.values(), written.stacks.values(), strict=True):
        assert drafted.inputs == said.inputs
    reads = list(found.interface.stacks.values())[1].reads
    assert reads is not None and (reads.states, reads.mask) == (None, None)


@pytest.mark.parametrize(
    ("name", "said", "instead", "observed"),
    [
        ("woven", "states: null", "states: target", "it reads no argument of it"),
        ("pair", "states: memory", "states: null", "it reads memory"),
    ],
)
def test_where_states_come_from_is_judged(name: str, said: str, instead: str, observed: str) -> None:
    text = (HERE / f"{name}.yaml").read_text(encoding="utf-8")
    spec = ak.Interface.load(yaml.safe_load(text.replace(said, instead)))
    report = ak.check(spec, getattr(models, name), methods=["lora"])
    assert [(p.address, p.expected) for p in report.problems] == [("stacks.writer.reads.states", observed)]


def test_a_prompt_without_room_is_broken_with_a_hint() -> None:
    text = (HERE / "closed.yaml").read_text(encoding="utf-8").replace(", filler: 1", "")
    report = ak.check(ak.Interface.load(yaml.safe_load(text)), models.closed, methods=["prompt_tuning"])
    (problem,) = report.problems
    assert (problem.code, problem.address) == ("law-broken", "prompt_tuning")
    assert "The size of tensor" in problem.message and "needs 'filler'" in problem.hint


def test_an_inverse_acts_before_the_vocabulary_that_the_interface_names() -> None:
    """A plain module does not tell its output embeddings; `unembed` does."""
    model, inputs = models.sloped()
    kit = ak.attach(model, "invertible", interface=HERE / "sloped.yaml", seed=0)
    randomise(kit)
    assert {slot.role for slot in kit["default"].plan.slots} == {"embeddings", "unembed"}
    seen = []
    model.get_submodule("predict").register_forward_hook(lambda m, args, out: seen.append(args[0]))
    model(**inputs)
    assert len(seen) == 1


def test_the_interface_travels_with_a_setup(tmp_path: Path) -> None:
    model, inputs = models.rotary()
    for name in ("a", "b"):
        kit = ak.attach(model, "lora", name=name, interface=HERE / "rotary.yaml", seed=0)
    randomise(kit)
    setup = ak.Parallel("a", "b")
    kit.activate(setup)
    kit.save(tmp_path / "both", setup=setup)
    fresh, _ = models.rotary()
    assert ak.load(fresh, tmp_path / "both").active == setup
    with torch.no_grad():
        assert torch.equal(fresh(**inputs)["logits"], model(**inputs)["logits"])
