"""Words for families that are not plain: lacking roles, factors, parallel by config, unequal heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.errors import PlanError, SpecError
from adapterkit.model.branches import branches
from adapterkit.model.cores import cores
from adapterkit.model.layouts import split
from adapterkit.model.resolve import resolve
from adapterkit.spec import registry
from tests.specs.toys import Attention, Block, Fused, Gated, Mlp, Toy

ATTENTION = {"core": "attn", "q": "attn.q", "k": "attn.k", "v": "attn.v", "o": "attn.o"}


def spec(**stack: Any) -> dict[str, Any]:
    return {"adapterkit": 1, "stacks": {"decoder": {"layers": "blocks", **stack}}}


def code_of(data: dict[str, Any]) -> str:
    with pytest.raises(SpecError) as found:
        registry.load(data)
    return found.value.code


# ------------------------------------------------------------------------------------------------- without

REASON = "a bank of experts"
EITHER = {
    "any_of": [
        {"gate": "mlp.gate", "up": "mlp.up", "down": "mlp.down"},
        {"out": "mlp", "without": {"gate": REASON, "up": REASON, "down": REASON}},
    ]
}


class Bank(nn.Module):
    """Experts in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 8, 8))


def test_what_does_without_fits_where_nothing_with_it_does() -> None:
    toy = Toy(Block(Attention(), Gated()), Block(Attention(), Bank()))
    found = resolve(toy, spec(attention=ATTENTION, mlp=EITHER))
    assert {a for a in found.slots if ".mlp." in a} == {f"decoder.0.mlp.{r}" for r in ("gate", "up", "down")}
    assert found.places["decoder.1.mlp.out"].module is toy.blocks[1].mlp
    assert set(found.without) == {"decoder.1.mlp"}


def test_a_target_is_not_missing_where_the_interface_says_why() -> None:
    toy = Toy(Block(Attention(), Gated()), Block(Attention(), Bank()))
    plan = ak.plan(toy, "lora[targets=[down], r=2]", interface=spec(attention=ATTENTION, mlp=EITHER))
    assert [slot.address for slot in plan.slots] == ["decoder.0.mlp.down"]


def test_the_reason_is_told() -> None:
    toy = Toy(*(Block(Attention(), Bank()) for _ in range(2)))
    with pytest.raises(PlanError, match=f"no 'down'.*: {REASON}"):
        ak.plan(toy, "lora[targets=[down]]", interface=spec(attention=ATTENTION, mlp=EITHER))


def test_a_sublayer_may_have_roles_and_no_branch() -> None:
    said = spec(attention={**ATTENTION, "without": {"branch": "it is added to another"}})
    found = resolve(Toy(Block(Attention(), Mlp())), said)
    assert "decoder.0.attention.q" in found.slots and branches(found) == {}


def test_what_is_there_is_not_lacking() -> None:
    assert code_of(spec(attention={**ATTENTION, "without": {"q": "a reason"}})) == "named-twice"
    assert code_of(spec(mlp={"out": "mlp", "without": {"quary": "a reason"}})) == "wrong-value"


# ------------------------------------------------------------------------------------------------- otherwise


@pytest.mark.parametrize(("last", "found"), [(True, True), (False, False)])
def test_a_module_that_has_a_role_under_one_config_may_exist_under_another(last: bool, found: bool) -> None:
    toy = Toy(Block(Attention(), Mlp()), norm_last=last)
    toy.norm = nn.LayerNorm(8)
    norm = {"path": "norm", "when": {"norm_last": True}}
    said = spec(attention=ATTENTION, final_norm={**norm, "otherwise": "it stands before the layers"})
    assert ("decoder.final_norm" in resolve(toy, said).places) is found
    plain = spec(attention=ATTENTION, final_norm=norm)
    if not found:
        with pytest.raises(ak.errors.ResolveError, match="exists although"):
            resolve(toy, plain)
    assert (
        code_of(spec(attention=ATTENTION, final_norm={"path": "norm", "otherwise": "it stands before"}))
        == "missing-word"
    )


# --------------------------------------------------------------------------------------------------- scale


class Scaled(nn.Module):
    """x + 0.5 * h, with a factor that the layer, the config or nobody keeps."""

    def __init__(self, factor: float | Tensor) -> None:
        super().__init__()
        self.ln, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.down(self.up(self.ln(x)).relu())
        return x + h * self.factor


