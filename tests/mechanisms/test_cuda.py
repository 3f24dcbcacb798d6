"""On a GPU: the same numbers as on the CPU, flash attention with a prefix, and what autograd's threads do.

Run where there is one: pytest tests/mechanisms/test_cuda.py
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import adapterkit as ak
from tests.mechanisms.scene import ALL_ROLES, attach, gradients, run, same, tensors
from tests.models import tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

METHODS = (
    "lora",
    "dora",
    "vera[r=4,d_initial=1]",
    "ia3",
    "seq_bn",
    "par_bn",
    "compacter[reduction_factor=4]",
    "prefix_tuning",
    "prompt_tuning",
    "loreft",
)


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """Float32 in full: the CPU's numbers are the expectation."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before
    torch._dynamo.reset()


def moved(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cuda() for name, tensor in given.items()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("row", ["bert", "llama", "gpt2", "t5", "vit"])
def test_outputs_and_gradients_are_those_of_the_cpu(row: str, method: str) -> None:
    model, given = tiny.build(row), tiny.inputs(row)
    attach(model, method)
    on_gpu = copy.deepcopy(model).cuda()
    torch.testing.assert_close(run(on_gpu, moved(given)).cpu(), run(model, given), atol=2e-4, rtol=1e-3)
    expected, found = gradients(model, given), gradients(on_gpu, moved(given))
    assert expected.keys() == found.keys()
    scale = max(float(value.abs().max()) for value in expected.values() if value is not None)
    for key, value in expected.items():
        if value is not None:
            torch.testing.assert_close(found[key].cpu(), value, atol=1e-3 * scale, rtol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_gives_the_same_adapter_on_both(method: str) -> None:
    here, there = tiny.build("bert"), tiny.build("bert").cuda()
    kits = [ak.attach(model, method, name="a", seed=3) for model in (here, there)]
    assert all(parameter.is_cuda for parameter in kits[1]["a"].parameters())
    there_too = {key: value.cpu() for key, value in tensors(kits[1]).items()}
    if method == "dora":  # its magnitudes are norms of the weight, which are summed in another order
        torch.testing.assert_close(there_too, tensors(kits[0]))
    else:
        assert same(tensors(kits[0]), there_too)


@pytest.mark.parametrize("method", METHODS)
def test_loaded_adapters_are_beside_the_model(method: str, tmp_path: Path) -> None:
    kit = attach(tiny.build("bert"), method)
    kit.save(tmp_path / "a")
    loaded = ak.load(tiny.build("bert").cuda(), tmp_path / "a")
    assert all(parameter.is_cuda for parameter in loaded["a"].parameters())
    given = tiny.inputs("bert")
    expected = run(kit.model, given)
    torch.testing.assert_close(run(loaded.model, moved(given)).cpu(), expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not"])
@pytest.mark.parametrize("method", ["lora", "seq_bn", "prefix_tuning_flat"])
def test_checkpointed_layers_run_again_under_the_same_adapter(method: str, reentrant: bool) -> None:
    """Backward runs in a thread of autograd's here, which sees no override: the default must serve."""
    model = tiny.build("llama", "LlamaForCausalLM").cuda().train()
    given = moved(tiny.inputs("llama", "LlamaForCausalLM", labels=True))
    attach(model, method)
    expected = gradients(model, given)
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    found = gradients(model, given)
    assert all(value is not None for value in expected.values())
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-6, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*(jit|tf32|TF32|SMs|online softmax)")  # inductor's own
@pytest.mark.parametrize("method", ["lora", "seq_bn"])
def test_compiled_by_inductor_before_and_after(method: str) -> None:
    model, given = tiny.build("bert").cuda(), moved(tiny.inputs("bert"))
    bare = run(model, given)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(run(compiled, given), bare, atol=1e-4, rtol=1e-3)
    kit = attach(model, method)
    adapted = run(model, given)
    assert not torch.allclose(adapted, bare, atol=1e-2)
    torch.testing.assert_close(run(compiled, given), adapted, atol=1e-4, rtol=1e-3)
    with kit.disabled():
        torch.testing.assert_close(run(compiled, given), bare, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_a_prefix_keeps_the_fused_kernels(padded: bool) -> None:
    """In bfloat16 with heads of 64: flash without a mask, the memory-efficient kernel with one."""
    config = dict(hidden_size=128, num_attention_heads=2, num_key_value_heads=2, head_dim=64)
    model = tiny.build("llama", attn="sdpa", dtype=torch.bfloat16, **config).cuda()
    attach(model, "prefix_tuning_flat[prefix_length=8]")
    ids = torch.randint(3, 50, (2, 24), generator=torch.Generator().manual_seed(0)).cuda()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0 if padded else 1
    given = {"input_ids": ids, "attention_mask": mask}
    with sdpa_kernel([SDPBackend.MATH]):
        expected = run(copy.deepcopy(model).float(), given)
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION if padded else SDPBackend.FLASH_ATTENTION]):
        found = run(model, given).float()
    real = mask.bool().flatten()
    found, expected = (x.view(real.numel(), -1)[real] for x in (found, expected))
    assert float((found - expected).norm() / expected.norm()) < 2e-2


def test_autocast_trains_float32_adapters() -> None:
    model = tiny.build("bert", dtype=torch.bfloat16).cuda()
    kit = attach(model, ALL_ROLES, dtype="float32")
    given = moved(tiny.inputs("bert"))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        model(**given).last_hidden_state.float().square().mean().backward()
    assert all(p.dtype == torch.float32 and p.grad is not None for p in kit["a"].parameters())
