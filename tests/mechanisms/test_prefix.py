"""Prefix tuning: caches, kernels, compiling, threads, what is selected and what is refused."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.errors import ConfigError, PlanError
from tests.laws.matrix import CUSTOM, run
from tests.laws.test_prefix import FLAT, GATED, MLP, attach
from tests.models import tiny


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# one for each way to a core: the interface (grouped queries, own bias), a method, interception (two layouts)
COMPILED = ("bert", "llama", "t5", "gptj", "deberta", "deberta_v2", "custom")


@pytest.mark.parametrize("row", COMPILED)
@pytest.mark.usefixtures("fresh_dynamo")
def test_attach_and_activate_around_the_first_compiled_call(row: str) -> None:
    model, inputs = tiny.build(row), tiny.inputs(row)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    bare = run(compiled, inputs)
    kit = attach(model, row)
    adapted = run(model, inputs)
    torch.testing.assert_close(run(compiled, inputs), adapted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(adapted, bare, atol=1e-3)
    with kit.disabled():
        assert torch.equal(run(compiled, inputs), bare)
    torch._dynamo.reset()
    cold = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(cold, inputs), adapted, rtol=1e-4, atol=1e-5)
    kit.activate(None)
    torch.testing.assert_close(run(cold, inputs), bare, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("row", ["llama", "gptj", "custom"])
def test_threads_have_prefixes_of_their_own(row: str) -> None:
    model, inputs = tiny.build(row), tiny.inputs(row)
    kit = attach(model, row, name="a")
    attach(model, row, FLAT, name="b", seed=3)
    alone = {}
    for setup in ("a", "b", None):
        with kit.using(setup):
            alone[setup] = run(model, inputs)
    assert not torch.equal(alone["a"], alone["b"])

    def work(setup: str | None) -> bool:
        with kit.using(setup):
            return all(torch.equal(run(model, inputs), alone[setup]) for _ in range(5))

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, ["a", "b", None] * 4))


@pytest.mark.parametrize("row", ["llama", "gemma2", "mistral", "gpt2", "gptj", "t5"])
def test_generate_with_a_static_cache(row: str) -> None:
    cls = {"gpt2": "GPT2LMHeadModel"}.get(row) or tiny.classes(row)[1]
    model = tiny.build(row, cls)
    inputs = tiny.inputs(row, cls, padded=row != "gemma2")
    attach(model, row)
    given = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    torch._dynamo.reset()
    dynamic = model.generate(**inputs, **given)
    static = model.generate(**inputs, **given, cache_implementation="static", disable_compile=True)
    assert torch.equal(dynamic, static)


def test_a_prompt_that_has_no_mask_is_still_causal() -> None:
    """All tokens real and attention by sdpa: transformers says `is_causal` in place of a mask."""
    model = tiny.build("llama", attn="sdpa")
    ids = tiny.inputs("llama", padded=False)["input_ids"]
    attach(model, "llama")
    with torch.no_grad():
        whole = model(input_ids=ids).last_hidden_state
        start = model(input_ids=ids[:, :4]).last_hidden_state
    torch.testing.assert_close(whole[:, :4], start, rtol=1e-4, atol=1e-5)


# torch speaks so of what transformers calls, and of its own compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "row", ["llama", *(pytest.param(r, marks=pytest.mark.full) for r in ("mistral", "bert"))]
)
def test_flex_attention(row: str) -> None:
    inputs = tiny.inputs(row)
    found = {}
    for attn in ("eager", "flex_attention"):
        model = tiny.build(row, attn=attn)
        attach(model, row)
        found[attn] = fields(model, inputs)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found["flex_attention"][real], found["eager"][real], rtol=1e-3, atol=1e-4)


@torch.no_grad()
def fields(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).last_hidden_state


def slots(row: str, **options: Any) -> list[str]:
    return [slot.address for slot in ak.plan(tiny.build(row), {**MLP, **options}).slots]


def test_which_cores_are_chosen() -> None:
    every = {f"{s}.{i}.attention.core" for s in ("encoder", "decoder") for i in (0, 1)}
    cross = {f"decoder.{i}.cross_attention.core" for i in (0, 1)}
    assert set(slots("t5")) == every | cross
    assert set(slots("t5", cross_prefix=False)) == every
    decoder = {core for core in every if core.startswith("decoder")}
    assert set(slots("t5", encoder_prefix=False)) == decoder | cross
    assert set(slots("t5", cross_prefix=False, leave_out=["encoder.1", "decoder.0"])) == {
        "encoder.0.attention.core",
        "decoder.1.attention.core",
    }
    assert slots("bert", layers=1, encoder_prefix=False) == ["encoder.1.attention.core"]
    found = slots("encoder_decoder", encoder_prefix=False)
    assert all(core.startswith("decoder/") for core in found)
    assert {core.rpartition(".")[0].rpartition(".")[2] for core in found} == {"attention", "cross_attention"}


def test_parameters_are_counted_by_hand() -> None:
    """Llama: D 32, K 2, E 8, two layers; the last matrix has rows for two layers only."""
    kit = ak.attach(tiny.build("llama"), MLP)
    assert kit["default"].num_parameters == 3 * 32 + (32 + 1) * 6 + 2 * (6 + 1) * 2 * 2 * 8
    kit = ak.attach(tiny.build("gemma2"), FLAT)
    assert kit["default"].num_parameters == 2 * 3 * 2 * 2 * 16
    kit = ak.attach(tiny.build("bert"), {**GATED, "flat": True})
    assert kit["default"].num_parameters == 2 * (3 * 2 * 32 + 2 * (32 + 1))


def test_mlp_formula() -> None:
    kit = attach(tiny.build("llama"), "llama")
    tensors = kit["default"].state_dict()
    shared = {key.rpartition(".")[2]: t.double() for key, t in tensors.items() if key.startswith("shared.")}
    hidden = torch.tanh(shared["embedding"] @ shared["weight"].T + shared["bias"])
    kit.eject("default")
    flat = kit["default"].state_dict()
    for layer in (0, 1):
        start = f"decoder.{layer}.attention.core"
        rows = hidden @ tensors[f"{start}.weight"].double().T + tensors[f"{start}.bias"].double()
        key, value = rows.view(3, 2, 2, 8).unbind(1)
        torch.testing.assert_close(flat[f"{start}.key"].double(), key, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(flat[f"{start}.value"].double(), value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "change", ["write", "data", "place", "swap", "thaw", "shared", "double", "deepcopy", "autocast", "none"]
)
def test_what_frozen_weights_gave_is_kept_until_they_change(change: str) -> None:
    model, inputs = tiny.build("llama"), tiny.inputs("llama")
    kit = attach(model, "llama").freeze()
    unit: Any = kit["default"].units["decoder.0.attention.core"]
    before = run(model, inputs)
    kept = unit.kept
    assert kept is not None
    with torch.no_grad():
        if change == "write":
            unit.weight.mul_(2)
        elif change == "data":
            unit.weight.data = unit.weight * 2
        elif change == "place":  # twice, so that the second may lie where the first has lain
            unit.weight.data = unit.weight * 3
            unit.weight.data = unit.weight * 3
        elif change == "swap":
            unit.weight = nn.Parameter(unit.weight * 2, requires_grad=False)
        elif change == "thaw":
            kit.train()
            run(model, inputs)
            unit.weight.data.mul_(2)  # averages of weights, put in to be evaluated
            kit.freeze()
        elif change == "shared":
            unit.owner[0].embedding.mul_(2)
        elif change == "double":
            model.double()
        elif change == "deepcopy":
            model = copy.deepcopy(model)
            kit = ak.of(model)
            copied: Any = kit["default"].units["decoder.0.attention.core"]
            copied.weight.mul_(2)
        elif change == "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                run(model, inputs)
    other = tiny.build("llama").to(next(model.parameters()).dtype)
    fresh = attach(other, "llama")
    for key, tensor in fresh["default"].state_dict().items():
        tensor.copy_(kit["default"].state_dict()[key])
    found = run(model, inputs)
    torch.testing.assert_close(found, run(other, inputs), rtol=1e-6, atol=1e-6)
    alike = change in ("double", "autocast", "none")
    assert torch.allclose(found.float(), before, atol=1e-5) is alike
    assert (unit.kept is kept) is (change in ("autocast", "none", "deepcopy"))


def test_what_is_trained_is_never_kept() -> None:
    model, inputs = tiny.build("llama"), tiny.inputs("llama")
    kit = attach(model, "llama").freeze()
    run(model, inputs)
    kit.train()
    tiny.output(model(**inputs)).square().mean().backward()
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in kit["default"].parameters())


def test_dropout_acts_in_training_only() -> None:
    model, inputs = tiny.build("bert"), tiny.inputs("bert")
    attach(model, "bert", {**FLAT, "dropout": 0.5})
    assert torch.equal(run(model, inputs), run(model, inputs))
    model.train()
    assert not torch.equal(run(model, inputs), run(model, inputs))


def test_bfloat16() -> None:
    for row in ("llama", "deberta_v2", "gptj"):
        model = tiny.build(row, dtype=torch.bfloat16)
        kit = attach(model, row)
        found = run(model, tiny.inputs(row))
        assert {t.dtype for t in kit["default"].parameters()} == {found.dtype} == {torch.bfloat16}
        wide = run(model.float(), tiny.inputs(row))
        assert (found.float() - wide).norm() < 0.1 * wide.norm()


class Sums(nn.Module):
    """Attention by sums of products, which no way to a core sees."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (4, 4)) for part in (self.q, self.k, self.v))
        weights = (q[:, :, None] * k[:, None]).sum(-1).softmax(2)
        return self.o((weights[..., None] * v[:, None]).sum(2).flatten(2))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Sums()])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)