class Column(Toy):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize(
    ("factor", "said"), [(0.5, 0.5), (0.5, "factor"), (0.5, "multiplier"), (torch.full((8,), 0.5), "factor")]
)
@pytest.mark.parametrize("before", [True, False])
def test_a_factor_counts_in_the_sum(factor: Any, said: Any, before: bool) -> None:
    """The adapter reads x + 0.5 h, or 0.5 h, and what it gives is added to the stream as it is."""
    torch.manual_seed(0)
    model = Column(Scaled(factor), multiplier=0.5).eval()
    mlp = {"norm": {"before": "ln"}, "up": "up", "down": "down", "scale": said}
    ids = torch.arange(6).view(2, 3)
    x, layer = model.embed(ids), model.blocks[0]
    h = 0.5 * layer.down(layer.up(layer.ln(x)).relu())
    method = f"seq_bn[reduction_factor=4, original_ln_before={str(before).lower()}]"
    kit = ak.attach(model, method, interface=spec(mlp=mlp), seed=0)
    unit = next(m for m in model.modules() if type(m).__name__ == "Bottleneck")
    z = h + x if before else h
    update = unit.up(torch.relu(unit.down(z)))
    own = h if unit.config.residual_before_ln else z
    torch.testing.assert_close(model(ids), x + own + update)
    kit.detach()
    torch.testing.assert_close(model(ids), x + h)


def test_an_unknown_factor_is_refused() -> None:
    with pytest.raises(ak.errors.ResolveError, match="neither the config nor the layer has a number 'alpha'"):
        resolve(Column(Scaled(0.5)), spec(mlp={"up": "up", "down": "down", "scale": "alpha"}))


# ------------------------------------------------------------------------------------- parallel, start, base


@pytest.mark.parametrize(("config", "expected"), [({"a": 1, "b": 2}, True), ({"a": 0, "b": 2}, False)])
def test_a_block_is_parallel_by_config(config: dict[str, int], expected: bool) -> None:
    said = spec(attention=ATTENTION, block="parallel", parallel_when=[{"a": 1}, {"b": 1}])
    assert resolve(Toy(Block(Attention(), Mlp()), **config), said).stacks["decoder"].parallel is expected


def test_the_place_where_the_stream_enters_may_be_named() -> None:
    toy = Toy(Block(Attention(), Mlp()))
    found = branches(resolve(toy, spec(mlp={"up": "mlp.up", "down": "mlp.down", "start": "."})))
    assert found["decoder.0.mlp"].start.module is toy.blocks[0]


def test_modules_between_are_no_heads_and_the_base_may_be_named() -> None:
    outer = nn.Module()
    outer.inner, outer.bridge, outer.head = Toy(Block(Attention(), Mlp())), nn.Linear(8, 8), nn.Linear(8, 2)
    said = {**spec(attention=ATTENTION, at="inner"), "base": ".", "between": ["bridge"]}
    found = resolve(outer, said)
    assert found.stacks["decoder"].root is outer.inner
    wrapped = nn.Module()
    wrapped.model, wrapped.head = outer, nn.Linear(8, 2)
    found = resolve(wrapped, {**said, "base": "model"})
    assert found.stacks["decoder"].path == "model.inner"
    assert [head.path for head in found.heads] == ["head"]


# -------------------------------------------------------------------------------------- fused matrices, sizes


def test_heads_of_unequal_widths() -> None:
    """Per head 3 rows of keys, then 2 of values."""
    rows = split(20, "per_head", ("k", "v"), 4, 4, {"k": 3, "v": 2})
    weight = torch.arange(20)
    assert rows["k"].take(weight).tolist() == [0, 1, 2, 5, 6, 7, 10, 11, 12, 15, 16, 17]
    assert rows["v"].take(weight).tolist() == [3, 4, 8, 9, 13, 14, 18, 19]
    with pytest.raises(ValueError, match="21 rows"):
        split(21, "per_head", ("k", "v"), 4, 4, {"k": 3, "v": 2})


def test_groups_that_are_no_heads() -> None:
    rows = split(12, "per_group", ("q", "v", "k"), 4, 4, groups=2)
    assert rows["v"].take(torch.arange(12)).tolist() == [2, 3, 8, 9]


def test_rows_of_no_role_are_left_alone() -> None:
    attention = {
        "core": "attn",
        "fused": {
            "path": "attn.qkv",
            "layout": "blocks",
            "order": ["_", "v"],
            "widths": {"_": 4, "v": "two"},
        },
        "o": "attn.o",
        "sizes": {"heads": 4, "kv_heads": 4, "head_dim": 6, "value_dim": 2},
        "without": {"k": "made elsewhere"},
    }
    found = resolve(Toy(Block(Fused(), Mlp()), two=2), spec(attention=attention))
    slot = found.slots["decoder.0.attention.v"]
    assert slot.shape == (8, 8) and slot.rows is not None and slot.rows.start == 16
    assert "decoder.0.attention._" not in found.slots
    core = cores(found)["decoder.0.attention.core"]
    assert (core.kv_heads, core.key_dim, core.value_dim, core.width) == (4, 6, 2, 8)


def test_widths_are_one_for_each_role() -> None:
    fused = {"path": "attn.qkv", "layout": "blocks", "order": ["q", "k", "v"], "widths": {"q": 2}}
    assert code_of(spec(attention={"core": "attn", "o": "attn.o", "fused": fused})) == "bad-order"
