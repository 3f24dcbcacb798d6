"""A tiny BERT classifier and what the tests of the handle look at."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.errors import AdapterkitError
from tests.models import tiny

CLS = "BertForSequenceClassification"
INPUTS = tiny.inputs("bert", CLS)


def bert(cls: str = CLS, **settings: Any) -> nn.Module:
    return tiny.build("bert", cls, **settings)


def run(model: nn.Module, row: str = "bert", cls: str = CLS) -> Tensor:
    """All outputs as one flat tensor."""
    with torch.no_grad():
        return tiny.output(model(**tiny.inputs(row, cls)))


@torch.no_grad()
def move(kit: ak.Kit, name: str, seed: int = 1) -> Tensor:
    """Move the tensors of an adapter, heads included; gives what the model then puts out under it."""
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in kit[name].named_parameters():
        if not key.startswith("shared."):
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    with kit.using(name):
        return run(kit.model)


def picture(model: nn.Module) -> dict[str, Any]:
    """Class and attributes of every module, containers by their content."""
    return {
        path: (type(module), {key: _plain(value) for key, value in vars(module).items()})
        for path, module in model.named_modules()
    }


def _plain(value: Any) -> Any:
    return [(key, id(item)) for key, item in value.items()] if isinstance(value, dict) else id(value)


def trained(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def refused(kind: type[AdapterkitError], code: str, call: Any, *args: Any, **options: Any) -> AdapterkitError:
    """The error of a call, which has this type and code."""
    with pytest.raises(kind) as caught:
        call(*args, **options)
    assert caught.value.code == code
    return caught.value
