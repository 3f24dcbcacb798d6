"""Models whose masks have their own names, and one of which calls hidden what others call visible."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS = 16, 2
LENGTH, SEEN = 6, 4
"""Tokens of a row, and how many of the second row are no padding."""


class Attend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS
        self.ask, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, source: Tensor, shown: Tensor | None) -> Tensor:
        def split(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        mask = None if shown is None else shown[:, None, None, :]
        q, k, v = split(self.ask(x)), split(self.key(source)), split(self.value(source))
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, *, reads: bool = False) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(WIDTH), Attend()
        self.norm2, self.cross = (nn.LayerNorm(WIDTH), Attend()) if reads else (None, None)
        self.norm3, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, x: Tensor, shown: Tensor | None, states: Tensor | None = None) -> Tensor:
        y = self.norm1(x)
        if self.cross is None or self.norm2 is None:
            x = x + self.attention(y, y, shown)
        else:
            x = x + self.attention(y, y, None)
            assert states is not None
            x = x + self.cross(self.norm2(x), states, shown)
        return x + self.down(F.gelu(self.up(self.norm3(x))))


class Keeping(nn.Module):
    """A classifier with a mask whose ones are visible; the mean of its tokens decides."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.classify = nn.Linear(WIDTH, 3)

    def forward(self, words: Tensor, keep: Tensor | None = None) -> Tensor:
        x = self.table(words)
        for layer in self.layers:
            x = layer(x, keep)
        weight = torch.ones_like(words) if keep is None else keep
        x = self.norm(x) * weight.unsqueeze(-1)
        return self.classify(x.sum(1) / weight.sum(1, keepdim=True))


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, source: Tensor, padding: Tensor | None = None) -> Tensor:
        x = self.table(source)
        for layer in self.layers:
            x = layer(x, None if padding is None else padding.logical_not())
        return x


class Writer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, WIDTH)
        self.layers = nn.ModuleList(Layer(reads=True) for _ in range(2))

    def forward(self, target: Tensor, memory: Tensor, padding: Tensor | None = None) -> Tensor:
        x = self.table(target)
        for layer in self.layers:
            x = layer(x, None if padding is None else padding.logical_not(), memory)
        return x


class Hiding(nn.Module):
    """An encoder-decoder with a mask whose ones hide, as torch.nn.Transformer has them."""

    def __init__(self) -> None:
        super().__init__()
        self.reader, self.writer, self.speak = Reader(), Writer(), nn.Linear(WIDTH, 40)

    def forward(self, source: Tensor, target: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.speak(self.writer(target, self.reader(source, padding), padding))


def _mask() -> Tensor:
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[1, SEEN:] = False
    return mask


def keeping() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    return Keeping(), {"words": torch.arange(2 * LENGTH).view(2, LENGTH), "keep": _mask()}


def hiding() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    words = torch.arange(2 * LENGTH).view(2, LENGTH)
    return Hiding(), {"source": words, "target": words[:, :3] + 20, "padding": _mask().logical_not()}


class Stock(nn.Module):
    """Layers of torch itself, which in evaluation read the weights of their parts without calling them."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, words: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.body(self.table(words), src_key_padding_mask=padding)


def stock() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    words = torch.arange(2 * LENGTH).view(2, LENGTH)
    return Stock(), {"words": words, "padding": _mask().logical_not()}
