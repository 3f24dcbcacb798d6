"""A model's own adapters, silenced: the model whose own adapters are zero, and back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import adapterkit as ak
from adapterkit.errors import PlanError
from tests.models import tiny


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(torch.arange(2, 14).view(2, 6)).last_hidden_state
    return out


def test_own_adapters_are_silent_while_it_is_active() -> None:
    model = tiny.build("xmod").eval()
    before, zeroed = logits(model), copy.deepcopy(model)
    for path, parameter in zeroed.named_parameters():
        if ".adapter_modules." in path and ".dense2." in path:
            nn.init.zeros_(parameter)
    kit = ak.attach(model, "silence|lora", head=False)
    assert torch.equal(logits(model), logits(zeroed))
    assert not torch.equal(before, logits(zeroed))
    with kit.disabled():
        assert torch.equal(logits(model), before)
    with pytest.raises(PlanError, match="own adapters"):
        kit.merge("default")
    kit.detach()
    assert torch.equal(logits(model), before)


def test_a_model_without_adapters_of_its_own_is_refused() -> None:
    with pytest.raises(PlanError) as caught:
        ak.attach(tiny.build("bert"), "silence", head=False)
    assert caught.value.code == "nothing-selected"
