"""Bottlenecks in real layers equal forwards that were rewritten by hand, in float64.

Each family's layers get a forward of their own that computes branch h and residual x from the submodules and
hands both to the oracle: V1 reads the branch, V2 the sum, V3 leaves the model's add out, V4 stands beside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from tests.laws.branch_cases import randomise
from tests.laws.matrix import run
from tests.models import tiny
from tests.oracles import bottleneck
from tests.oracles.bottleneck import Form

VARIANTS: dict[str, tuple[dict[str, Any], Form]] = {
    "V1": ({}, Form()),
    "V2": ({"original_ln_before": True}, Form(reads_sum=True)),
    "V3": (
        {"original_ln_before": True, "original_ln_after": False, "residual_before_ln": False},
        Form(reads_sum=True, residual="read", model_adds=False),
    ),
    "V3 of the branch": ({"original_ln_after": False}, Form(model_adds=False)),
    "V4": ({"is_parallel": True}, Form(parallel=True)),
    "V4 alone": ({"is_parallel": True, "original_ln_after": False}, Form(parallel=True, model_adds=False)),
}
Act = Callable[..., Tensor]
"""act(sublayer, h, x, norm) -> stream behind the sublayer; norm is what the model puts behind the sum."""


def plain(h: Tensor) -> Tensor:
    return h


def patch_bert(layer: Any, act: Act) -> None:
    def forward(self: Any, hidden: Tensor, mask: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        h = self.attention.output.dense(self.attention.self(hidden, attention_mask=mask)[0])
        hidden = act("attention", h, hidden, self.attention.output.LayerNorm)
        h = self.output.dense(self.intermediate(hidden))
        return act("mlp", h, hidden, self.output.LayerNorm)

    layer.forward = MethodType(forward, layer)


def patch_llama(layer: Any, act: Act) -> None:
    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        h = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
        x = act("attention", h, hidden_states, plain)
        return act("mlp", self.mlp(self.post_attention_layernorm(x)), x, plain)

    layer.forward = MethodType(forward, layer)


def patch_gemma2(layer: Any, act: Act) -> None:
    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        h = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
        x = act("attention", self.post_attention_layernorm(h), hidden_states, plain)
        h = self.mlp(self.pre_feedforward_layernorm(x))
        return act("mlp", self.post_feedforward_layernorm(h), x, plain)

    layer.forward = MethodType(forward, layer)


def patch_phi(layer: Any, act: Act) -> None:
    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        normed = self.input_layernorm(hidden_states)
        h = self.self_attn(hidden_states=normed, **kwargs)[0]
        # each half as if it were alone; the stream itself is counted once
        both = act("attention", h, hidden_states, plain)
        return both + act("mlp", self.mlp(normed), hidden_states, plain) - hidden_states

    layer.forward = MethodType(forward, layer)


def patch_t5(layer: Any, act: Act) -> None:
    names = ("attention", "cross_attention", "mlp") if len(layer.layer) == 3 else ("attention", "mlp")
    for name, part in zip(names, layer.layer, strict=True):
        part.forward = MethodType(t5_part(name, act), part)


def t5_part(name: str, act: Act) -> Any:
    def forward(self: Any, hidden_states: Tensor, key_value_states: Any = None, **kwargs: Any) -> Any:
        normed = self.layer_norm(hidden_states)
        if name == "mlp":
            return act(name, self.DenseReluDense(normed), hidden_states, plain)
        kwargs["mask"] = kwargs.pop("attention_mask", None)
        if name == "cross_attention":
            kwargs["key_value_states"] = key_value_states
        core = self.SelfAttention if name == "attention" else self.EncDecAttention
        h, *rest = core(normed, **kwargs)
        return act(name, h, hidden_states, plain), *rest

    return forward


def patch_bart(layer: Any, act: Act) -> None:
    def forward(
        self: Any, hidden: Tensor, mask: Any = None, states: Any = None, states_mask: Any = None, **kw: Any
    ) -> Tensor:
        h = self.self_attn(hidden, attention_mask=mask, **kw)[0]
        x = act("attention", h, hidden, self.self_attn_layer_norm)
        if states is not None:
            h = self.encoder_attn(x, key_value_states=states, attention_mask=states_mask, **kw)[0]
            x = act("cross_attention", h, x, self.encoder_attn_layer_norm)
        return act("mlp", self.fc2(self.activation_fn(self.fc1(x))), x, self.final_layer_norm)

    layer.forward = MethodType(forward, layer)


def patch_xmod(layer: Any, act: Act) -> None:
    """The sum of the second sublayer goes through the model's own adapter of the language."""
    pre = layer.pre_norm
    norms = [plain, plain] if pre else [layer.attention.output.LayerNorm, layer.output.LayerNorm]

    def forward(self: Any, hidden: Tensor, languages: Any, mask: Any = None, *rest: Any, **kw: Any) -> Tensor:
        before = [self.attention.output.LayerNorm, self.output.LayerNorm] if pre else [plain, plain]
        h = self.attention.self(before[0](hidden), attention_mask=mask)[0]
        x = act("attention", self.attention.output.dense(h), hidden, norms[0])
        h = self.output.dense(self.intermediate(before[1](x)))
        out = self.output.lang_adapter(languages, act("mlp", h, x, norms[1], sum_only=True))
        return norms[1](out)

    layer.forward = MethodType(forward, layer)


