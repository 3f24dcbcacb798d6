"""Adapters on quantised Linears: a forward and a backward pass, and what must be refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification

import adapterkit as ak
from tests.mechanisms.scene import attach, gradients, run
from tests.models import tiny

KINDS = ("nf4", "int8", "torchao")
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16}
kinds = pytest.mark.parametrize("kind", KINDS)
# of the libraries themselves: dtypes and interfaces that they give up, casts of activations to half precision
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt.*:UserWarning"),
]


def quantise(model: nn.Module, kind: str, device: str = "cpu") -> None:
    """Every Linear in the layers, in place; the library packs the numbers for the device they are on."""
    if kind == "torchao":
        quantization = pytest.importorskip("torchao.quantization")
        config = quantization.Int8WeightOnlyConfig()
        quantization.quantize_(model, config, lambda module, name: isinstance(module, nn.Linear))
        return
    bnb = pytest.importorskip("bitsandbytes")
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if type(module) is nn.Linear:
                setattr(parent, name, _bitsandbytes(bnb.nn, module, kind).to(device))


def _bitsandbytes(library: object, module: nn.Linear, kind: str) -> nn.Module:
    sizes, weight = (module.in_features, module.out_features), module.weight.data.cpu()
    if kind == "nf4":
        found = library.Linear4bit(*sizes, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        found.weight = library.Params4bit(weight, requires_grad=False, quant_type="nf4")
    else:
        found = library.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
        found.weight = library.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    return found


def dequantised(module: nn.Module, kind: str) -> Tensor:
    """The matrix that a quantised Linear stands for."""
    if kind == "torchao":
        return module.weight.dequantize()
    if kind == "nf4":
        functional = pytest.importorskip("bitsandbytes.functional")
        return functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    return module.weight.data * module.weight.SCB[:, None] / 127


def built(kind: str, device: str = "cpu") -> tuple[nn.Module, nn.Module]:
    """A quantised model, and a plain one with the matrices that its Linears stand for."""
    model, plain = (tiny.build("llama", **SIZES).to(device) for _ in range(2))
    quantise(model, kind, device)
    for path, module in plain.named_modules():
        if isinstance(module, nn.Linear):
            found = model.get_submodule(path)
            assert type(found) is not nn.Linear or type(found.weight) is not nn.Parameter
            module.weight.data.copy_(dequantised(found, kind))
    return model, plain


class Rounded(nn.Linear):
    """A Linear whose product is made as bitsandbytes makes it in eight bits, written out.

    Each row of x is cast to half precision and rounded to steps of its largest number / 127; without a
    threshold, as by default, no column is left out as an outlier. Backward does not see the rounding.
    """

    def forward(self, x: Tensor) -> Tensor:
        half = x.half().float()
        step = (half.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-30)  # a row of padding may be 0
        return super().forward(x + ((half / step).round() * step - x).detach())


def rounded(plain: nn.Module) -> nn.Module:
    """The plain model with rounded activations: as far from the plain one as the kernel may be."""
    model = copy.deepcopy(plain)
    for path, module in model.named_modules():
        if type(module) is nn.Linear and "layers." in path:
            module.__class__ = Rounded
    return model


def far(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().max() / right.abs().max())


@kinds
@pytest.mark.parametrize("method", ["lora[targets=all]", "ia3", "vera[r=4,d_initial=1]"])
def test_forward_and_backward(kind: str, method: str) -> None:
    model, plain = built(kind)
    given = tiny.inputs("llama")
    tolerance = 0.05 if kind == "int8" else 1e-4  # int8 of bitsandbytes rounds the activations as well
    bare = run(model, given)
    assert far(bare, run(plain, given)) < tolerance
    kit = attach(model, method)
    attach(plain, method)
    assert {p.dtype for p in kit["a"].parameters()} == {torch.float32}
    assert far(run(model, given), run(plain, given)) < tolerance < far(bare, run(plain, given)) / 2
    expected = gradients(plain, given)
    for key, gradient in gradients(model, given).items():
        assert gradient is not None and gradient.any(), key
        assert far(gradient, expected[key]) < 2 * tolerance, key
    kit.detach()
    assert torch.equal(run(model, given), bare)


def test_eight_bits_are_rounded_as_the_kernel_rounds_them() -> None:
    """By this oracle the tests on a GPU know how far its kernel may be; on a CPU layers do not call it."""
    bnb = pytest.importorskip("bitsandbytes")
    plain = nn.Linear(64, 32, bias=False)
    kernel = _bitsandbytes(bnb.nn, plain, "int8").to("cpu")
    plain.weight.data.copy_(dequantised(kernel, "int8"))
    oracle = copy.deepcopy(plain)
    oracle.__class__ = Rounded
    kernel.init_8bit_state()
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))
    x[0, 0] = 0  # padding
    with torch.no_grad():
        found = bnb.autograd._functions.MatMul8bitLt.apply(x, kernel.weight, None, None, kernel.state)
        assert far(found, oracle(x)) < 1e-4 < 1e-3 < far(found, plain(x))


@kinds
def test_identity_at_the_start(kind: str) -> None:
    model, given = built(kind)[0], tiny.inputs("llama")
    bare = run(model, given)
    ak.attach(model, "lora")
    assert torch.equal(run(model, given), bare)


@kinds
@pytest.mark.parametrize("method", ["lora", "ia3", "vera[r=4]"])
def test_merging_is_refused(kind: str, method: str) -> None:
    model, given = built(kind)[0], tiny.inputs("llama")
    kit = attach(model, method)
    adapted = run(model, given)
    for verb in (kit.merge, kit.merge_and_detach):
        with pytest.raises(ak.errors.PlanError) as error:
            verb("a")
        assert error.value.code == "cannot-merge"
    assert torch.equal(run(model, given), adapted) and kit.merged is None


@kinds
@pytest.mark.parametrize("method", ["dora", "dvora[r=4]", {"method": "lora", "init": "pissa"}])
def test_methods_that_read_the_weight_are_refused(kind: str, method: str | dict[str, str]) -> None:
    model, given = built(kind)[0], tiny.inputs("llama")
    bare = run(model, given)
    with pytest.raises(ak.errors.PlanError) as error:
        ak.attach(model, method)
    assert error.value.code == "weight-unreadable"
    assert torch.equal(run(model, given), bare) and "adapterkit" not in str(model)


def test_maps_that_are_quantised_after_attach() -> None:
    """The weight says that it is of float32, and is no matrix that could be read."""
    given, (_, plain) = tiny.inputs("llama"), built("torchao")
    model = tiny.build("llama", **SIZES)
    attach(model, "lora[targets=all]")
    quantise(model, "torchao")
    attach(plain, "lora[targets=all]")
    assert far(run(model, given), run(plain, given)) < 1e-4


@pytest.mark.parametrize("method", ["dora", "dvora[r=4]"])
def test_a_norm_of_what_is_quantised_after_attach_is_refused(method: str) -> None:
    model, given = tiny.build("llama", **SIZES), tiny.inputs("llama")
    kit = attach(model, method)
    quantise(model, "torchao")
    with pytest.raises(ak.errors.PlanError) as error:
        run(model, given)
    assert error.value.code == "weight-unreadable" and error.value.address.endswith("q_proj")
    with kit.disabled():
        run(model, given)


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch gives this kind of quantisation up
@pytest.mark.parametrize("method", ["seq_bn", "seq_bn_inv", "loreft[r=2]"])
def test_adapters_that_are_quantised_dynamically(method: str, tmp_path: Path) -> None:
    model, given = tiny.build("bert"), tiny.inputs("bert")
    kit = attach(model, method)
    with kit.disabled():
        bare = run(model, given)
    exact = run(model, given)
    model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert far(run(model, given), exact) < 0.1 < far(bare, exact)
    _refused(ak.of(model), tmp_path)


def test_an_adapter_that_was_quantised_is_not_saved(tmp_path: Path) -> None:
    model = tiny.build("bert")
    kit = attach(model, "seq_bn")
    quantise(model, "torchao")
    _refused(kit, tmp_path)


def _refused(kit: ak.Kit, folder: Path) -> None:
    with pytest.raises(ak.errors.FileFormatError) as error:
        kit.save(folder / "a", "a")
    assert error.value.code == "weight-unreadable" and not list(folder.iterdir())


@kinds
def test_a_quantised_head_is_refused(kind: str, tmp_path: Path) -> None:
    def build() -> nn.Module:
        sizes = {"vocab_size": 64, "num_hidden_layers": 1, "num_labels": 2, "hidden_size": 64}
        config = AutoConfig.for_model("bert", num_attention_heads=4, intermediate_size=64, **sizes)
        return AutoModelForSequenceClassification.from_config(config).eval()

    model = build()
    quantise(model, kind)
    for attempt in (
        lambda: ak.attach(model, "lora"),
        lambda: ak.load(model, ak.attach(build(), "lora", name="b").save(tmp_path / "b")),
    ):
        with pytest.raises(ak.errors.PlanError) as error:
            attempt()
        assert error.value.code == "quantised-head" and "adapterkit" not in str(model)
    ak.attach(model, "lora", head=False)
