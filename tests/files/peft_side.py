"""What the tests of PEFT's files share: models with random adapters on either side, and their outputs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adapterkit.errors import FileFormatError
from tests.models.tiny import build, inputs, output

NOISE = [
    # PEFT says this of a Conv1D or Linear whenever a model holds both
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to (False|True) but the target module is"),
    # transformers 5.5 has DeBERTa scripted, which newer versions of torch tell it not to do
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
    # PEFT asks transformers in an old way
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@torch.no_grad()
def shake(parameters: Iterable[Tensor], seed: int = 0) -> None:
    """Move tensors away from their start."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


@torch.no_grad()
def run(model: nn.Module, row: str, cls: str | None = None) -> Tensor:
    return output(model.eval()(**inputs(row, cls)))


def same(got: Tensor, want: Tensor) -> None:
    """Equal to 1e-5, of the largest number where a random adapter makes outputs large."""
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * max(1.0, float(want.abs().max())))


def theirs(row: str, cls: str | None, config: peft.PeftConfig, directory: Path, **overrides: Any) -> Tensor:
    """Save a random adapter of PEFT; the output of the model with it."""
    model = peft.get_peft_model(build(row, cls, **overrides), config)
    shake(p for p in model.parameters() if p.requires_grad)
    model.save_pretrained(directory)
    return run(model, row, cls)


def loaded_there(row: str, cls: str | None, directory: Path, **overrides: Any) -> Tensor:
    """The output of a fresh model with the adapter as PEFT reads it."""
    return run(peft.PeftModel.from_pretrained(build(row, cls, **overrides), directory), row, cls)


def edit(directory: Path, **fields: Any) -> None:
    """Change fields of the config."""
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def said(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / "adapter_config.json").read_text()))


def tensors(directory: Path) -> dict[str, Tensor]:
    return dict(load_file(directory / "adapter_model.safetensors"))


def put(directory: Path, named: dict[str, Tensor]) -> None:
    save_file(named, directory / "adapter_model.safetensors", {"format": "pt"})


def codes(error: FileFormatError) -> set[str]:
    return {problem.code for problem in error.problems}
