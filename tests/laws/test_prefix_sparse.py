"""Prefixes in attention that sees a few chosen keys only: its forward chooses by the attention function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.composition import Setup
from tests.laws.matrix import randomise
from tests.models import further

TYPES = [t for t in ("deepseek_v32", "glm_moe_dsa", "mistral_large4_text") if t in further.types()]


def prepared(model_type: str, implementation: str) -> tuple[ak.Kit, dict[str, Any]]:
    model, given = further.build(model_type)
    model.eval().set_attn_implementation(implementation)
    kit = ak.attach(model, "prefix_tuning_flat[prefix_length=3]", name="p", head=False)
    randomise(kit, "p")
    return kit, dict(given)


def states(kit: ak.Kit, setup: Setup | None, given: dict[str, Any], rows: Any = None) -> Tensor:
    with torch.no_grad(), kit.using(setup, rows=rows):
        found: Tensor = kit.model(**given).last_hidden_state
    return found


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", TYPES)
def test_a_row_without_a_prefix_is_the_models(model_type: str, implementation: str) -> None:
    """Beside one with a prefix it saw all keys: the model did not know the attention function by our name."""
    kit, given = prepared(model_type, implementation)
    found = states(kit, ak.Route("p"), given, rows=[None, "p"])
    torch.testing.assert_close(found[0], states(kit, None, given)[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], states(kit, "p", given)[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", TYPES)
def test_a_token_that_is_not_chosen_is_not_seen(model_type: str, implementation: str) -> None:
    """With the first key alone chosen, and one layer, no state depends on the tokens between."""
    kit, given = prepared(model_type, implementation)
    layers = next(iter(kit.blueprint.stacks.values())).layers
    for layer in layers:
        indexer = next(m for name, m in layer.named_modules() if name.endswith("indexer"))
        indexer.register_forward_hook(_first_key)
    other = {**given, "input_ids": given["input_ids"].clone()}
    other["input_ids"][:, 2:-1] = (other["input_ids"][:, 2:-1] + 1) % 50 + 3
    for setup in (None, "p"):
        one, two = states(kit, setup, given), states(kit, setup, other)
        torch.testing.assert_close(one[:, -1], two[:, -1], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(one[:, 2], two[:, 2], atol=1e-2), "its own token is the stream"
    assert not torch.allclose(states(kit, None, given), states(kit, "p", given), atol=1e-2)


def _first_key(indexer: nn.Module, args: Any, chosen: Tensor) -> Tensor:
    return torch.zeros_like(chosen)
