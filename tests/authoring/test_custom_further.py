"""Habits of public code in models of one's own: drafted whole, proved, refuted where wrong, right by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import adapterkit as ak
from adapterkit.author import meaning
from adapterkit.author.draft import of_model
from adapterkit.author.prove import COLUMNS, randomise
from adapterkit.author.scene import Scene
from adapterkit.errors import PlanError, ResolveError
from adapterkit.model.resolve import resolve
from adapterkit.testing import prove
from tests.authoring import mutation
from tests.authoring.custom import further, models

HERE = Path(__file__).parent / "custom"
REFUSED = {
    "classic": set[str](),
    "sound": set[str](),
    "banks": {"ia3"},  # experts have no matrix that is called with all tokens
    "denoiser": {"bottleneck", "compacter", "fusion", "prompt_tuning"},  # gates; positions behind the patches
    "scaled": set[str](),
}


GATED = "without: {branch: a gate made of time and label multiplies it}"


def _file(name: str) -> Path:
    return HERE / f"{name}.yaml"


def _text(name: str) -> str:
    return _file(name).read_text(encoding="utf-8")


def _changed(name: str, said: str, instead: str) -> ak.Interface:
    text = _text(name)
    assert said in text
    return ak.Interface.load(yaml.safe_load(text.replace(said, instead)))


@pytest.mark.parametrize("name", REFUSED)
def test_every_method_that_the_model_can_have_is_proved(name: str) -> None:
    report = prove(_file(name), getattr(further, name), may_refuse=REFUSED[name])
    states = {verdict.method: verdict.state for verdict in report.methods}
    wanted = {method: "refused" if method in REFUSED[name] else "proved" for method in COLUMNS}
    assert states == wanted


@pytest.mark.parametrize("name", REFUSED)
def test_a_draft_means_what_was_written_by_hand(name: str) -> None:
    model, inputs = getattr(further, name)()
    found = of_model(model, inputs)
    assert found.notes.gaps == [] and "`check` refutes" not in found.text
    (drafted,), (written,) = (
        one.stacks.values() for one in (found.interface, ak.Interface.load(_file(name)))
    )
    named = ("layers", "embeddings", "inputs", "final_norm")
    assert [getattr(drafted, word) for word in named] == [getattr(written, word) for word in named]
    stack, by_hand = (
        next(iter(one)) for one in (found.interface.stacks, ak.Interface.load(_file(name)).stacks)
    )
    facts = (
        meaning.facts(resolve(model, found.interface)),
        meaning.facts(resolve(model, ak.Interface.load(_file(name)))),
    )
    assert repr(facts[0]).replace(stack, by_hand) == repr(facts[1])


@pytest.mark.parametrize("name", [name for name in REFUSED if name != "banks"])
def test_every_wrong_word_is_refuted(name: str) -> None:
    outcome = mutation.of([Scene(name, *getattr(further, name)())], ak.Interface.load(_file(name)))
    assert [str(mutant) for mutant, _ in outcome.survivors] == []
    assert outcome.wrong > 100


def test_what_lies_in_a_named_block_of_experts_may_be_named_or_not() -> None:
    outcome = mutation.of([Scene("banks", *further.banks())], ak.Interface.load(_file("banks")))
    assert {mutant.loc[:4] for mutant, _ in outcome.survivors} == {("stacks", "decoder", "mlp", "extra")}


# ------------------------------------------------------------------------------------------------ the judge


@pytest.mark.parametrize(
    ("name", "said", "instead", "address", "observed"),
    [
        ("sound", "scale: 0.5", "scale: 1.0", "mlp.scale", "it is added times 0.5"),
        ("scaled", "scale: gamma_1", "scale: gamma_2", "attention.scale", "times a number for each channel"),
        ("denoiser", GATED, "", "attention.scale", "made of the inputs"),
        ("classic", "mask: mask, ", "", "inputs.mask", "'mask' hides tokens"),
        ("classic", "ids: seq, ", "ids: null, ", "inputs.ids", "the table is called with 'seq'"),
    ],
)  # fmt: skip
def test_a_wrong_claim_is_refuted(name: str, said: str, instead: str, address: str, observed: str) -> None:
    report = ak.check(_changed(name, said, instead), getattr(further, name), methods=["lora"])
    (found,) = [p for p in report.problems if p.address.endswith(address)]
    assert found.code == "refuted" and observed in found.expected


@pytest.mark.parametrize(
    ("said", "instead", "address"),
    [
        (
            "inputs: {ids: ids, embeds: embedded, mask: keep}",
            "inputs: {ids: keep, embeds: null}",
            "inputs.ids",
        ),
        ("states: memory, mask: memory_keep", "states: memory_keep, mask: memory", "reads.states"),
        ("states: memory, mask: memory_keep", "states: memory", "reads.mask"),
    ],
)
def test_a_wrong_claim_about_what_a_stack_is_given_is_refuted(said: str, instead: str, address: str) -> None:
    def make() -> further.Made:
        model, inputs = models.pair()
        return model, inputs

    report = ak.check(_changed("pair", said, instead), make, methods=["lora"])
    assert any(p.code == "refuted" and p.address.endswith(address) for p in report.problems)


def test_ids_are_what_the_table_is_called_with() -> None:
    class Optional(further.Banks):
        def forward(self, tokens: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
            return super().forward(tokens)

    def make() -> further.Made:
        return Optional(), further.banks()[1]

    report = ak.check(_changed("banks", "ids: tokens", "ids: keep"), make, methods=["lora"])
    found = {p.address: p.expected for p in report.problems}
    assert found["stacks.decoder.inputs.ids"] == "the table is called with 'tokens'"


def test_a_norm_in_a_head_is_none_of_the_stack() -> None:
    report = ak.check(_file("denoiser"), further.denoiser, methods=["lora"])
    assert report.problems == ()
    text = _text("denoiser").replace("heads: [final]", "heads: [final.linear]")
    report = ak.check(ak.Interface.load(yaml.safe_load(text)), further.denoiser, methods=["lora"])
    assert "stacks.encoder.final_norm" in [p.address for p in report.problems]


# ---------------------------------------------------------------------------------------------- the drafter


def test_a_number_is_named_if_one_attribute_alone_holds_it() -> None:
    found = of_model(*further.classic())
    assert "# 'h' is taken for heads, as it alone is 4 there\n      sizes: {heads: h}" in found.text

    def drafted(width: int) -> Any:
        torch.manual_seed(0)
        _, inputs = further.classic()
        return of_model(further.Classic(width=width), inputs)

    (gap,) = drafted(16).notes.gaps  # four heads of four numbers
    assert gap[1] == (
        "heads: 4 here, which no field shows; perhaps 'h', 'd_k', but the width of a head is 4 here, too"
    )


def test_a_number_that_another_has_too_is_left_to_the_reader() -> None:
    model, inputs = models.rotary()  # four heads of queries, two of keys: two queries share a head
    (gap,) = of_model(model, inputs).notes.gaps
    assert gap[1] == (
        "kv_heads: 2 here, which no field shows; perhaps 'n_groups', but the queries that share a head are 2 "
        "here, too"
    )
    for block in model.stack:  # type: ignore[union-attr]
        block.attn = models.Grouped(32, 6, 2)
    found = of_model(model, inputs)
    assert found.notes.gaps == [] and "sizes: {heads: n_heads, kv_heads: n_groups}" in found.text


def test_a_plain_model_is_told_by_itself() -> None:
    """Not as another family with differences, whose file its author does not know."""
    for make in (models.vision, further.scaled):
        assert "like:" not in of_model(*make()).text


def test_layers_may_be_members_of_a_map() -> None:
    model, _ = further.banks()
    kit = ak.attach(model, "lora[targets=[v]]", interface=_file("banks"))
    assert [slot.path for slot in kit["default"].plan.slots] == ["layers.0.attn.qkv", "layers.1.attn.qkv"]


class Told(models.Rotary):
    """Told where its tokens stand, and what each may see."""

    def forward(self, ids: Any, where: Any, pairs: Any = None) -> Any:  # type: ignore[override]
        mask = torch.ones(2 * (ids.shape[1],), dtype=torch.bool).tril()[None] if pairs is None else pairs
        x = self.tok(ids)
        for block in self.stack:
            x = block(x, where, mask[:, None])
        return self.lm_head(self.final(x))


def _told() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    where = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 0, 1, 2]])
    return Told(), {"ids": torch.randint(5, 50, (2, 7)), "where": where}


def test_positions_under_any_name_are_those_that_count() -> None:
    model, inputs = _told()
    for block in model.stack:  # type: ignore[union-attr]
        block.attn.num_key_value_heads = 2
    found = of_model(model, inputs)
    (stack,) = found.interface.stacks.values()
    assert (stack.inputs.positions, stack.inputs.filler) == ("where", 1)
    kit = ak.attach(model, "prompt_tuning[prompt_length=3]", interface=found.interface, seed=0)
    seen: list[Any] = []
    model.stack[0].register_forward_pre_hook(lambda m, args: seen.append(args[1]))  # type: ignore[union-attr, index]
    assert model(**inputs).shape == (2, 7, 50) and kit.active == "default"
    assert seen[0].tolist() == [[*range(10)], [0, 1, 2, 3, 4, 5, 6, 3, 4, 5]]


def test_a_ready_made_mask_of_pairs_leaves_no_place_for_a_prompt() -> None:
    model, inputs = _told()
    pairs = torch.ones(2, 7, 7, dtype=torch.bool).tril()
    found = of_model(model, {**inputs, "pairs": pairs})
    assert found.data["unsupported"] == {
        "prompt_tuning": "numbers for pairs of positions are given to the stack, ready made"
    }


def test_an_image_as_wide_as_there_are_patches_is_no_mask_of_pairs() -> None:
    torch.manual_seed(0)
    model, inputs = further.denoiser()
    model.patches.proj = nn.Conv2d(3, 32, 4, 4)  # type: ignore[union-attr]
    found = of_model(model, {**inputs, "image": torch.randn(2, 3, 16, 16)})
    assert found.data["unsupported"] == {
        "prompt_tuning": "a number of each position is added behind the embeddings, and none of a prompt"
    }


def test_a_loop_over_pairs_of_modules_has_no_layers_and_a_hint() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            pairs = (nn.ModuleList([nn.LayerNorm(32), further.Joint(32, 4)]) for _ in range(2))
            self.words, self.pairs = nn.Embedding(50, 32), nn.ModuleList(pairs)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.words(ids)
            for norm, fn in self.pairs:  # type: ignore[attr-defined, misc]
                x = x + fn(norm(x))
            return x

    with pytest.raises(ResolveError) as caught:
        of_model(Loop(), {"ids": torch.arange(14).view(2, 7)})
    (problem,) = caught.value.problems
    assert problem.code == "nothing-to-draft" and "pairs.0.1, pairs.1.1" in problem.expected
    assert "forward of one module a layer" in problem.hint


def test_attention_outside_the_layers_is_told() -> None:
    class Behind(further.Scaled):
        def __init__(self) -> None:
            super().__init__()
            self.last = further.Joint(32, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.blocks(self.norm_pre(self.drop(self.patches(x))))
            return self.head(self.norm(self.last(x)))

    found = of_model(Behind(), {"x": torch.randn(2, 3, 8, 8)})
    assert "attention in last is in none of these layers: nothing is said of it" in found.text


# ------------------------------------------------------------------------------------------- patched by hand


def _moved(name: str, config: str, make: Callable[[], further.Made]) -> tuple[nn.Module, nn.Module, Any, Any]:
    """A model with an adapter away from its start, the same without, the inputs, the adapter's tensors."""
    (model, inputs), (plain, _) = make(), make()
    kit = ak.attach(model, config, interface=_file(name), seed=0, head=False)
    randomise(kit)
    return model.eval(), plain.eval(), inputs, kit["default"].state_dict()


