"""Law of merging: weights become what the papers' formulas say, rounded once, and come back bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import adapterkit as ak
from adapterkit.errors import PlanError
from tests.laws.matrix import Case, run
from tests.oracles import dora, fused, ia3, lora, mtl_lora, vera

# fused matrices by the end of their path: layout, query heads, key/value heads; read off the modeling files
QKV = {
    "attn.c_attn": ("blocks", 4, 4),
    "attn.Wqkv": ("blocks", 4, 4),
    "attention.self.in_proj": ("per_head", 4, 4),
    "self_attn.qkv_proj": ("blocks", 4, 2),
    "attention.qkv": ("blocks", 4, 2),
}
HALVES = {  # the first and the second half of the rows
    "crossattention.c_attn": ("k", "v"),
    "mlp.Wi": ("gate", "up"),
    "mlp.gate_up_proj": ("gate", "up"),
    "mlp.gate_up": ("gate", "up"),
}
ALPHA, SHARPNESS = 6, 0.05


def rows_of(path: str, role: str, total: int) -> list[int]:
    """Rows of a role in the weight (D_out, D_in) at `path`."""
    for end, (layout, heads, kv_heads) in QKV.items():
        if path.endswith(f".{end}"):
            width = total // (heads + 2 * kv_heads)
            return fused.role_rows(role, layout, heads, kv_heads, width)
    for end, halves in HALVES.items():
        if path.endswith(f".{end}"):
            start = halves.index(role) * total // 2
            return list(range(start, start + total // 2))
    return list(range(total))


def merged(
    case: Case, role: str, W: Tensor, b: Tensor | None, t: dict[str, Tensor], shared: dict[str, Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of one role in float64, by the formulas of the papers."""
    if case.method == "ia3":
        formula = ia3.ia3_merged_input if role == "down" else ia3.ia3_merged_output
        return formula(W, b, t["scale"])
    weight = {
        "lora": lambda: lora.lora_merged(W, t["A"], t["B"], ALPHA),
        "vera": lambda: vera.vera_merged(W, shared["A"], shared["B"], t["d"], t["b"]),
        "dora": lambda: dora.dora_merged(W, t["A"], t["B"], t["m"], ALPHA),
        "dvora": lambda: dora.dvora_merged(W, shared["A"], shared["B"], t["d"], t["b"], t["m"]),
        "mtl_lora": lambda: mtl_lora.mtl_lora_merged(
            W, t["A"], t["B"], t["L"], t["w"], SHARPNESS, ALPHA / t["A"].shape[0]
        ),
    }[case.method]()
    return weight, None if b is None else b.double()


def weights(model: nn.Module) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Path -> (weight (D_out, D_in), bias) of every linear map, as copies."""
    return {
        path: (
            (module.weight.t() if isinstance(module, Conv1D) else module.weight).detach().clone(),
            None if module.bias is None else module.bias.detach().clone(),
        )
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and ".adapterkit." not in path
    }


def below(tensors: dict[str, Tensor], start: str) -> dict[str, Tensor]:
    return {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}


def expected(case: Case, kit: ak.Kit) -> dict[str, tuple[Tensor, Tensor | None, set[int]]]:
    """Path -> merged weight and bias in float64, and the rows that are adapted."""
    tensors = kit["default"].state_dict()
    shared = below(tensors, "shared.")
    before, found = weights(kit.model), {}
    for slot in kit["default"].plan.slots:
        weight, bias = before[slot.path]
        default = (weight.double(), None if bias is None else bias.double(), set())
        whole, whole_bias, adapted = found.setdefault(slot.path, default)
        rows = rows_of(slot.path, slot.role, len(weight))
        own = below(tensors, f"{slot.address}.")
        own_bias = None if bias is None else bias[rows]
        new, new_bias = merged(case, slot.role, weight[rows], own_bias, own, shared)
        whole[rows] = new
        if whole_bias is not None and new_bias is not None:
            whole_bias[rows] = new_bias
        adapted.update(rows)
    return found


def assert_rounded_once(found: Tensor, exact: Tensor) -> None:
    """Within half a unit of the last of eight bits, and what float32 adds where two are equally near."""
    _, exponent = torch.frexp(exact)
    half = torch.ldexp(torch.ones_like(exact), exponent - 8 - 1)
    noise = 1e-6 * exact.abs().max()
    assert ((found.double() - exact).abs() <= half + noise).all()


TYPES = [(torch.float32, 1e-5), (torch.float64, 1e-12)]


@pytest.mark.parametrize(("dtype", "tolerance"), TYPES, ids=["float32", "float64"])
def test_merged_equals_unmerged_and_unmerge_gives_the_bits_back(
    case: Case, dtype: torch.dtype, tolerance: float
) -> None:
    # without padding: transformers gives NaN in float64 for a token that may look at nothing
    kit, inputs = case.attached(dtype), case.inputs(dtype, padded=False)
    before, output, exact = weights(kit.model), run(kit.model, inputs), expected(case, kit)
    state = {key: value.clone() for key, value in kit.model.state_dict().items()}

    kit.merge("default")
    after = weights(kit.model)
    for path, (weight, bias) in after.items():
        if path not in exact:
            assert torch.equal(weight, before[path][0])
            continue
        torch.testing.assert_close(weight.double(), exact[path][0], rtol=tolerance, atol=tolerance)
        rest = sorted(set(range(len(weight))) - exact[path][2])
        assert torch.equal(weight[rest], before[path][0][rest])
        if bias is not None:
            torch.testing.assert_close(bias.double(), exact[path][1], rtol=tolerance, atol=tolerance)
    assert (run(kit.model, inputs) - output).abs().max() <= tolerance * output.abs().max()
    with pytest.raises(PlanError) as refused:
        kit.model.state_dict()
    assert refused.value.code == "merged"

    kit.unmerge()
    assert all(torch.equal(state[key], value) for key, value in kit.model.state_dict().items())
    assert torch.equal(run(kit.model, inputs), output)


def test_merging_in_bfloat16_rounds_once(case: Case) -> None:
    kit = case.attached(torch.bfloat16)
    exact = expected(case, kit)
    kit.merge("default")
    after = weights(kit.model)
    for path, (weight, bias, _) in exact.items():
        assert_rounded_once(after[path][0], weight)
        if bias is not None:
            assert_rounded_once(after[path][1], bias)
