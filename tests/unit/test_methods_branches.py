"""Every method between sublayers on one branch equals the formula of its paper, in float64."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapterkit.errors import ConfigError, PlanError
from adapterkit.inject.site import open_site
from adapterkit.methods.names import parse
from adapterkit.model.blueprint import Slot
from adapterkit.model.branches import Branch
from adapterkit.runtime import Program, Record, Runtime
from tests.oracles import bottleneck, compacter, fusion, invertible, reft
from tests.oracles.bottleneck import Form

D, BATCH, TOKENS = 12, 3, 7
BRANCH = "encoder.0.mlp"


class Layer(nn.Module):
    """A sublayer with its residual: norm -> up -> down -> tail -> add -> norm, one of the norms missing."""

    def __init__(self, post: bool) -> None:
        super().__init__()
        self.before = nn.Identity() if post else nn.LayerNorm(D)
        self.up, self.down, self.tail = nn.Linear(D, 5), nn.Linear(5, D), nn.Identity()
        self.after = nn.LayerNorm(D) if post else nn.Identity()
        self.post = post
        redraw(self.double(), 3)

    def branch(self, x: Tensor) -> Tensor:
        return self.tail(self.down(torch.tanh(self.up(self.before(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.branch(x) + x)

    def add(self, h: Tensor, x: Tensor) -> Tensor:
        if not self.post:
            return h + x
        return bottleneck.layer_norm(h + x, self.after.weight, self.after.bias)


@torch.no_grad()
def redraw(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in module.named_parameters()}


def tokens(seed: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, TOKENS, D, generator=generator, dtype=torch.float64)


def slot(layer: Layer, word: str) -> Slot:
    return Slot(f"{BRANCH}.{word}", word, "encoder", 0, "mlp", layer.get_submodule(word), word)


def branch(layer: Layer, *, parallel: bool = False) -> Branch:
    return Branch(
        address=BRANCH,
        role="branch",
        stack="encoder",
        layer=0,
        sublayer="mlp",
        module=layer.tail,
        path="tail",
        shape=(D, D),
        start=slot(layer, "up" if layer.post else "before"),
        inside=slot(layer, "up"),
        projection=slot(layer, "down"),
        after_residual=slot(layer, "after") if layer.post else None,
        parallel=parallel,
    )


def built(method: Any, place: Slot, seed: int = 5) -> Any:
    """The unit of a method at a place, random, in float64, in eval mode."""
    config = parse(method)
    config.check([place])
    shared = config.share([place], None)
    unit = config.build(place, shared, None)
    for module in (shared, unit):
        if module is not None:
            redraw(module.double().eval(), seed)
    return unit


def run(layer: Layer, unit: nn.Module, x: Tensor) -> Tensor:
    """The layer with a unit at its branch, put there by the same helpers as in a model."""
    runtime = Runtime()
    place = branch(layer)
    programs: dict[str, list[tuple[int, str, str]]] = {}
    for found in unit.config.helpers([place], None):
        open_site(found.place.module, found.place.path, runtime)
        found.place.module.adapterkit._modules[found.key] = found.make()
        programs.setdefault(found.place.path, []).append((found.phase, found.acts_on, found.key))
    open_site(layer.tail, "tail", runtime)
    layer.tail.adapterkit._modules["unit"] = unit
    programs.setdefault("tail", []).append((unit.phase, "output", "unit"))
    for path, steps in programs.items():
        by_side = {side: tuple(k for _, s, k in sorted(steps) if s == side) for side in ("input", "output")}
        site = layer.get_submodule(path).adapterkit
        site.program = Program(inputs=by_side["input"], outputs=by_side["output"])
    with torch.no_grad():
        out = layer(x)
    assert runtime.override.flow == {}
    return out


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


FORMS = [
    dict(zip(("original_ln_before", "original_ln_after", "residual_before_ln"), values, strict=True))
    for values in product((False, True), (True, False), (True, False, "post_add"))
]
OWN_NORMS = [
    {},
    {"ln_before": True},
    {"ln_after": True},
    {"ln_after": True, "adapter_residual_before_ln": True},
    {"ln_before": True, "ln_after": True},
    {"adapter_residual_before_ln": True},
]


def form(options: dict[str, Any]) -> Form:
    return Form(
        parallel=options.get("is_parallel", False),
        reads_sum=options.get("original_ln_before", False),
        residual={True: "branch", False: "read", "post_add": "sum"}[options.get("residual_before_ln", True)],
        residual_first=options.get("adapter_residual_before_ln", False),
        model_adds=options.get("original_ln_after", True),
    )


def check(options: dict[str, Any], post: bool, act: str = "relu", scale: Any = 1.0) -> None:
    layer, x = Layer(post), tokens()
    bare, h = layer(x), layer.branch(x)
    method = {"method": "bottleneck", "reduction_factor": 4, **options}
    unit = built(method, branch(layer))
    found = run(layer, unit, x)
    scale = unit.scale if isinstance(options.get("scaling"), str) else scale
    close(found, bottleneck.sublayer(h, x, tensors(unit), form(options), layer.add, act, scale))
    assert (found - bare).abs().max() > 1e-2


POST = pytest.mark.parametrize("post", [True, False], ids=["post-norm", "pre-norm"])


@POST
@pytest.mark.parametrize("norms", OWN_NORMS, ids=lambda norms: "+".join(norms) or "no-norms")
def test_what_is_read_and_what_is_added(norms: dict[str, bool], post: bool) -> None:
    for options in FORMS:
        check({**options, **norms}, post)


@POST
@pytest.mark.parametrize("norms", OWN_NORMS, ids=lambda norms: "+".join(norms) or "no-norms")
def test_parallel(norms: dict[str, bool], post: bool) -> None:
    check({"is_parallel": True, **norms}, post)
    check({"is_parallel": True, "original_ln_after": False, **norms}, post)


ODD = pytest.mark.parametrize(
    "norms", [OWN_NORMS[0], OWN_NORMS[3], OWN_NORMS[4]], ids=lambda norms: "+".join(norms) or "no-norms"
)


@POST
@ODD
def test_branch_and_residual_may_change_places(norms: dict[str, bool], post: bool) -> None:
    """`swapped` is the sublayer with h for x and x for h."""
    for options in (*FORMS, {"is_parallel": True}, {"is_parallel": True, "original_ln_after": False}):
        layer, x = Layer(post), tokens()
        h = layer.branch(x)
        given = {**options, **norms}
        unit = built({"method": "bottleneck", "reduction_factor": 4, "swapped": True, **given}, branch(layer))
        close(run(layer, unit, x), bottleneck.sublayer(x, h, tensors(unit), form(given), layer.add))


@POST
@ODD
def test_the_branch_may_first_be_replaced_by_its_sum(norms: dict[str, bool], post: bool) -> None:
    """`original_ln_first` is the sublayer that gives the sum with x (normed where the model does) for h."""
    for options in FORMS:
        layer, x = Layer(post), tokens()
        total = layer.add(layer.branch(x), x)
        given = {**options, **norms}
        unit = built(
            {"method": "bottleneck", "reduction_factor": 4, "original_ln_first": True, **given}, branch(layer)
        )
        close(run(layer, unit, x), bottleneck.sublayer(total, x, tensors(unit), form(given), layer.add))


@POST
@ODD
def test_the_residual_may_be_the_normed_input(norms: dict[str, bool], post: bool) -> None:
    """`residual="input"` reads what the first projection reads; the model still adds the stream."""
    layer, x = Layer(post), tokens()
    h, normed = layer.branch(x), layer.before(x)
    for options in [*(o for o in FORMS if o["original_ln_after"]), {"is_parallel": True}]:
        given = {**options, **norms}
        unit = built(
            {"method": "bottleneck", "reduction_factor": 4, "residual": "input", **given}, branch(layer)
        )
        own = replace(form(given), model_adds=False)
        close(
            run(layer, unit, x), layer.add(bottleneck.sublayer(h, normed, tensors(unit), own, layer.add), x)
        )
    with pytest.raises(PlanError) as refused:
        built({"method": "bottleneck", "residual": "input", "original_ln_after": False}, branch(layer))
    assert refused.value.code == "no-own-sum"


@pytest.mark.parametrize("scaling", [0.5, 4, "learned", "channel"])
@pytest.mark.parametrize("is_parallel", [True, False])
def test_scaling(scaling: Any, is_parallel: bool) -> None:
    for gating in (True, False):
        options = {"scaling": scaling, "is_parallel": is_parallel, "use_gating": gating}
        check(options, True, scale=scaling)


@pytest.mark.parametrize("act", bottleneck.ACTIVATIONS)
def test_activations(act: str) -> None:
    check({"non_linearity": act}, False, act)


@pytest.mark.parametrize(("factor", "width"), [(4, 3), (5, 2), (1.5, 8), (0.5, 24), (100, 1)])
def test_width(factor: float, width: int) -> None:
    place = branch(Layer(True))
    assert built({"method": "seq_bn", "reduction_factor": factor}, place).down.out_features == width
    for key in (BRANCH, "encoder.0", "0", 0, "encoder", "default"):
        mapping = {"encoder.1": 3, key: factor}
        assert built({"method": "seq_bn", "reduction_factor": mapping}, place).down.out_features == width


def test_the_more_exact_word_for_a_width_goes_first() -> None:
    given = {"default": 12, "encoder.0": 6, BRANCH: 4}
    widths = []
    for key in (BRANCH, "encoder.0", "default"):
        found = built({"method": "seq_bn", "reduction_factor": dict(given)}, branch(Layer(True)))
        widths.append(found.down.out_features)
        del given[key]
    assert widths == [3, 2, 1]


def test_stochastic_depth_leaves_out_examples_and_keeps_the_mean() -> None:
    layer, x = Layer(False), tokens()
    unit = built({"method": "bottleneck", "stochastic_depth": 0.25}, branch(layer))
    h, whole = layer.branch(x), unit.update(layer.branch(x))
    unit.train()
    torch.manual_seed(0)
    kept = 0
    for _ in range(200):
        found = unit.update(h)
        for row in range(BATCH):
            if found[row].any():
                close(found[row], whole[row] / 0.75)
                kept += 1
    assert 400 < kept < 500  # 450 of 600, within about five deviations


@pytest.mark.parametrize(("init", "std"), [("bert", 0.02), ("houlsby", 0.01), ("mam_adapter", None)])
def test_starts(init: str, std: float | None) -> None:
    place = branch(Layer(True))
    config = parse({"method": "bottleneck", "reduction_factor": 0.01, "init_weights": init})
    unit: Any = config.build(place, None, torch.Generator().manual_seed(0))
    assert not unit.down.bias.any() and not unit.up.bias.any()
    if std is None:  # Kaiming with a = sqrt(5): uniform in +-1 / sqrt(D)
        assert not unit.up.weight.any()
        assert 0.95 * D**-0.5 < unit.down.weight.abs().max() <= D**-0.5
        return
    for linear in (unit.down, unit.up):
        cut = 0.88 if init == "houlsby" else 1.0  # deviation of a normal variable cut at two deviations
        assert abs(linear.weight.std() / (std * cut) - 1) < 0.05
        assert init != "houlsby" or linear.weight.abs().max() <= 0.02


# ------------------------------------------------------------------------------------------------ compacter

PHM = [
    {"shared_phm_rule": rule, "factorized_phm_rule": fr, "shared_W_phm": factors, "factorized_phm_W": fw}
    for rule, fr, factors, fw in product((True, False), repeat=4)
]


@pytest.mark.parametrize("options", PHM, ids=lambda o: "-".join(k for k, v in o.items() if v) or "plain")
@pytest.mark.parametrize("rank", [1, 2])
def test_compacter(options: dict[str, bool], rank: int) -> None:
    layer, x = Layer(True), tokens()
    method = {"method": "compacter", "reduction_factor": 2, "phm_dim": 3, "phm_rank": rank, **options}
    unit = built(method, branch(layer))
    for linear, given in ((unit.down, x), (unit.up, x[..., :6])):
        rule = linear.shared[0] or linear.rule
        factors = linear.shared[1] or linear.factors
        assert ("rule" in dict(linear.named_children())) != options["shared_phm_rule"]
        assert ("factors" in dict(linear.named_children())) != options["shared_W_phm"]
        if options["factorized_phm_W"]:
            assert factors.left.shape[-1] == rank
        expected = compacter.phm(given, tensors(rule), tensors(factors), linear.bias.detach())
        close(linear(given).detach(), expected)
    h = layer.branch(x).detach()
    u = compacter.phm(
        bottleneck.gelu(_phm(unit.down, h)),
        tensors(unit.up.shared[0] or unit.up.rule),
        tensors(unit.up.shared[1] or unit.up.factors),
        unit.up.bias.detach(),
    )
    close(run(layer, unit, x), layer.add(u + h, x).detach())


def _phm(linear: Any, x: Tensor) -> Tensor:
    rule, factors = linear.shared[0] or linear.rule, linear.shared[1] or linear.factors
    return compacter.phm(x, tensors(rule), tensors(factors), linear.bias.detach())


def test_rules_start_with_the_spread_that_is_asked_for() -> None:
    place = branch(Layer(True))
    for spread in (1e-4, 0.5):
        config = parse(
            {"method": "compacter", "phm_dim": 12, "reduction_factor": 1, "phm_init_range": spread}
        )
        shared: Any = config.share([place], torch.Generator().manual_seed(0))
        assert abs(shared.rule.rule.std() / spread - 1) < 0.1  # 1728 numbers


def test_compacter_without_a_bias_and_with_widths_that_do_not_fit() -> None:
    place = branch(Layer(True))
    unit = built({"method": "compacter", "reduction_factor": 3, "phm_bias": False}, place)
    assert unit.down.bias is None and not any("bias" in name for name in tensors(unit))
    x = tokens()
    rule, factors = tensors(unit.down.shared[0]), tensors(unit.down.factors)
    close(unit.down(x).detach(), compacter.phm(x, rule, factors, None))
    with pytest.raises(ConfigError) as refused:
        built({"method": "compacter", "reduction_factor": 4}, place)  # width 3, and 4 products
    assert refused.value.code == "bad-width"


# --------------------------------------------------------------------------------------------------- fusion

FUSIONS: list[dict[str, Any]] = [
    {},
    {"value": False},
    {"key": False, "query": False},
    {"query": False, "value": False, "key": False},
    {"residual_before": True},
    {"value_before_softmax": False},
    {"value_before_softmax": False, "residual_before": True},
    {"temperature": 2.5},
]


@pytest.mark.parametrize("options", FUSIONS, ids=str)
@pytest.mark.parametrize("number", [2, 4])
def test_fusion(options: dict[str, Any], number: int) -> None:
    config = parse({"method": "fusion", "children": tuple("abcd"[:number]), **options})
    unit: Any = config.build(branch(Layer(True)), None, None)
    redraw(unit.double(), 6)
    assert {name.split(".")[0] for name in tensors(unit)} == {
        word for word in ("query", "key", "value") if options.get(word, True)
    }
    outputs = [tokens(seed) for seed in range(number)]
    query, residual = tokens(10), tokens(11)
    given = {k: v for k, v in options.items() if k not in ("query", "key", "value")}
    expected, weights = fusion.fuse(query, outputs, residual, tensors(unit), **given)
    record = Record()
    site = SimpleNamespace(runtime=SimpleNamespace(override=SimpleNamespace(record=record)))
    found = unit.mixture(query, outputs, residual, site).detach()
    close(found if options.get("residual_before") else found + residual, expected)
    (shares,) = record.fusion[unit.address]
    close(shares, weights)


def test_the_value_matrix_starts_near_the_identity() -> None:
    config = parse({"method": "fusion", "children": ("a", "b")})
    unit: Any = config.build(branch(Layer(True)), None, None)
    near = torch.eye(D) + 1e-6 * (1 - torch.eye(D))
    assert torch.equal(unit.value.weight, near) and unit.value.bias is None
    redraw(unit.double(), 6)
    close(unit.loss().detach(), torch.tensor(fusion.loss([unit.value.weight.detach()]), dtype=torch.float64))
    plain: Any = parse({"method": "fusion", "children": ("a", "b"), "value_initialized": False}).build(
        branch(Layer(True)), None, torch.Generator().manual_seed(0)
    )
    assert abs(plain.value.weight.std() / 0.02 - 1) < 0.2 and abs(plain.value.weight.diagonal()).max() < 0.1


# ----------------------------------------------------------------------------------------------- invertible


@pytest.mark.parametrize("act", ["relu", "gelu"])
@pytest.mark.parametrize("factor", [2, 1.5, 100])
@pytest.mark.parametrize("coupling", ["nice", "glow"])
def test_invertible(coupling: str, factor: float, act: str) -> None:
    config: Any = parse(
        {"method": "invertible", "coupling": coupling, "reduction_factor": factor, "non_linearity": act}
    )
    place = Slot("e.embeddings", "embeddings", "e", None, None, nn.Identity(), "e", (D, D))
    shared = config.share([place], None)
    redraw(shared.double(), 8)
    found, x = shared.of("e"), tokens()
    assert found.F.down.out_features == max(int(D // 2 // factor), 1)
    oracle = invertible.nice if coupling == "nice" else invertible.glow
    y = found(x).detach()
    close(y, oracle(x, tensors(found), act))
    assert (y - x).abs().max() > 0.1
    for given in (x, 50 * x):  # scales far out in the clamp as well
        torch.testing.assert_close(found.inverse(found(given)), given, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(found(found.inverse(given)), given, rtol=1e-7, atol=1e-7)


def test_an_odd_width_has_no_halves() -> None:
    place = Slot("e.embeddings", "embeddings", "e", None, None, nn.Identity(), "e", (7, 7))
    config = parse("invertible")
    with pytest.raises(PlanError) as refused:
        config.share([place], None)
    assert refused.value.code == "other-width"


# ----------------------------------------------------------------------------------------------------- reft

MASKS = {
    "none": None,
    "right": torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] + [0] * 6]),
    "left": torch.tensor([[1] * 7, [0] * 3 + [1] * 4, [0] * 6 + [1]]),
}
KINDS = {"loreft": (True, True), "noreft": (False, True), "direft": (False, False)}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("prefix", "suffix"), [(3, 0), (0, 2), (2, 2), (5, 4), (9, 1), (1, 9)])
@pytest.mark.parametrize("tied", [False, True])
def test_reft(kind: str, mask: Tensor | None, prefix: int, suffix: int, tied: bool) -> None:
    orthogonal, subtract = KINDS[kind]
    for act in (None, "gelu"):
        options = {"prefix_positions": prefix, "suffix_positions": suffix, "non_linearity": act}
        place = Slot("encoder.0.layer", "layer", "encoder", 0, None, nn.Identity(), "0", (D, D))
        unit = built({"method": kind, "r": 2, "tied_weights": tied, **options}, place)
        found = {name: t for name in ("prefix", "suffix") if (t := _intervention(unit, name, orthogonal))}
        assert set(found) == (
            {"prefix"} if tied and prefix else {n for n, c in (("prefix", prefix), ("suffix", suffix)) if c}
        )
        units = {name: found.get(name) or next(iter(found.values())) for name in ("prefix", "suffix")}
        h = tokens()
        activation = None if act is None else bottleneck.ACTIVATIONS[act]
        expected = reft.reft(h, mask, units, prefix, suffix, subtract=subtract, act=activation)
        close(_behind(unit, h, mask), expected)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_dropout_of_reft_is_on_what_it_edits(mask: Tensor | None) -> None:
    """Positions that nothing edits pass unchanged; edited ones are zero, or the oracle's over 1 - p."""
    place = Slot("encoder.0.layer", "layer", "encoder", 0, None, nn.Identity(), "0", (D, D))
    unit = built(
        {"method": "noreft", "r": 2, "prefix_positions": 2, "suffix_positions": 1, "dropout": 0.25}, place
    )
    units = {name: _intervention(unit, name, False) for name in ("prefix", "suffix")}
    h = tokens()
    expected = reft.reft(h, mask, units, 2, 1)
    edited = (expected != h).any(-1)
    assert edited.any() and not edited.all()
    unit.train()
    torch.manual_seed(0)
    kept = total = 0
    for _ in range(100):
        found = _behind(unit, h, mask)
        assert torch.equal(found[~edited], h[~edited])
        alive = found[edited] != 0
        close(found[edited][alive], expected[edited][alive] / 0.75)
        kept, total = kept + int(alive.sum()), total + alive.numel()
    assert abs(kept / total - 0.75) < 5 * (0.25 * 0.75 / total) ** 0.5


def _intervention(unit: Any, name: str, orthogonal: bool) -> dict[str, Tensor] | None:
    own = unit._modules.get(name)
    if own is None:
        return None
    R = own.projection.detach()
    R = reft.orthonormal(R) if orthogonal else R
    return {"R": R, "W": own.source.weight.detach(), "b": own.source.bias.detach()}


def _behind(unit: nn.Module, h: Tensor, mask: Tensor | None) -> Tensor:
    """What a layer that gives h gives with the unit behind it."""
    host, runtime = nn.Identity(), Runtime()
    open_site(host, "0", runtime)
    host.adapterkit._modules["unit"] = unit
    host.adapterkit.program = Program(outputs=("unit",))
    runtime.override.flow["encoder.mask"] = mask
    with torch.no_grad():
        return host(h)