def patch_vit(layer: Any, act: Act) -> None:
    def forward(self: Any, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
        h = self.attention(self.layernorm_before(hidden_states), attention_mask, **kwargs)
        x = act("attention", h[0] if isinstance(h, tuple) else h, hidden_states, plain)
        return act("mlp", self.mlp(self.layernorm_after(x)), x, plain)

    layer.forward = MethodType(forward, layer)


LOCATIONS = ("attention", "mlp")
CROSS = (*LOCATIONS, "cross_attention")
# family -> patch, {stack: path of its layers}, sublayers
FAMILIES: dict[str, tuple[Any, dict[str, str], tuple[str, ...]]] = {
    "bert": (patch_bert, {"encoder": "encoder.layer"}, LOCATIONS),
    "llama": (patch_llama, {"decoder": "layers"}, LOCATIONS),
    "gemma2": (patch_gemma2, {"decoder": "layers"}, LOCATIONS),
    "phi": (patch_phi, {"decoder": "layers"}, LOCATIONS),
    "t5": (patch_t5, {"encoder": "encoder.block", "decoder": "decoder.block"}, CROSS),
    "bart": (patch_bart, {"encoder": "encoder.layers", "decoder": "decoder.layers"}, CROSS),
    "xmod": (patch_xmod, {"encoder": "encoder.layer"}, LOCATIONS),
    "vit": (patch_vit, {"encoder": "layers"}, LOCATIONS),
}


def patched(model: nn.Module, row: str, kit: ak.Kit, form: Form) -> nn.Module:
    """A plain model with the oracle in its layers."""
    patch, stacks, _ = FAMILIES[row]
    state = kit["default"].state_dict()

    def acting(layer: str) -> Act:
        def act(sublayer: str, h: Tensor, x: Tensor, norm: Any, sum_only: bool = False) -> Tensor:
            start = f"{layer}.{sublayer}."
            t = {key.removeprefix(start): v for key, v in state.items() if key.startswith(start)}
            if not sum_only:
                return bottleneck.sublayer(h, x, t, form, lambda h, x: norm(h + x), "gelu", 0.7)
            own = replace(form, model_adds=False)
            out = bottleneck.sublayer(h, x, t, own, lambda h, x: norm(h + x), "gelu", 0.7)
            return out + x if form.model_adds else out

        return act

    for stack, path in stacks.items():
        for index, layer in enumerate(model.get_submodule(path)):
            patch(layer, acting(f"{stack}.{index}"))
    return model


def patch_one_after_the_other(layer: Any, act: Act) -> None:
    """A parallel block in which the second adapter takes the stream with the first one's result for x."""

    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        normed = self.input_layernorm(hidden_states)
        h = self.self_attn(hidden_states=normed, **kwargs)[0]
        return act("mlp", self.mlp(normed), act("attention", h, hidden_states, plain), plain)

    layer.forward = MethodType(forward, layer)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_residual_of_a_parallel_block_may_be_chained(variant: str, monkeypatch: Any) -> None:
    """`residual="chained"`, as in files of AdapterHub: each half as if alone, one behind the other."""
    options, form = VARIANTS[variant]
    monkeypatch.setitem(FAMILIES, "phi", (patch_one_after_the_other, *FAMILIES["phi"][1:]))
    config = {
        "method": "bottleneck",
        "reduction_factor": 4,
        "non_linearity": "gelu",
        "scaling": 0.7,
        **options,
    }
    model, other = (tiny.build("phi", dtype=torch.float64) for _ in range(2))
    given = tiny.inputs("phi", padded=False)
    kit = ak.attach(model, {**config, "residual": "chained"}, seed=0)
    randomise(kit)
    found, expected = run(model, given), run(patched(other, "phi", kit, form), given)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert kit._runtime.override.flow == {}


CASES = [(row, {}) for row in FAMILIES if row != "xmod"]
CASES += [("xmod", {"pre_norm": pre}) for pre in (False, True)]
CASES += [("xmod", {"adapter_reuse_layer_norm": False}), ("xmod", {"adapter_layer_norm": True})]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("row", "settings"), CASES, ids=str)
def test_a_bottleneck_equals_a_forward_that_was_written_by_hand(
    row: str, settings: dict[str, Any], variant: str
) -> None:
    options, form = VARIANTS[variant]
    config = {
        "method": "bottleneck",
        "reduction_factor": 4,
        "non_linearity": "gelu",
        "scaling": 0.7,
        "locations": FAMILIES[row][2],
        **options,
    }
    given = tiny.inputs(row, padded=False)
    if row == "phi" and variant in ("V3 of the branch", "V4 alone"):
        with pytest.raises(ak.errors.PlanError) as refused:
            ak.attach(tiny.build(row), config)
        assert refused.value.code == "no-own-sum"
        return
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        model, other = (tiny.build(row, dtype=dtype, **settings) for _ in range(2))
        given = {key: value.to(dtype) if value.is_floating_point() else value for key, value in given.items()}
        bare = run(model, given)
        kit = ak.attach(model, config, seed=0)
        randomise(kit)
        found, expected = run(model, given), run(patched(other, row, kit, form), given)
        assert (found - expected).abs().max() <= tolerance * max(1.0, expected.abs().max().item())
        assert (found - bare).abs().max() > 1e-2
        assert kit._runtime.override.flow == {}
