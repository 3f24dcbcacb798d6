"""Every construct of the language: its words, a spec file that uses it, what it means on a model.

The models are hand-made (toys.py) or tiny. What is expected is read off the model, not asked of the resolver.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
import torch
import yaml
from torch import nn

import adapterkit as ak
from adapterkit.model.blueprint import Blueprint
from adapterkit.model.resolve import resolve
from adapterkit.spec import registry
from adapterkit.spec.jsonschema import schema
from adapterkit.spec.schema import Interface
from tests.oracles import fused as oracle
from tests.specs.files import GOOD, model_for, names, report

Check = Callable[[Blueprint, nn.Module], None]


def places(found: Blueprint, model: nn.Module) -> None:
    block = model.blocks[1]
    wanted = {
        "decoder.1.layer": block,
        "decoder.1.attention.core": block.attn,
        "decoder.1.attention.tail": block.attn.drop,
        "decoder.1.attention.norm.before": block.ln,
        "decoder.1.mlp.norm.after": block.ln,
        "decoder.1.mlp.norm.after_residual": block.mlp.drop,
        "decoder.embeddings.table": model.embed,
        "decoder.embeddings.out": model.drop,
        "decoder.entry": model,
        "decoder.exit": model.norm,
        "decoder.final_norm": model.norm,
    }
    assert {address: found.places[address].module for address in wanted} == wanted
    assert found.slots["decoder.1.mlp.down"].module is block.mlp.down
    assert found.slots["decoder.1.mlp.down"].shape == (8, 12)


def one_path(found: Blueprint, model: nn.Module) -> None:
    for place in ("table", "out"):
        assert found.places[f"decoder.embeddings.{place}"].module is model.get_submodule("embed_tokens")


def minimal(found: Blueprint, model: nn.Module) -> None:
    assert set(found.slots) == {f"decoder.{i}.mlp.{role}" for i in (0, 1) for role in ("up", "down")}


def branch(found: Blueprint, model: nn.Module) -> None:
    block = model.blocks[0]
    assert found.places["decoder.0.mlp.out"].module is block.mlp
    assert found.places["decoder.0.mlp.own_adapter"].module is block.own
    assert not any(slot.sublayer == "mlp" for slot in found)


def nothing_of_models(found: Blueprint, model: nn.Module) -> None:
    """How to build a tiny model says nothing of what a model is, and is not saved with adapters."""
    said = found.interface.tiny["bert"]
    assert (said.config["hidden_size"], said.inputs["input_ids"].shape) == (24, (3, 5))
    assert registry.dump(found.interface).keys().isdisjoint({"tiny", "like"})
    assert found.slots.keys() == resolve(model, "bert").slots.keys()


def parallel(found: Blueprint, model: nn.Module) -> None:
    assert found.stacks["decoder"].parallel
    assert found.places["decoder.1.norm.before"].module is model.blocks[1].ln


def sequential(found: Blueprint, model: nn.Module) -> None:
    assert not found.stacks["decoder"].parallel


def rows_of(layout: str, kv_heads: int, order: tuple[str, ...] = oracle.ROLES) -> Check:
    def check(found: Blueprint, model: nn.Module) -> None:
        weight = model.blocks[1].attn.qkv.weight
        wanted = oracle.split(weight, layout, 4, kv_heads, 2, order)
        for role, part in zip(oracle.ROLES, wanted, strict=True):
            slot = found.slots[f"decoder.1.attention.{role}"]
            assert slot.module is model.blocks[1].attn.qkv
            assert slot.rows is not None
            assert torch.equal(slot.rows.take(weight), part)
            assert slot.shape == tuple(part.shape)

    return check


def sizes(found: Blueprint, model: nn.Module) -> None:
    assert found.stacks["decoder"].sizes["attention"] == (4, 4)
    rows_of("blocks", 4, ("v", "q", "k"))(found, model)


def alternative_names(found: Blueprint, model: nn.Module) -> None:
    q, o = found.slots["decoder.0.attention.q"], found.slots["decoder.0.attention.o"]
    assert q.module is model.blocks[0].attn.q
    assert (q.was, o.was) == (("attn.wq",), ("attn.dense",))
    assert found.interface.stacks["decoder"].layers.was == ("h",)


def decided_by_config(found: Blueprint, model: nn.Module) -> None:
    assert "decoder.0.mlp.gate" not in found.slots
    assert not any(slot.sublayer == "cross_attention" for slot in found)
    assert found.places["decoder.0.mlp.tail"].module is model.blocks[0].mlp.drop


def alternative_by_config(found: Blueprint, model: nn.Module) -> None:
    assert found.slots["decoder.1.mlp.gate"].module is model.blocks[1].mlp.gate


def absent(found: Blueprint, model: nn.Module) -> None:
    assert set(found.roles()) == {"q", "k", "v", "o", "up", "down"}
    assert not found.poolers


def alternative_blocks(found: Blueprint, model: nn.Module) -> None:
    assert found.slots["decoder.0.mlp.up"].module is model.blocks[0].mlp.up


def two_stacks(found: Blueprint, model: nn.Module) -> None:
    left, right = found.stacks["left"], found.stacks["right"]
    assert (left.root, right.root) == (model.left, model.right)
    assert (left.num_layers, right.num_layers) == (2, 3)
    assert left.reads is None
    assert right.reads is not None
    assert (right.reads.stack, right.reads.states, right.reads.mask) == ("left", "memory", "memory_mask")
    assert found.slots["right.2.cross_attention.k"].module is model.right.blocks[2].cross.k
    assert found.slots["right.2.attention.q"].module is model.right.blocks[2].attn.q
    assert [head.module for head in found.heads] == [model.project]


def some_stacks(found: Blueprint, model: nn.Module) -> None:
    assert list(found.stacks) == ["left"]


def shared_layers(found: Blueprint, model: nn.Module) -> None:
    info = found.stacks["encoder"]
    assert info.layers == tuple(member for group in model.groups for member in group.members)
    assert found.slots["encoder.3.attention.q"].module is model.groups[1].members[1].attn.q


def kinds(found: Blueprint, model: nn.Module) -> None:
    assert {slot.layer for slot in found if slot.sublayer == "attention"} == {0}
    assert {slot.layer for slot in found if slot.sublayer == "mlp"} == {0, 1}


def batch_and_kernel(found: Blueprint, model: nn.Module) -> None:
    info = found.stacks["decoder"]
    assert found.places["decoder.0.layer"].batch == "second"
    assert found.slots["decoder.0.attention.q"].batch == "none"
    assert found.slots["decoder.0.attention.k"].batch == "second"
    kernel = info.kernels["attention"]
    assert kernel is not None
    assert (kernel.method, kernel.args) == ("forward", ("q", "k", "v", "mask", "_"))
    assert info.eager["attention"] == "plain_attention"
    assert (info.inputs.ids, info.inputs.mask, info.inputs.embeds) == ("tokens", "hidden", "inputs_embeds")
    assert info.inputs.mask_hides and info.inputs.filler == 3
    assert info.inputs.aligned == ("segments",)
    assert info.inputs.batch == {"position_ids": "none"}


def other_names(found: Blueprint, model: nn.Module) -> None:
    """The newer name goes first; what the entry takes under neither keeps it."""
    names = found.stacks["decoder"].inputs
    assert (names.ids, names.mask, names.positions) == ("tokens", "seen", "places")
    model = ak.attach(model, "lora[targets=up, r=2]", interface=found.interface).model
    assert resolve(model, found.interface).stacks["decoder"].inputs == names


def copy_with_changes(found: Blueprint, model: nn.Module) -> None:
    assert "encoder.0.attention.tail" not in found.places
    assert found.places["encoder.0.mlp.tail"].module is model.encoder.layer[0].output.dropout
    assert found.places["encoder.0.mlp.norm.after_residual"].module is model.encoder.layer[0].output.LayerNorm
    assert found.stacks["encoder"].inputs.aligned == ("segment_ids",)
    assert found.unsupported == {"lora": "only an example"}
    assert found.interface.model_type is None


def encoder_only(found: Blueprint, model: nn.Module) -> None:
    assert list(found.stacks) == ["encoder"]


def decoder_only(found: Blueprint, model: nn.Module) -> None:
    assert list(found.stacks) == ["decoder"]
    assert found.stacks["decoder"].reads is None
    assert found.slots["decoder.1.attention.q"].module is model.decoder.block[1].layer[0].SelfAttention.q


def parts(found: Blueprint, model: nn.Module) -> None:
    assert {name: info.by_default for name, info in found.stacks.items()} == {
        "encoder/encoder": False,
        "decoder/encoder": True,
    }
    slot = found.slots["decoder/encoder.1.cross_attention.q"]
    assert slot.module is model.decoder.bert.encoder.layer[1].crossattention.self.query


CONSTRUCTS: dict[str, tuple[str, Check, str]] = {
    # what: (spec file, what it means, its words in the schema)
    "places of norms, tails, embeddings, entry and exit": (
        "model-plain-places.yaml",
        places,
        "before after after_residual tail table out entry exit final_norm core",
    ),
    "embeddings by one path": ("model-gemma2-embeddings-path.yaml", one_path, "embeddings"),
    "the least that a stack needs": ("model-plain-minimal.yaml", minimal, "stacks layers mlp"),
    "branch without roles, own adapter": ("model-bank-branch.yaml", branch, "out own_adapter"),
    "parallel block with one norm": ("model-plain-parallel.yaml", parallel, "block shared_norm"),
    "sequential block by default": ("model-plain-places.yaml", sequential, "block"),
    "fused, blocks": ("model-fused-blocks.yaml", rows_of("blocks", 4), "fused layout order"),
    "fused, per head": ("model-fused-per-head.yaml", rows_of("per_head", 4), "fused layout order"),
    "fused, per group": ("model-fused-per-group.yaml", rows_of("per_group", 4), "fused layout order"),
    "fused, grouped queries, blocks": ("model-grouped-blocks.yaml", rows_of("blocks", 2), "fused"),
    "fused, grouped queries, per group": ("model-grouped-per-group.yaml", rows_of("per_group", 2), "fused"),
    "sizes, another order": ("model-fused-order.yaml", sizes, "sizes heads kv_heads head_dim"),
    "any_of for paths and lists, was": ("model-plain-names.yaml", alternative_names, "any_of was"),
    "when": ("model-plain-when.yaml", decided_by_config, "when"),
    "any_of with when": ("model-gated-when.yaml", alternative_by_config, "any_of when gate"),
    "any_of for blocks": ("model-plain-any-of-blocks.yaml", alternative_blocks, "any_of"),
    "optional": ("model-plain-optional.yaml", absent, "optional extra pooler"),
    "several stacks, one reads another": (
        "model-towers-two.yaml",
        two_stacks,
        "at config like reads stack states mask cross_attention heads",
    ),
    "stacks of some classes": ("model-towers-present-in.yaml", some_stacks, "present_in"),
    "layers in groups": ("model-nested-shared.yaml", shared_layers, "layers"),
    "kinds of layers": ("model-hybrid-kinds.yaml", kinds, "kinds by of"),
    "batch, kernel, inputs": (
        "model-plain-batch.yaml",
        batch_and_kernel,
        "batch kernel method args eager ids embeds mask positions aligned",
    ),
    "arguments that have another name in another version": ("model-renamed-inputs.yaml", other_names, "was"),
    "parts": ("model-encoder_decoder-parts.yaml", parts, "parts by_default config reads"),
    "like an interface, null removes": ("model-bert-like.yaml", copy_with_changes, "like unsupported"),
    "how a tiny model is made": ("model-bert-tiny.yaml", nothing_of_models, "tiny inputs shape below values"),
    "only some stacks": ("model-t5-only.yaml", encoder_only, "only"),
    "only a stack that copies another": ("model-t5-only-decoder.yaml", decoder_only, "only reads"),
}


@pytest.mark.parametrize("construct", CONSTRUCTS)
def test_a_construct_means_what_it_says(construct: str) -> None:
    name, check, _ = CONSTRUCTS[construct]
    model = model_for(name)
    assert model is not None
    check(resolve(model, registry.load(GOOD / name)), model)


def test_transposed_weights_are_seen() -> None:
    model = model_for("model-gpt2-")
    assert model is not None
    found = resolve(model)
    # an MLP of 32 -> 40, held as (32, 40)
    slot = found.slots["decoder.0.mlp.up"]
    assert (slot.transposed, slot.shape, tuple(slot.module.weight.shape)) == (True, (40, 32), (32, 40))


def test_a_layer_that_is_used_often_is_one_layer() -> None:
    model = model_for("model-albert-")
    assert model is not None
    # four steps through two groups
    assert resolve(model).stacks["encoder"].num_layers == 2


def _words(node: object) -> set[str]:
    if isinstance(node, dict):
        inside = {word for value in node.values() for word in _words(value)}
        return inside | set(node.get("properties", ()))
    return {word for item in node for word in _words(item)} if isinstance(node, list) else set()


def test_every_word_of_the_schema_is_used_by_a_spec_here_or_shipped() -> None:
    """Reserved words alone have no example."""

    def keys(value: object) -> set[str]:
        if isinstance(value, dict):
            return set(value) | {key for item in value.values() for key in keys(item)}
        return {key for item in value for key in keys(item)} if isinstance(value, list) else set()

    files = [*GOOD.glob("*.yaml"), *registry.shipped_directory().glob("*.yaml")]
    used = {word for path in files for word in keys(yaml.safe_load(path.read_text(encoding="utf-8-sig")))}
    assert _words(schema()) - used == {"experts"}


def test_the_table_speaks_only_of_words_of_the_schema() -> None:
    said = {word for _, _, words in CONSTRUCTS.values() for word in words.split()}
    assert said <= _words(schema())


@pytest.mark.parametrize("name", names(GOOD))
def test_a_good_spec_has_no_problems(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(GOOD)
    assert report(name) == ""


@pytest.mark.parametrize("name", names(GOOD))
def test_the_json_schema_accepts_a_good_spec(name: str) -> None:
    # through the loader's text rules: a plain `on` is a word there
    document = registry.read(GOOD / name)
    jsonschema.validate(document.data, schema())


def test_every_good_spec_is_in_the_table_or_about_files() -> None:
    about_files = {"plain-text.yaml", "bom-and-windows-lines.yaml", "plain-foreign.yaml"}
    assert set(names(GOOD)) == {name for name, _, _ in CONSTRUCTS.values()} | about_files


def test_plain_words_are_words() -> None:
    found: Interface = registry.load(Path(GOOD / "plain-text.yaml"))
    assert found.source == ("# not a comment",)
    assert found.model_type == ("on", "no", "null")
    mlp = found.stacks["y"].mlp
    assert mlp is not None
    when = mlp.when
    assert when == {"a": 1, "b": -2, "c": 1.5, "d": "1", "e": "on", "f": 1000.0, "g": True}
    assert [type(value) for value in when.values()] == [int, int, float, str, str, float, bool]
