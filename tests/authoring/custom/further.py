"""More models of nobody's making: habits of public code that the first eight do not have."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Made = tuple[nn.Module, dict[str, Any]]

# --------------------------------------------------------------- an encoder with masks (B, 1, T) and segments


class Heads(nn.Module):
    """Projections in a list, the number of heads under a name of one letter."""

    def __init__(self, width: int, h: int) -> None:
        super().__init__()
        self.h, self.d_k = h, width // h
        self.maps = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.out, self.drop = nn.Linear(width, width), nn.Dropout(0.1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        parts = zip(self.maps, (q, k, v), strict=True)
        q, k, v = (f(x).view(len(x), -1, self.h, self.d_k).transpose(1, 2) for f, x in parts)
        scores = q @ k.transpose(-2, -1) / math.sqrt(self.d_k)
        scores = scores.masked_fill(mask.unsqueeze(1) == 0, -1e9)
        return self.out((self.drop(scores.softmax(-1)) @ v).transpose(1, 2).flatten(2))


class Sublayer(nn.Module):
    """Dropout, residual and norm around whatever it is called with."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(width), nn.Dropout(0.1)

    def forward(self, x: Tensor, made: Tensor) -> Tensor:
        return self.norm(x + self.drop(made))


class ClassicBlock(nn.Module):
    def __init__(self, width: int, h: int) -> None:
        super().__init__()
        self.attend, self.wide, self.narrow = Heads(width, h), nn.Linear(width, 64), nn.Linear(64, width)
        self.first, self.second = Sublayer(width), Sublayer(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.first(x, self.attend(x, x, x, mask))
        return self.second(x, self.narrow(F.gelu(self.wide(x))))


class Pieces(nn.Module):
    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.token = nn.Embedding(words, width, padding_idx=0)
        self.segment, self.place = nn.Embedding(3, width), nn.Embedding(32, width)
        self.norm, self.drop = nn.LayerNorm(width), nn.Dropout(0.1)

    def forward(self, seq: Tensor, seg: Tensor) -> Tensor:
        places = self.place(torch.arange(seq.shape[1], device=seq.device))
        return self.drop(self.norm(self.token(seq) + places + self.segment(seg)))


class Classic(nn.Module):
    def __init__(self, width: int = 32, h: int = 4, words: int = 50) -> None:
        super().__init__()
        self.pieces = Pieces(words, width)
        self.blocks = nn.ModuleList(ClassicBlock(width, h) for _ in range(2))
        self.follows, self.words = nn.Linear(width, 2), nn.Linear(width, words)

    def forward(self, seq: Tensor, seg: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x = self.pieces(seq, seg)
        for block in self.blocks:
            x = block(x, mask)
        return self.follows(x[:, 0]), self.words(x)


def classic() -> Made:
    torch.manual_seed(0)
    seq = torch.randint(5, 50, (2, 7))
    seq[1, -2:] = 0
    seg = torch.tensor([[1, 1, 1, 1, 2, 2, 2], [1, 1, 2, 2, 2, 0, 0]])
    return Classic(), {"seq": seq, "seg": seg, "mask": (seq > 0).unsqueeze(1)}


# ----------------------------------------------------- sound: half a feed-forward part on each side, a stride


class Half(nn.Module):
    """A feed-forward part as one sequence, its norm included."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 64), nn.SiLU(), nn.Linear(64, width), nn.Dropout(0.1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Relative(nn.Module):
    """Attention with a projected table of sines for relative positions, its norm and dropout included."""

    def __init__(self, width: int, h: int) -> None:
        super().__init__()
        self.h, self.norm, self.drop = h, nn.LayerNorm(width), nn.Dropout(0.1)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.place = nn.Linear(width, width, bias=False)
        self.u, self.v = (nn.Parameter(torch.randn(h, 1, width // h) * 0.1) for _ in range(2))

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        rows, length, width = x.shape
        x = self.norm(x)
        at = torch.arange(length - 1, -length, -1.0, device=x.device)[:, None]
        at = at * torch.exp(torch.arange(0, width, 2, device=x.device) * -(math.log(1e4) / width))
        q, k, v = (
            f(x).unflatten(-1, (self.h, -1)).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        p = self.place(torch.cat([at.sin(), at.cos()], -1)).unflatten(-1, (self.h, -1)).transpose(0, 1)
        moved = F.pad((q + self.v) @ p.transpose(-1, -2), (1, 0)).view(rows, self.h, -1, length)
        moved = moved[:, :, 1:].reshape(rows, self.h, length, -1)[..., :length]
        scores = ((q + self.u) @ k.transpose(-1, -2) + moved) / math.sqrt(width)
        scores = scores.masked_fill(hidden[:, None, None], -1e9)
        return self.drop(self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)))


class Mixing(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.into = nn.LayerNorm(width), nn.Conv1d(width, 2 * width, 1)
        self.deep = nn.Conv1d(width, width, 3, padding=1, groups=width)
        self.back, self.drop = nn.Conv1d(width, width, 1), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.deep(F.glu(self.into(self.norm(x).transpose(1, 2)), 1))
        return self.drop(self.back(F.silu(x)).transpose(1, 2))


class SoundBlock(nn.Module):
    def __init__(self, width: int, h: int) -> None:
        super().__init__()
        self.front, self.attend, self.mix = Half(width), Relative(width, h), Mixing(width)
        self.rear, self.norm = Half(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        x = x + 0.5 * self.front(x)
        x = x + self.attend(x, hidden)
        x = x + self.mix(x)
        return self.norm(x + 0.5 * self.rear(x))


class Sound(nn.Module):
    """Spectra and their lengths; a mask is made of them behind a stride."""

    def __init__(self, width: int = 32, h: int = 4) -> None:
        super().__init__()
        self.stride = nn.Conv1d(8, width, 3, stride=2, padding=1)
        self.project = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.1))
        self.layers = nn.ModuleList(SoundBlock(width, h) for _ in range(2))
        self.letters = nn.Linear(width, 20)

    def forward(self, spectra: Tensor, lengths: Tensor) -> Tensor:
        x = self.project(self.stride(spectra).transpose(1, 2))
        hidden = torch.arange(x.shape[1], device=x.device) >= ((lengths + 1) // 2)[:, None]
        for layer in self.layers:
            x = layer(x, hidden)
        return self.letters(x).log_softmax(-1)


def sound() -> Made:
    torch.manual_seed(0)
    return Sound(), {"spectra": torch.randn(2, 8, 16), "lengths": torch.tensor([16, 11])}


# ---------------------------------------- one head of keys for all queries, a loop over experts, named layers


class OneKey(nn.Module):
    def __init__(self, width: int, nh: int) -> None:
        super().__init__()
        self.nh, self.wide = nh, width // nh
        self.qkv, self.out = nn.Linear(width, width + 2 * self.wide, bias=False), nn.Linear(width, width)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split([self.nh * self.wide, self.wide, self.wide], -1)
        q = q.unflatten(-1, (self.nh, -1)).transpose(1, 2)
        scores = q @ k[:, None].transpose(-1, -2) / self.wide**0.5 + bias
        return self.out((scores.softmax(-1) @ v[:, None]).transpose(1, 2).flatten(2))


class Expert(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(width, 24), nn.Linear(24, width), nn.Linear(width, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Bank(nn.Module):
    """Each token to two of four experts, one expert after the other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.experts, self.choose = nn.ModuleList(Expert(width) for _ in range(4)), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        weights, chosen = self.choose(flat).topk(2)
        weights, out = weights.softmax(-1), torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows, place = torch.where(chosen == number)
            out[rows] += weights[rows, place, None] * expert(flat[rows])
        return out.view_as(x)


class BankBlock(nn.Module):
    def __init__(self, width: int, nh: int) -> None:
        super().__init__()
        self.n1, self.attn, self.n2, self.bank = (
            nn.RMSNorm(width),
            OneKey(width, nh),
            nn.RMSNorm(width),
            Bank(width),
        )

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = x + self.attn(self.n1(x), bias)
        return x + self.bank(self.n2(x))


class Banks(nn.Module):
    """Layers under names in a map, as where stages of a pipeline hold some of them."""

    def __init__(self, width: int = 32, nh: int = 4, words: int = 50) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.layers = nn.ModuleDict({str(i): BankBlock(width, nh) for i in range(2)})
        self.norm, self.speak = nn.RMSNorm(width), nn.Linear(width, words, bias=False)
        self.register_buffer("slopes", 2.0 ** -torch.arange(1.0, nh + 1))

    def forward(self, tokens: Tensor) -> Tensor:
        at = torch.arange(tokens.shape[1], device=tokens.device)
        far = at - at[:, None]
        bias = (far * self.slopes[:, None, None]).masked_fill(far > 0, -1e9)
        x = self.words(tokens)
        for layer in self.layers.values():
            x = layer(x, bias)
        return self.speak(self.norm(x))


def banks() -> Made:
    torch.manual_seed(0)
    return Banks(), {"tokens": torch.randint(5, 50, (2, 7))}


# ---------------------------------------------- patches and a time that shifts, scales and gates every branch


class Joint(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Modulated(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.attn, self.fc1, self.fc2 = Joint(width, 4), nn.Linear(width, 64), nn.Linear(64, width)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, -1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.fc2(F.gelu(self.fc1(self.norm2(x) * (1 + scale2) + shift2)))


class Final(nn.Module):
    """A head with a norm of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width, elementwise_affine=False), nn.Linear(width, 12)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.linear(self.norm(x) * (1 + c[:, None]))


class Patches(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj, self.norm = nn.Conv2d(3, width, 2, 2), nn.Identity()

    def forward(self, image: Tensor) -> Tensor:
        return self.norm(self.proj(image).flatten(2).transpose(1, 2))


class Denoiser(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patches, self.label, self.time = Patches(width), nn.Embedding(10, width), nn.Linear(1, width)
        self.places = nn.Parameter(torch.randn(1, 16, width) * 0.1)
        self.blocks, self.final = nn.ModuleList(Modulated(width) for _ in range(2)), Final(width)

    def forward(self, image: Tensor, time: Tensor, label: Tensor) -> Tensor:
        x = self.patches(image) + self.places
        c = self.time(time[:, None]) + self.label(label)
        for block in self.blocks:
            x = block(x, c)
        return self.final(x, c)


def denoiser() -> Made:
    torch.manual_seed(0)
    image, time = torch.randn(2, 3, 8, 8), torch.tensor([0.1, 0.7])
    return Denoiser(), {"image": image, "time": time, "label": torch.tensor([1, 4])}


# ------------------------------------- patches, a class token, a factor for each channel, an idle norm before


class ScaledBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(width), Joint(width, 4), nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 64), nn.Linear(64, width)
        self.gamma_1, self.gamma_2 = (nn.Parameter(torch.rand(width) + 0.1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gamma_1 * self.attn(self.norm1(x))
        return x + self.gamma_2 * self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Scaled(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patches, self.token = Patches(width), nn.Parameter(torch.randn(1, 1, width))
        self.drop, self.norm_pre = nn.Dropout(0.0), nn.Identity()
        self.blocks = nn.Sequential(ScaledBlock(width), ScaledBlock(width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), self.patches(x)], 1)
        return self.head(self.norm(self.blocks(self.norm_pre(self.drop(x))))[:, 0])


def scaled() -> Made:
    torch.manual_seed(0)
    return Scaled(), {"x": torch.randn(2, 3, 8, 8)}