def test_lora_at_the_one_head_of_values_changes_its_rows() -> None:
    model, plain, inputs, tensors = _moved("banks", "lora[r=2, alpha=4, targets=[v]]", further.banks)
    for index, layer in enumerate(plain.layers.values()):  # type: ignore[operator, union-attr]
        found = {key.rpartition(".")[2]: value for key, value in tensors.items() if f".{index}." in key}
        with torch.no_grad():
            layer.attn.qkv.weight[-8:] += 4 / 2 * found["B"] @ found["A"]
    torch.testing.assert_close(model(**inputs), plain(**inputs), rtol=1e-5, atol=1e-5)


def test_a_prompt_before_layers_whose_mask_has_an_axis_of_queries() -> None:
    model, plain, inputs, tensors = _moved("classic", "prompt_tuning[prompt_length=3]", further.classic)
    (prompt,) = tensors.values()
    x = torch.cat([prompt.expand(2, -1, -1), plain.pieces(inputs["seq"], inputs["seg"])], 1)  # type: ignore[operator]
    for block in plain.blocks:  # type: ignore[union-attr]
        x = block(x, torch.nn.functional.pad(inputs["mask"], (3, 0), value=True))
    wanted = plain.follows(x[:, 3]), plain.words(x[:, 3:])  # type: ignore[operator]
    torch.testing.assert_close(model(**inputs), wanted, rtol=1e-5, atol=1e-6)


