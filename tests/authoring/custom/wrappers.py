"""Models of users that hold a model of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.models import tiny


class Transformer(nn.Module):
    """Takes and gives a dict of features, as SentenceTransformer's modules do."""

    def __init__(self, auto_model: nn.Module) -> None:
        super().__init__()
        self.auto_model = auto_model

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        given = {name: features[name] for name in ("input_ids", "attention_mask")}
        return {**features, "token_embeddings": self.auto_model(**given).last_hidden_state}


class Pooling(nn.Module):
    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        mask = features["attention_mask"][..., None].float()
        summed = (features["token_embeddings"] * mask).sum(1)
        return {**features, "sentence_embedding": summed / mask.sum(1)}


class Dense(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 12)

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**features, "sentence_embedding": torch.tanh(self.linear(features["sentence_embedding"]))}


class Sentences(nn.Sequential):
    """A chain of modules that are called with features."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        for module in self:
            features = module(features)
        return features


class Classifier(nn.Module):
    """The model as an attribute, a head beside it."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.backbone = encoder
        self.dropout, self.scores = nn.Dropout(0.1), nn.Linear(width, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = self.backbone(input_ids=ids, attention_mask=mask).last_hidden_state
        return self.scores(self.dropout(states[:, 0]))


def sentences() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model = Sentences(Transformer(tiny.build("bert")), Pooling(), Dense(32)).eval()
    return model, {"features": tiny.inputs("bert")}


def classifier() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    given = tiny.inputs("modernbert")
    model = Classifier(tiny.build("modernbert"), 32).eval()
    return model, {"ids": given["input_ids"], "mask": given["attention_mask"]}