def spec(**attention: Any) -> dict[str, Any]:
    roles = {"core": ".", "q": "q", "k": "k", "v": "v", "o": "o", **attention}
    return {"adapterkit": 1, "stacks": {"encoder": {"layers": "layers", "attention": roles}}}


def test_attention_that_is_not_seen_is_an_error_at_the_first_call() -> None:
    model = Model()
    kit = ak.attach(model, FLAT, interface=spec())
    with pytest.raises(PlanError) as refused:
        model(torch.randn(1, 3, 16))
    assert refused.value.code == "attention-not-hit"
    with kit.disabled():
        model(torch.randn(1, 3, 16))


def test_heads_that_nothing_shows() -> None:
    model = Model()
    del model.layers[0].num_heads
    with pytest.raises(PlanError) as refused:
        ak.attach(model, FLAT, interface=spec())
    assert refused.value.code == "no-head-size"
    ak.attach(model, FLAT, interface=spec(sizes={"kv_heads": 4, "heads": 4}))


def test_attention_functions_with_other_rules_are_refused() -> None:
    model, inputs = tiny.build("bert"), tiny.inputs("bert")
    kit = attach(model, "bert")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(PlanError) as refused:
        model.encoder.layer[0].attention.self(torch.randn(2, 3, 32))
    assert refused.value.code == "attention-function"
    model.config._attn_implementation = "eager"
    kit.eject("default")
    with pytest.raises(PlanError) as nothing:
        kit.eject("default")
    assert nothing.value.code == "nothing-to-eject"
    run(model, inputs)