def test_layers_that_stand_in_their_list_twice() -> None:
    class Twice(further.Classic):
        def __init__(self) -> None:
            super().__init__()
            one, two = self.blocks
            self.blocks, self.last = nn.ModuleList([one, one, two, two]), nn.LayerNorm(32)

        def forward(self, seq: Any, seg: Any, mask: Any) -> Any:
            x = self.pieces(seq, seg)
            for block in self.blocks:
                x = block(x, mask)
            return self.follows(self.last(x)[:, 0])

    def make() -> further.Made:
        _, inputs = further.classic()
        return Twice(), inputs

    text = _text("classic").replace("    layers: blocks\n", "    layers: blocks\n    final_norm: last\n")
    spec = ak.Interface.load(yaml.safe_load(text.replace("heads: [follows, words]", "heads: [follows]")))
    report = ak.check(spec, make, methods=["lora", "bottleneck", "reft"])
    assert [str(problem) for problem in report.problems] == []
    assert {verdict.state for verdict in report.methods} == {"proved"}


def test_a_mask_of_pairs_has_no_room_for_a_prompt() -> None:
    model, inputs = further.classic()
    ak.attach(model, "prompt_tuning", interface=_file("classic"))
    inputs["mask"] = inputs["mask"].expand(-1, 7, -1)
    with pytest.raises(PlanError, match=r"\[unfit-input\](.|\n)*'mask' is no mask \(B, T\)"):
        model(**inputs)


