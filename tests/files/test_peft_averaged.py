"""Averages of LoRAs, ours and PEFT's, on a whole model, where PEFT's are on whole changes too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest

import adapterkit as ak
from tests.files.peft_side import NOISE, run, same, shake
from tests.models.tiny import build

pytestmark = NOISE
NAMES = ("first", "second", "third")


@pytest.mark.parametrize(
    ("theirs", "ours", "weights"),
    [
        ({"combination_type": "cat"}, {"strategy": "linear"}, [0.2, 0.5, 0.9]),
        ({"combination_type": "cat"}, {"strategy": "linear"}, [1.5, -0.5, 0.4]),
        ({"combination_type": "svd", "svd_rank": 3}, {"strategy": "svd", "rank": 3}, [0.2, 0.5, -0.9]),
        (
            {"combination_type": "magnitude_prune_svd", "svd_rank": 5, "density": 0.3},
            {"strategy": "magnitude", "rank": 5, "density": 0.3},
            [0.2, 0.5, -0.9],
        ),
        (
            {"combination_type": "ties_svd", "svd_rank": 5, "density": 0.3},
            {"strategy": "ties", "rank": 5, "density": 0.3},
            [1.0, 1.0, 1.0],
        ),
    ],
    ids=lambda value: value.get("combination_type", "") if isinstance(value, dict) else None,
)
@pytest.mark.parametrize("row", ["bert", "gpt2"])
def test_the_same_average(
    row: str, theirs: dict[str, Any], ours: dict[str, Any], weights: list[float], tmp_path: Path
) -> None:
    targets = ["c_attn", "c_proj"] if row == "gpt2" else ["query", "value", "output.dense"]
    model: Any = build(row)
    for index, name in enumerate(NAMES):
        config = peft.LoraConfig(r=2 + index, lora_alpha=3, target_modules=targets)
        if index:
            model.add_adapter(name, config)
        else:
            model = peft.get_peft_model(model, config, adapter_name=name)
        model.set_adapter(name)
        shake((p for p in model.parameters() if p.requires_grad), seed=index)
    model.save_pretrained(tmp_path)
    model.add_weighted_adapter(list(NAMES), weights, "mean", **theirs)
    model.set_adapter("mean")
    expected = run(model, row)

    kit: Any = None
    plain = build(row)
    for name in NAMES:
        kit = ak.load(plain, tmp_path / name, name=name)
    # the paper's mean of what agrees is PEFT's for weights of one
    ties = ours["strategy"] == "ties"
    kit.average(dict(zip(NAMES, weights, strict=True)), name="mean", normalize=ties, **ours)
    with kit.using("first"):
        other = run(plain, row)
    with kit.using("mean"):
        same(run(plain, row), expected)
    assert (other - expected).abs().max() > 1e-2
