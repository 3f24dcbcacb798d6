"""Dropout of the LoRA family: only in training, only on what the update reads, and right on average."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.unit import one_module as one

P, D, SAMPLES = 0.25, 8, 40_000
METHODS: list[dict[str, Any]] = [
    {"method": "lora", "r": 3},
    {"method": "lora", "r": 3, "gating": True},
    {"method": "lora", "r": 3, "init": "olora"},
    {"method": "vera", "r": 3},
    {"method": "dora", "r": 3},
    {"method": "dvora", "r": 3},
    {"method": "mtl_lora", "r": 3, "n_up": 2},
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: "-".join(map(str, method.values())))
def test_dropout_acts_in_training_only_and_is_right_on_average(method: dict[str, Any]) -> None:
    module = one.host(D, D)
    plain = one.units(method, [one.slot(module)])["q"]
    unit = one.units({**method, "dropout": P}, [one.slot(module)])["q"]
    x = one.tokens(D).detach()[:1, :1]
    many = x.expand(SAMPLES, 1, D)
    with torch.no_grad():
        assert torch.equal(one.run(module, {"q": unit}, x), one.run(module, {"q": plain}, x))
        torch.manual_seed(0)
        found = one.run(module, {"q": unit.train()}, many)[:, 0]
        assert torch.equal(one.run(module, {"q": unit.eval()}, x), one.run(module, {"q": plain}, x))
        expected = one.run(module, {"q": plain}, x)[0, 0]
    assert len(found.unique(dim=0)) > 50
    error = found.std(dim=0) / SAMPLES**0.5
    assert ((found.mean(dim=0) - expected).abs() < 5 * error).all()


def test_dropout_thins_the_input_of_the_update_and_scales_the_rest() -> None:
    module = one.host(D, D)
    unit = one.units({"method": "lora", "r": D, "dropout": P}, [one.slot(module)])["q"]
    unit.A.data, unit.B.data = torch.eye(D).double(), torch.eye(D).double()
    x = torch.ones(SAMPLES, 1, D, dtype=torch.float64)
    torch.manual_seed(0)
    with torch.no_grad():
        update = one.run(module, {"q": unit.train()}, x) - module(x)
    kept = update.abs() > 1e-9
    torch.testing.assert_close(update[kept], torch.full_like(update[kept], 1 / (1 - P)))
    share = kept.double().mean().item()
    assert abs(share - (1 - P)) < 5 * (P * (1 - P) / kept.numel()) ** 0.5