def test_reft_edits_the_first_token_that_a_mask_with_three_axes_shows() -> None:
    def padded() -> further.Made:
        model, inputs = further.classic()
        inputs["mask"] = torch.ones(2, 1, 7, dtype=torch.bool)
        inputs["mask"][1, 0, :2] = False
        return model, inputs

    config = "loreft[r=2, prefix_positions=1, suffix_positions=0]"
    model, plain, inputs, _ = _moved("classic", config, padded)
    seen: list[torch.Tensor] = []
    for one in (model, plain):
        one.blocks[0].register_forward_hook(lambda m, a, out: seen.append(out))  # type: ignore[union-attr, index]
    model(**inputs), plain(**inputs)
    differs = (seen[0] != seen[1]).any(-1)
    assert differs.tolist() == [[True] + [False] * 6, [False, False, True] + [False] * 4]


def _of_layer(tensors: dict[str, torch.Tensor], index: int, word: str) -> torch.Tensor:
    (found,) = [value for key, value in tensors.items() if f".{index}." in key and word in key]
    return found


def test_reft_where_gates_follow_the_branches() -> None:
    """h + R'(W h + b - R h), at the first token alone."""
    config = "noreft[r=2, prefix_positions=1, suffix_positions=0]"
    model, plain, inputs, tensors = _moved("denoiser", config, further.denoiser)

    def edited(index: int, out: torch.Tensor) -> torch.Tensor:
        rows, weight = (_of_layer(tensors, index, word) for word in ("projection", "source.weight"))
        h = out[:, 0]
        new = h + (h @ weight.T + _of_layer(tensors, index, "source.bias") - h @ rows.T) @ rows
        return torch.cat([new[:, None], out[:, 1:]], 1)

    for index, block in enumerate(plain.blocks):  # type: ignore[arg-type]
        block.register_forward_hook(lambda m, args, out, i=index: edited(i, out))
    torch.testing.assert_close(model(**inputs), plain(**inputs), rtol=1e-5, atol=1e-5)


def test_a_bottleneck_reads_the_sum_with_the_half_of_a_branch() -> None:
    """Pfeiffer's: with h = f(x) / 2, LN(x + h + up(relu(down(LN(x + h)))))."""
    model, plain, inputs, tensors = _moved("sound", "seq_bn[reduction_factor=4]", further.sound)

    def layer(index: int, block: Any, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        x = x + 0.5 * block.front(x)
        x = x + block.attend(x, hidden)
        x = x + block.mix(x)
        h, part = 0.5 * block.rear(x), dict[str, torch.Tensor]()
        for word in ("down.weight", "down.bias", "up.weight", "up.bias"):
            part[word] = _of_layer(tensors, index, word)
        z = torch.relu(block.norm(x + h) @ part["down.weight"].T + part["down.bias"])
        return block.norm(x + h + z @ part["up.weight"].T + part["up.bias"])

    for index, block in enumerate(plain.layers):  # type: ignore[arg-type]
        block.forward = lambda x, hidden, i=index, own=block: layer(i, own, x, hidden)
    torch.testing.assert_close(model(**inputs), plain(**inputs), rtol=1e-5, atol=1e-5)


def test_an_adapter_comes_back_from_its_files(tmp_path: Path) -> None:
    for name in REFUSED:
        model, inputs = getattr(further, name)()
        kit = ak.attach(model, "lora", interface=_file(name), seed=0)
        randomise(kit)
        kit.save(tmp_path / name)
        fresh, _ = getattr(further, name)()
        ak.load(fresh, tmp_path / name)
        with torch.no_grad():
            for ours, wanted in zip(
                _flat(fresh.eval()(**inputs)), _flat(model.eval()(**inputs)), strict=True
            ):
                assert torch.equal(ours, wanted)


def _flat(out: Any) -> tuple[torch.Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)
