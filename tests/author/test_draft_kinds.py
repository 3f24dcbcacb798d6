"""Drafts of models whose layers differ, that lead to each other, or that cannot have every method."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from adapterkit.author import draft as drafting
from adapterkit.author.axes import examples
from adapterkit.author.describe import Notes
from adapterkit.author.draft import Draft
from adapterkit.author.prove import prove_method
from adapterkit.author.scene import Scene
from adapterkit.author.yamltext import written
from adapterkit.errors import PlanError
from adapterkit.model.resolve import resolve

WIDTH, HEADS = 24, 4
IDS = {"input_ids": torch.arange(12).view(2, 6)}


class Attention(nn.Module):
    """Keys and values of all heads come out of one matrix; part of each key out of another."""

    def __init__(self, own: int = 6, shared: int = 0, wide: int = 6) -> None:
        super().__init__()
        self.num_heads, self.own_head_dim, self.v_head_dim = HEADS, own, wide
        self.qk_head_dim = own + shared
        self.q = nn.Linear(WIDTH, HEADS * (own + shared))
        self.kv = nn.Linear(WIDTH, HEADS * (own + wide))
        self.rest = nn.Linear(WIDTH, max(shared, 1))
        self.o = nn.Linear(HEADS * wide, WIDTH)
        self.sizes = own, shared, wide

    def forward(self, x: Tensor) -> Tensor:
        own, shared, wide = self.sizes
        q = self.q(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (HEADS, -1)).transpose(1, 2).split([own, wide], -1)
        if shared:
            k = torch.cat([k, self.rest(x)[:, None].expand(-1, HEADS, -1, -1)], dim=-1)
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.o(out.transpose(1, 2).flatten(2))


class Mixer(nn.Module):
    """Mixes the tokens, without attention."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x).cumsum(1).tanh())


class Layer(nn.Module):
    def __init__(self, mix: nn.Module) -> None:
        super().__init__()
        self.add_module("attention" if isinstance(mix, Attention) else "mixer", mix)
        self.first, self.second = nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)
        self.norm_a, self.norm_b = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        mix = self.attention if hasattr(self, "attention") else self.mixer
        x = x + mix(self.norm_a(x))
        return x + self.second(self.first(self.norm_b(x)).relu())