def test_wrong_options() -> None:
    for options in ({"prefix_length": 0}, {"non_linearity": "sine"}, {"dropout": 1.0}):
        with pytest.raises(ConfigError) as refused:
            ak.plan(tiny.build("bert"), {**MLP, **options})
        assert refused.value.code == "bad-option"
    assert ak.plan(tiny.build("bert"), "prefix_tuning_flat").config.flat


def test_a_prefix_cannot_be_merged() -> None:
    kit = attach(tiny.build("bert"), "bert")
    with pytest.raises(PlanError) as refused:
        kit.merge("default")
    assert refused.value.code == "cannot-merge"


def test_custom_models_need_no_config() -> None:
    kit = attach(tiny.build("custom"), "custom")
    assert {slot.path for slot in kit["default"].plan.slots} == {"blocks.0.attention", "blocks.1.attention"}
    assert CUSTOM.exists()


# ------------------------------------------------------------------------------- a bias of relative positions

SHIFTED = {**FLAT, "shift_bias": True}


def test_a_shifted_bias_is_the_same_in_every_kernel() -> None:
    """The numbers themselves are those that were recorded: tests/parity."""
    models = [tiny.build("t5").eval() for _ in range(2)]
    given = tiny.inputs("t5")
    outs = []
    for model, attention in zip(models, ("eager", "sdpa"), strict=True):
        with contextlib.suppress(ValueError):  # older versions have no sdpa here
            model.set_attn_implementation(attention)
        ak.attach(model, SHIFTED, seed=3, head=False)
        with torch.no_grad():
            outs.append(model(**given)[0])
    assert torch.allclose(*outs, atol=1e-5)
    plain = tiny.build("t5").eval()
    ak.attach(plain, FLAT, seed=3, head=False)
    with torch.no_grad():
        assert not torch.allclose(plain(**given)[0], outs[0], atol=1e-3)


def test_a_bias_that_cannot_be_shifted() -> None:
    with pytest.raises(PlanError) as caught:
        ak.plan(tiny.build("bert"), SHIFTED)
    assert caught.value.code == "uneven-bias"
    model, given = tiny.build("t5").eval(), tiny.inputs("t5")
    kit = ak.attach(model, SHIFTED, name="a", head=False)
    kit.attach(FLAT, name="b", head=False)
    for setup, skipped in (("a", ("encoder.0",)), (ak.Stack("a", "b"), ())):
        kit.activate(setup, skip_layers=skipped)
        with pytest.raises(PlanError) as caught:
            model(**given)
        assert caught.value.code == "uneven-bias"
    kit.activate("a")
    model(**given)


def test_a_config_that_a_core_is_given_later_is_its_own() -> None:
    """Between its calls a core shows its config itself, also a new one, and keeps it without adapters."""
    model = tiny.build("llama")
    core = model.layers[0].self_attn
    kit = ak.attach(model, "prefix_tuning_flat[prefix_length=3]")
    assert core.config is model.config
    other = copy.deepcopy(model.config)
    core.config = other
    assert core.config is other
    twin = copy.deepcopy(model).layers[0].self_attn
    assert twin.config is not other and twin.config.to_dict() == other.to_dict()
    kit.detach()
    assert core.config is other
