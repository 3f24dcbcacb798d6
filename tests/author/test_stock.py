"""torch's own encoder layers: their shortcut of evaluation passes adapters by, and so it is refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F

import adapterkit as ak
from adapterkit.errors import PlanError
from tests.author import masked


@pytest.fixture
def fast_path() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(True)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.usefixtures("fast_path")
def test_an_adapter_that_would_be_passed_by_is_refused() -> None:
    model, inputs = masked.stock()
    interface = ak.draft(model, inputs=inputs).interface
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(PlanError) as caught:
        ak.attach(model, "lora[targets=[up]]", interface=interface)
    assert [problem.code for problem in caught.value.problems] == ["weight-without-call"]
    assert "set_fastpath_enabled(False)" in str(caught.value)
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.usefixtures("fast_path")
@torch.no_grad()
def test_without_the_shortcut_the_adapter_acts_in_evaluation() -> None:
    model, inputs = masked.stock()
    interface = ak.draft(model.eval(), inputs=inputs).interface
    torch.backends.mha.set_fastpath_enabled(False)
    kit = ak.attach(model, "lora[targets=[up], r=2, alpha=2]", interface=interface)
    factors = list(kit["default"].parameters())
    for parameter in factors:
        parameter.copy_(torch.randn_like(parameter))
    first = model.body.layers[0]  # type: ignore[union-attr]
    x = torch.randn(1, 3, masked.WIDTH)
    y = first.norm1(x + first.self_attn(x, x, x, need_weights=False)[0])
    a, b = (next(p for p in factors if p.shape == shape) for shape in ((2, masked.WIDTH), (32, 2)))
    up = F.linear(y, first.linear1.weight, first.linear1.bias) + y @ a.T @ b.T
    torch.testing.assert_close(first(x), first.norm2(y + first.linear2(F.relu(up))))
