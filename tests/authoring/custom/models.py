"""Models as people write them, which know nothing of adapterkit. Each has a YAML beside it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH, SEQ = 3, 7


# ----------------------------------------------------------------------- a vision transformer with fused rows


class FusedAttention(nn.Module):
    """As timm writes it: one matrix for q, k and v, norms of heads that may be off."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        self.attn_drop, self.proj, self.proj_drop = nn.Dropout(0.0), nn.Linear(dim, dim), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        qkv = self.qkv(x).reshape(rows, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(rows, length, width)))


class LayerScale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Feed(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(0.0)
        self.fc2, self.drop2 = nn.Linear(hidden, dim), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))


class VisionBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1 = nn.LayerNorm(dim), FusedAttention(dim, num_heads), LayerScale(dim)
        self.drop_path1 = nn.Identity()
        self.norm2, self.mlp, self.ls2 = nn.LayerNorm(dim), Feed(dim, 2 * dim), LayerScale(dim)
        self.drop_path2 = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class Vision(nn.Module):
    """Patches, a class token, blocks, a norm, a head on the class token."""

    def __init__(self, dim: int = 24, num_heads: int = 3) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 4, 4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.1)
        self.pos_embed = nn.Parameter(torch.randn(1, 5, dim) * 0.1)
        self.pos_drop = nn.Dropout(0.0)
        self.blocks = nn.Sequential(*(VisionBlock(dim, num_heads) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch_embed(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1)
        x = self.norm(self.blocks(self.pos_drop(x + self.pos_embed)))
        return self.head(x[:, 0])


# --------------------------------------------------------------- a language model with ALiBi, all written out


class SlopedAttention(nn.Module):
    """softmax(q k^T / sqrt(E) - m |i - j|) v, as Press et al. 2022 have it, over a causal mask."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.register_buffer(
            "slopes", torch.tensor([2.0 ** -(i + 1) for i in range(heads)]), persistent=False
        )

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        rows, length, width = x.shape

        def split(y: Tensor) -> Tensor:
            return y.view(rows, length, self.heads, -1).transpose(1, 2)

        q, k, v = split(self.query(x)), split(self.key(x)), split(self.value(x))
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(width // self.heads)
        at = torch.arange(length, device=x.device)
        scores = scores + (at[None, :] - at[:, None]) * self.slopes[:, None, None]  # type: ignore[index]
        hidden = (at[None, :] > at[:, None]) | ~keep[:, None, None, :].bool()
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
        return self.out(
            torch.matmul(torch.softmax(scores, -1), v).transpose(1, 2).reshape(rows, length, width)
        )


class SlopedLayer(nn.Module):
    """Post-norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention, self.norm_a = SlopedAttention(width, heads), nn.LayerNorm(width)
        self.wide, self.narrow, self.norm_b = nn.Linear(width, 40), nn.Linear(40, width), nn.LayerNorm(width)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        x = self.norm_a(x + self.attention(x, keep))
        return self.norm_b(x + self.narrow(F.gelu(self.wide(x))))


class Sloped(nn.Module):
    def __init__(self, width: int = 32, heads: int = 4, words: int = 50) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.layers = nn.ModuleList(SlopedLayer(width, heads) for _ in range(2))
        self.predict = nn.Linear(width, words, bias=False)

    def forward(self, tokens: Tensor, keep: Tensor | None = None) -> dict[str, Tensor]:
        keep = torch.ones_like(tokens) if keep is None else keep
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, keep)
        return {"logits": self.predict(x)}


# --------------------------------------------------------------------- grouped queries, a rotation of its own


class RMS(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    angles = positions[:, None, :, None] * 100.0 ** -(torch.arange(half, device=x.device) / half)
    left, right = x[..., :half], x[..., half:]
    return torch.cat(
        [left * angles.cos() - right * angles.sin(), left * angles.sin() + right * angles.cos()], -1
    )


class Grouped(nn.Module):
    """Four query heads, two key/value heads; keys and values in one matrix, group by group."""

    def __init__(self, width: int, heads: int, groups: int) -> None:
        super().__init__()
        self.n_heads, self.n_groups, self.size = heads, groups, 10
        self.wq, self.wkv = (
            nn.Linear(width, heads * 10, bias=False),
            nn.Linear(width, groups * 20, bias=False),
        )
        self.wo = nn.Linear(heads * 10, width, bias=False)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        rows, length, _ = x.shape
        q = self.wq(x).view(rows, length, self.n_heads, self.size).transpose(1, 2)
        kv = self.wkv(x).view(rows, length, self.n_groups, 2 * self.size).transpose(1, 2)
        k, v = kv.split(self.size, -1)
        q, k = rotated(q, positions), rotated(k, positions)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.wo(out.transpose(1, 2).reshape(rows, length, -1))


class GroupedBlock(nn.Module):
    """Norms before and after each branch."""

    def __init__(self, width: int, heads: int, groups: int) -> None:
        super().__init__()
        self.attn = Grouped(width, heads, groups)
        self.pre_a, self.post_a, self.pre_f, self.post_f = (RMS(width) for _ in range(4))
        self.w13, self.w2 = nn.Linear(width, 88, bias=False), nn.Linear(44, width, bias=False)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        x = x + self.post_a(self.attn(self.pre_a(x), positions, mask))
        up, gate = self.w13(self.pre_f(x)).chunk(2, -1)
        return x + self.post_f(self.w2(up * F.silu(gate)))


class Rotary(nn.Module):
    """A decoder that takes ids or embedded ids."""

    def __init__(self, width: int = 32, words: int = 50) -> None:
        super().__init__()
        self.tok = nn.Embedding(words, width)
        self.stack = nn.ModuleList(GroupedBlock(width, 4, 2) for _ in range(2))
        self.final, self.lm_head = RMS(width), nn.Linear(width, words, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self, ids: Tensor | None = None, vectors: Tensor | None = None, keep: Tensor | None = None
    ) -> dict[str, Tensor]:
        x = self.tok(ids) if vectors is None else vectors
        rows, length, _ = x.shape
        positions = torch.arange(length, device=x.device)[None].expand(rows, -1)
        mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()[None, None]
        if keep is not None:
            mask = mask & keep[:, None, None, :].bool() | torch.eye(length, dtype=torch.bool, device=x.device)
        for block in self.stack:
            x = block(x, positions, mask)
        states = self.final(x)
        return {"states": states, "logits": self.lm_head(states)}


class Closed(Rotary):
    """The same decoder, which takes ids alone and gives a loss."""

    def forward(
        self, ids: Tensor, keep: Tensor | None = None, targets: Tensor | None = None
    ) -> dict[str, Tensor]:  # type: ignore[override]
        found = super().forward(ids, keep=keep)
        if targets is not None:
            found["loss"] = F.cross_entropy(found["logits"].flatten(0, 1), targets.flatten())
        return found


# ---------------------------------------------------------------------------------------- encoder and decoder


class Attend(nn.Module):
    """Attention to any states, with einsum."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, states: Tensor, keep: Tensor | None, causal: bool = False) -> Tensor:
        q, k, v = (
            f(y).unflatten(-1, (self.num_heads, -1))
            for f, y in ((self.q, x), (self.k, states), (self.v, states))
        )
        scores = torch.einsum("bqhe,bkhe->bhqk", q, k) * q.shape[-1] ** -0.5
        if keep is not None:
            scores = scores.masked_fill(~keep[:, None, None, :].bool(), -1e4)
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -1e4)
        return self.o(torch.einsum("bhqk,bkhe->bqhe", scores.softmax(-1), v).flatten(2))


class PairLayer(nn.Module):
    """Pre-norm; with cross-attention in the decoder."""

    def __init__(self, width: int, heads: int, crossed: bool) -> None:
        super().__init__()
        self.norm1, self.own = nn.LayerNorm(width), Attend(width, heads)
        if crossed:
            self.norm2, self.cross = nn.LayerNorm(width), Attend(width, heads)
        self.norm3, self.ff1, self.ff2 = nn.LayerNorm(width), nn.Linear(width, 48), nn.Linear(48, width)
        self.drop = nn.Dropout(0.1)

    def forward(
        self, x: Tensor, keep: Tensor | None, memory: Tensor | None = None, memory_keep: Tensor | None = None
    ) -> Tensor:
        h = self.norm1(x)
        x = x + self.drop(self.own(h, h, keep, causal=memory is not None))
        if memory is not None:
            x = x + self.drop(self.cross(self.norm2(x), memory, memory_keep))
        return x + self.drop(self.ff2(torch.relu(self.ff1(self.norm3(x)))))


class Side(nn.Module):
    def __init__(self, width: int, heads: int, words: int, crossed: bool) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(32, width)
        self.drop = nn.Dropout(0.1)
        self.layers = nn.ModuleList(PairLayer(width, heads, crossed) for _ in range(2))
        self.norm = nn.LayerNorm(width)

    def forward(
        self,
        ids: Tensor | None = None,
        keep: Tensor | None = None,
        memory: Tensor | None = None,
        memory_keep: Tensor | None = None,
        embedded: Tensor | None = None,
    ) -> Tensor:
        x = self.words(ids) if embedded is None else embedded
        x = self.drop(x + self.places.weight[: x.shape[1]])
        for layer in self.layers:
            x = layer(x, keep, memory, memory_keep)
        return self.norm(x)


class Pair(nn.Module):
    def __init__(self, width: int = 32, heads: int = 4, words: int = 50) -> None:
        super().__init__()
        self.reader, self.writer = Side(width, heads, words, False), Side(width, heads, words, True)
        self.speak = nn.Linear(width, words)

    def forward(self, source: Tensor, source_keep: Tensor, target: Tensor, target_keep: Tensor) -> Tensor:
        memory = self.reader(source, source_keep)
        return self.speak(self.writer(target, target_keep, memory, source_keep))


class Woven(nn.Module):
    """Both stacks in one forward pass, which is given all ids and makes the states that are read."""

    def __init__(self, width: int = 32, heads: int = 4, words: int = 50) -> None:
        super().__init__()
        self.foreign, self.words = nn.Embedding(words, width), nn.Embedding(words, width)
        self.reading = nn.ModuleList(PairLayer(width, heads, False) for _ in range(2))
        self.writing = nn.ModuleList(PairLayer(width, heads, True) for _ in range(2))
        self.read, self.written = nn.LayerNorm(width), nn.LayerNorm(width)
        self.speak = nn.Linear(width, words)

    def forward(self, source: Tensor, source_keep: Tensor, target: Tensor, target_keep: Tensor) -> Tensor:
        memory, x = self.foreign(source), self.words(target)
        for layer in self.reading:
            memory = layer(memory, source_keep)
        memory = self.read(memory)
        for layer in self.writing:
            x = layer(x, target_keep, memory, source_keep)
        return self.speak(self.written(x))


# ------------------------------------------------------------------------------------------------- two towers


class Tower(nn.Module):
    """Post-norm encoder with separate projections and PyTorch's attention function."""

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TowerLayer(width, heads) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class TowerLayer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.merge = (nn.Linear(width, width) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v)
        )
        x = self.norm1(x + self.merge(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))
        return self.norm2(x + self.ffn(x))


class Towers(nn.Module):
    """Words and sounds, of different widths, in one space."""

    def __init__(self) -> None:
        super().__init__()
        self.word, self.words = nn.Embedding(50, 32), Tower(32, 4, 2)
        self.frame, self.sounds = nn.Linear(6, 24), Tower(24, 2, 3)
        self.frame_norm = nn.LayerNorm(24)
        self.text_map, self.sound_map = nn.Linear(32, 16), nn.Linear(24, 16)

    def forward(self, text: Tensor, sound: Tensor) -> dict[str, Tensor]:
        a = self.text_map(self.words(self.word(text)).mean(1))
        b = self.sound_map(self.sounds(self.frame_norm(self.frame(sound))).mean(1))
        return {"text": a, "sound": b, "scores": a @ b.t()}


# --------------------------------------------------------------------------------------------- parallel block


class ParallelBlock(nn.Module):
    """x + attention(n) + mlp(n) with one norm n, as in GPT-J; rows of q, k, v head by head."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.dense = (
            nn.LayerNorm(width),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )
        self.up, self.down = nn.Linear(width, 72), nn.Linear(72, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        n = self.norm(x)
        q, k, v = self.qkv(n).unflatten(-1, (self.heads, -1)).transpose(1, 2).chunk(3, -1)
        scores = (q @ k.mT) * q.shape[-1] ** -0.5
        length = x.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        hidden = ~(seen & keep[:, None, None, :].bool())
        weights = scores.masked_fill(hidden, -1e4).softmax(-1)
        attended = self.drop(self.dense((weights @ v).transpose(1, 2).flatten(2)))
        return x + attended + self.drop(self.down(F.gelu(self.up(n), approximate="tanh")))


class Parallel(nn.Module):
    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(50, width), nn.Embedding(40, width)
        self.h = nn.ModuleList(ParallelBlock(width, heads) for _ in range(2))
        self.ln = nn.LayerNorm(width)

    def forward(self, idx: Tensor, keep: Tensor) -> Tensor:
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        for block in self.h:
            x = block(x, keep)
        return self.ln(x)


# -------------------------------------------------------------------------------------------------- factories


def _drawn(make: Callable[[], nn.Module]) -> nn.Module:
    """Always the same weights, so large that attention is uneven."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.2 if parameter.ndim > 1 else parameter + 0.05 * noise)
    return model.eval()


def _ids(length: int = SEQ) -> Tensor:
    return torch.randint(3, 50, (BATCH, length), generator=torch.Generator().manual_seed(1))


def _keep(length: int = SEQ) -> Tensor:
    keep = torch.ones(BATCH, length, dtype=torch.long)
    keep[1, -2:] = 0
    return keep


Made = tuple[nn.Module, dict[str, Any]]


def vision() -> Made:
    image = torch.randn(BATCH, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    return _drawn(Vision), {"image": image}


def sloped() -> Made:
    return _drawn(Sloped), {"tokens": _ids(), "keep": _keep()}


def rotary() -> Made:
    return _drawn(Rotary), {"ids": _ids(), "keep": _keep()}


def closed() -> Made:
    return _drawn(Closed), {"ids": _ids(), "keep": _keep(), "targets": _ids()}


def pair() -> Made:
    inputs = {"source": _ids(), "source_keep": _keep(), "target": _ids(5), "target_keep": _keep(5)}
    return _drawn(Pair), inputs


def woven() -> Made:
    return _drawn(Woven), pair()[1]


def towers() -> Made:
    sound = torch.randn(BATCH, 5, 6, generator=torch.Generator().manual_seed(3))
    return _drawn(Towers), {"text": _ids(), "sound": sound}


def parallel() -> Made:
    return _drawn(Parallel), {"idx": _ids(), "keep": _keep()}