class Column(nn.Module):
    def __init__(self, *mixes: nn.Module) -> None:
        super().__init__()
        self.words = nn.Embedding(70, WIDTH)
        self.layers = nn.ModuleList(map(Layer, mixes))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.words(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


class Stream(nn.Module):
    """Layers alone, which are called with states."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(Attention())])

    def forward(self, states: Tensor) -> Tensor:
        for layer in self.layers:
            states = layer(states)
        return states


class Packed(Stream):
    """The same, with the tokens of all examples in one axis."""

    def forward(self, states: Tensor) -> Tensor:
        return super().forward(states.flatten(0, 1)[None])


class Seeing(nn.Module):
    """A tower whose states are the first tokens of a text."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = Stream()
        self.text = Column(Attention())

    def forward(self, input_ids: Tensor, pixels: Tensor) -> Tensor:
        x = torch.cat([self.vision(pixels), self.text.words(input_ids)], dim=1)
        for layer in self.text.layers:
            x = layer(x)
        return x


class Turned(nn.Module):
    """Attention that is computed with the tokens in the first axis; rotations are made for every position."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        y = x.transpose(0, 1)
        q, k, v = (one(y).unflatten(-1, (HEADS, -1)).permute(1, 2, 0, 3) for one in (self.q, self.k, self.v))
        out = nn.functional.scaled_dot_product_attention(q * turn, k * turn, v)
        return self.o(out.permute(2, 0, 1, 3).flatten(2)).transpose(0, 1)


class TurnedLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm_a, self.norm_b = Turned(), nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.first, self.second = nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        x = self.norm_a(x + self.attention(x, turn))
        return self.norm_b(x + self.second(self.first(x).relu()))


class TurnedColumn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(TurnedLayer() for _ in range(2))

    def forward(self, states: Tensor) -> Tensor:
        turn = torch.arange(states.shape[1]).float().cos()[:, None].expand(-1, WIDTH // HEADS)
        states = self.map(states)
        for layer in self.layers:
            states = layer(states, turn)
        return states


def drafted(model: nn.Module, **inputs: Tensor) -> Draft:
    torch.manual_seed(0)
    return drafting.of_model(model.eval(), inputs or IDS, like=False)


def test_a_mixer_stands_in_the_place_of_attention() -> None:
    found = drafted(Column(Attention(), Mixer(), Attention()))
    assert found.is_complete
    attention = found.data["stacks"]["encoder"]["attention"]["any_of"]
    assert [one.get("core") for one in attention] == ["attention", None]
    assert attention[1]["out"] == "mixer" and set(attention[1]["without"]) == {"core", "q", "k", "v", "o"}
    blueprint = resolve(found.model, found.interface)
    assert {a.rpartition(".")[2] for a in blueprint.slots if a.startswith("encoder.1.attention.")} == {
        "inner",
        "outer",
    }
    verdict = prove_method("bottleneck", found.interface, Scene("toy", found.model, found.inputs), blueprint)
    assert verdict.state == "proved", str(verdict)


def test_a_matrix_of_values_and_a_part_of_the_keys() -> None:
    found = drafted(Column(Attention(own=5, shared=3, wide=6)))
    attention = found.data["stacks"]["encoder"]["attention"]
    assert found.is_complete
    assert attention["fused"] == {
        "path": "attention.kv",
        "layout": "per_head",
        "order": ["_", "v"],
        "widths": {"_": "own_head_dim", "v": "v_head_dim"},
    }
    assert set(attention["without"]) == {"k"}
    assert attention["sizes"] == {"head_dim": "qk_head_dim", "value_dim": "v_head_dim"}
    rows = resolve(found.model, found.interface).slots["encoder.0.attention.v"].rows
    assert rows is not None
    values = {head * 11 + 5 + i for head in range(HEADS) for i in range(6)}
    assert set(rows.take(torch.arange(44)).tolist()) == values


def test_a_tower_that_leads_to_a_text_is_adapted_when_it_is_addressed() -> None:
    found = drafted(Seeing(), input_ids=IDS["input_ids"], pixels=torch.randn(2, 5, WIDTH))
    blueprint = resolve(found.model, found.interface)
    assert {name: info.by_default for name, info in blueprint.stacks.items()} == {
        "vision": False,
        "text": True,
    }


def test_a_stream_without_an_axis_of_examples_has_no_positions() -> None:
    found = drafted(Packed(), states=torch.randn(2, 5, WIDTH))
    stack = found.data["stacks"]["encoder"]
    assert stack["batch"] == "none" and stack["attention"]["q"] == "attention.q"
    assert set(found.data["unsupported"]) == {"prompt_tuning", "reft", "invertible"}
    whole = drafted(Stream(), states=torch.randn(2, 5, WIDTH))
    assert "batch" not in whole.data["stacks"]["encoder"] and set(whole.data["unsupported"]) == {"invertible"}


def test_what_a_model_cannot_have_is_refused_with_the_reason() -> None:
    found = drafted(Stream(), states=torch.randn(2, 5, WIDTH))
    verdict = prove_method(
        "invertible",
        found.interface,
        Scene("toy", found.model, found.inputs),
        resolve(found.model, found.interface),
    )
    assert (verdict.state, verdict.code) == ("refused", "unsupported")
    assert "comes out of no module" in verdict.reason


def test_roles_reach_a_stack_that_is_not_meant_by_default_when_it_is_addressed() -> None:
    import adapterkit as ak

    found = drafted(Seeing(), input_ids=IDS["input_ids"], pixels=torch.randn(2, 5, WIDTH))
    usual = ak.plan(found.model, "lora[targets=[q], r=2]", interface=found.interface)
    assert {slot.stack for slot in usual.slots} == {"text"}
    addressed = ak.LoRAConfig(targets=("vision.attention.q",), r=2)
    assert {slot.stack for slot in ak.plan(found.model, addressed, interface=found.interface).slots} == {
        "vision"
    }
    with pytest.raises(PlanError):
        ak.plan(found.model, ak.LoRAConfig(targets=("vision.attention.x",), r=2), interface=found.interface)


@pytest.fixture(scope="module")
def turned() -> Draft:
    return drafted(TurnedColumn(), states=torch.randn(2, 5, WIDTH))


def test_projections_that_see_the_examples_in_the_second_axis(turned: Draft) -> None:
    attention = turned.data["stacks"]["encoder"]["attention"]
    assert {role: attention[role] for role in "qkvo"} == {
        role: {"path": f"attention.{role}", "batch": "second"} for role in "qkvo"
    }
    assert (attention["start"], attention["out"]) == ("attention", "attention")
    assert attention["norm"] == {"after_residual": "norm_a"}


@pytest.mark.parametrize("method", ["fusion", "reft", "lora"])
def test_what_reads_the_stream_is_not_turned(turned: Draft, method: str) -> None:
    blueprint = resolve(turned.model, turned.interface)
    verdict = prove_method(method, turned.interface, Scene("toy", turned.model, turned.inputs), blueprint)
    assert verdict.state == "proved", str(verdict)


def test_a_prompt_is_tried_before_it_is_said_to_have_no_place(turned: Draft) -> None:
    assert set(turned.data["unsupported"]) == {"prompt_tuning"}
    assert "turn is made for every position" in turned.data["unsupported"]["prompt_tuning"]
    # the same, made inside the layers: nothing is in its way
    assert "unsupported" not in drafted(Column(Attention(), Attention())).data


class Skewed(nn.Module):
    """Attention is made of one value of the stream and added to another: no word says that."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, WIDTH)
        self.layers = nn.ModuleList(SkewedLayer() for _ in range(2))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.table(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


class SkewedLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.shift = Attention(), nn.Parameter(torch.ones(WIDTH))
        self.first, self.second = nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(x) + self.shift.expand_as(x) + x
        return x + self.second(self.first(x).relu())


def test_a_draft_that_check_refutes_says_so() -> None:
    found = drafting.of_model(Skewed().eval(), IDS, like=False)
    told = "`check` refutes: attention is added to what it was made of"
    assert [loc for loc, text in found.notes.remarks if told in text] == [("stacks", "encoder", "attention")]
    assert f"# {told}" in found.text


def test_every_remark_stands_in_the_file_also_where_its_word_does_not() -> None:
    notes = Notes()
    places = ("stacks.encoder.inputs.mask", "stacks.encoder.pooler", "stacks.encoder.layers", "like", "heads")
    for place in places:
        notes.remark(tuple(place.split(".")), f"of {place.split('.')[-1]}")
    notes.remark(("stacks", "encoder", "mlp", "up"), "made of updates")
    data = {"adapterkit": 1, "stacks": {"encoder": {"inputs": {"ids": None}, "layers": "layer"}}}
    assert written(data, notes, "Model").splitlines()[2:] == [
        "# look at: of like",
        "# look at: of heads",
        "adapterkit: 1",
        "stacks:",
        "  # of pooler",
        "  # mlp.up: made of updates",
        "  encoder:",
        "    # of mask",
        "    inputs: {ids: null}",
        "    # of layers",
        "    layers: layer",
    ]


def test_examples_are_counted_by_most_inputs() -> None:
    patches, grid, ids = torch.zeros(32, 4), torch.zeros(2, 3), torch.zeros(2, 7)
    assert examples([patches, grid, ids]) == 2
    assert examples([patches, ids]) == 32
    assert examples([torch.tensor(1.0)]) == examples([]) == 1
