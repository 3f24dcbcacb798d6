"""How each family makes queries, keys and values, written down by hand, for the reference of attention."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from tests.models.rows import HEADS, KV_HEADS, WINDOW


@dataclass
class Parts:
    """What attention is computed from: q (B, H, Q, E), k and v (B, K, T, E), and what follows it."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    out: Callable[[Tensor], Tensor] = lambda x: x
    bias: Tensor | None = None
    cap: float | None = None


@dataclass
class Call:
    """One call of a core; x is the stream (B, Q, D)."""

    core: nn.Module
    x: Tensor
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def heads(x: Tensor, count: int) -> Tensor:
    """(B, T, H E) -> (B, H, T, E)."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def of(core: nn.Module, *names: str) -> nn.Module:
    """The child under one of these names: they differ between versions."""
    return next(getattr(core, name) for name in names if hasattr(core, name))


def plain(
    q: tuple[str, ...], k: tuple[str, ...], v: tuple[str, ...], o: tuple[str, ...] = ()
) -> Callable[[Call, Tensor], Parts]:
    """Three projections and the scale 1 / sqrt(E)."""

    def make(call: Call, read: Tensor) -> Parts:
        core = call.core
        split = [heads(of(core, *names)(x), HEADS) for names, x in ((q, call.x), (k, read), (v, read))]
        out = next((getattr(core, name) for name in o if hasattr(core, name)), lambda x: x)
        return Parts(*split, scale=1 / sqrt(split[0].shape[-1]), out=out)

    return make


bert = plain(("query",), ("key",), ("value",))
distilbert = plain(("q_lin",), ("k_lin",), ("v_lin",), ("out_lin",))
bart = plain(("q_proj",), ("k_proj",), ("v_proj",), ("out_proj",))
vit = plain(("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("o_proj", "out_proj"))


def albert(call: Call, read: Tensor) -> Parts:
    core = call.core
    parts = bert(call, read)
    parts.out = lambda x: core.LayerNorm(call.x + core.dense(x))
    return parts


def rotated(tensor: Tensor, call: Call, share: int | None = None) -> Tensor:
    """Rotary positions on the first `share` of E."""
    cos, sin = call.kwargs.get("position_embeddings") or call.args[1]
    share = share or tensor.shape[-1]
    first, rest = tensor[..., :share], tensor[..., share:]
    half = torch.cat([-first[..., share // 2 :], first[..., : share // 2]], dim=-1)
    return torch.cat([first * cos[:, None] + half * sin[:, None], rest], dim=-1)


def llama(call: Call, read: Tensor) -> Parts:
    core = call.core
    if hasattr(core, "qkv_proj"):
        width = core.head_dim
        made = core.qkv_proj(read).split([HEADS * width, KV_HEADS * width, KV_HEADS * width], dim=-1)
    else:
        made = (core.q_proj(read), core.k_proj(read), core.v_proj(read))
    q, k, v = heads(made[0], HEADS), heads(made[1], KV_HEADS), heads(made[2], KV_HEADS)
    if hasattr(core, "q_norm"):
        q, k = core.q_norm(q), core.k_norm(k)
    share = getattr(core, "rotary_ndims", None)
    q, k = rotated(q, call, share), rotated(k, call, share)
    return Parts(q, k, v, core.scaling, of(core, "o_proj", "dense"))


def gemma2(call: Call, read: Tensor) -> Parts:
    parts = llama(call, read)
    parts.cap = 50.0  # the default of the config
    return parts


def gpt2(call: Call, read: Tensor) -> Parts:
    q, k, v = (heads(part, HEADS) for part in call.core.c_attn(read).chunk(3, dim=-1))
    return Parts(q, k, v, 1 / sqrt(q.shape[-1]), call.core.c_proj)


def gptj(call: Call, read: Tensor) -> Parts:
    core, share = call.core, 4
    q, k, v = (heads(getattr(core, name)(read), HEADS) for name in ("q_proj", "k_proj", "v_proj"))
    positions = call.kwargs["position_ids"].double()
    angles = positions[:, None, :, None] * 10000.0 ** (-torch.arange(0, share, 2) / share)
    cos, sin = (turn.repeat_interleave(2, dim=-1).float() for turn in (angles.cos(), angles.sin()))

    def turned(x: Tensor) -> Tensor:
        pairs = torch.stack([-x[..., 1:share:2], x[..., 0:share:2]], dim=-1).flatten(-2)
        return torch.cat([x[..., :share] * cos + pairs * sin, x[..., share:]], dim=-1)

    return Parts(turned(q), turned(k), v, 1 / sqrt(q.shape[-1]), core.out_proj)


def modernbert(call: Call, read: Tensor) -> Parts:
    q, k, v = (heads(part, HEADS) for part in call.core.Wqkv(read).chunk(3, dim=-1))
    return Parts(rotated(q, call), rotated(k, call), v, 1 / sqrt(q.shape[-1]), call.core.Wo)


def t5(call: Call, read: Tensor) -> Parts:
    core = call.core
    q, k, v = (heads(getattr(core, n)(s), HEADS) for n, s in (("q", call.x), ("k", read), ("v", read)))
    bias = None
    if core.has_relative_attention_bias:
        bias = core.compute_bias(q.shape[2], k.shape[2])
    elif read is call.x:
        bias = call.kwargs["position_bias"][..., : k.shape[2]]
        bias = bias.where(bias > -1e9, torch.zeros(()))  # older versions have added the mask to it
    return Parts(q, k, v, 1.0, core.o, bias)


def beit(call: Call, read: Tensor) -> Parts:
    parts, length = vit(call, read), call.x.shape[1]
    given = [value for value in (*call.args, *call.kwargs.values()) if isinstance(value, Tensor)]
    parts.bias = next((value for value in given if value.ndim == 4 and value.shape[-1] == length), None)
    if hasattr(call.core, "relative_position_bias"):  # of each layer, in older versions
        side = int(sqrt(length - 1))
        parts.bias = call.core.relative_position_bias((side, side), dim_size=length)
    return parts


def deberta(call: Call, read: Tensor) -> Parts:
    """He et al. 2021 (arXiv 2006.03654), eq. 4: content and position to each other."""
    core = call.core
    fused = core.in_proj(read).unflatten(-1, (HEADS, 3, -1)).permute(3, 0, 2, 1, 4)
    q = fused[0] + core.q_bias.view(1, HEADS, 1, -1)
    k, v = fused[1], fused[2] + core.v_bias.view(1, HEADS, 1, -1)
    scale = 1 / sqrt(3 * q.shape[-1])
    table = call.kwargs.get("rel_embeddings", call.args[-1])
    keys, queries = (heads(project(table)[None], HEADS)[0] for project in (core.pos_proj, core.pos_q_proj))
    return Parts(
        q, k, v, scale, bias=disentangled(q, k, keys, queries, lambda i, j: i - j, q.shape[2], 16) * scale
    )


def disentangled(
    q: Tensor,
    k: Tensor,
    keys: Tensor,
    queries: Tensor,
    distance: Callable[[int, int], int],
    span: int,
    middle: int,
) -> Tensor:
    """q_i . K[d(i, j)] + k_j . Q[d(i, j)] as (B, H, T, T); d is clipped to `span`, and `middle` is added."""
    length = q.shape[2]
    span = min(span, middle)
    bias = torch.zeros(*q.shape[:3], length)
    for i in range(length):
        for j in range(length):
            c2p = middle + max(-span, min(distance(i, j), span - 1))
            p2c = middle + max(-span, min(-distance(j, i), span - 1))
            bias[:, :, i, j] = (q[:, :, i] * keys[:, c2p]).sum(-1) + (k[:, :, j] * queries[:, p2c]).sum(-1)
    return bias


def deberta_v2(call: Call, read: Tensor) -> Parts:
    core = call.core
    q, k, v = (heads(getattr(core, name)(read), HEADS) for name in ("query_proj", "key_proj", "value_proj"))
    source = importlib.import_module(type(core).__module__)
    scale, span = 1 / sqrt(3 * q.shape[-1]), core.pos_ebd_size
    table = call.kwargs.get("rel_embeddings", call.args[-1])[: 2 * span]
    keys, queries = heads(core.key_proj(table)[None], HEADS)[0], heads(core.query_proj(table)[None], HEADS)[0]

    def distance(i: int, j: int) -> int:
        sizes = core.position_buckets, core.max_relative_positions
        return int(source.make_log_bucket_position(torch.tensor(i - j), *sizes))

    return Parts(q, k, v, scale, bias=disentangled(q, k, keys, queries, distance, span, span) * scale)


def custom(call: Call, read: Tensor) -> Parts:
    core = call.core
    q, k, v = core.qkv(read).split(core.sizes, dim=-1)
    return Parts(heads(q, HEADS), heads(k, KV_HEADS), heads(v, KV_HEADS), core.head_dim**-0.5, core.out)


_BERTS = ("bert", "bert_generation", "electra", "roberta", "xlm_roberta", "xmod", "encoder_decoder")
_LLAMAS = ("llama", "mistral", "qwen2", "qwen3", "phi", "phi3", "gemma3_text")
FAMILIES: dict[str, Callable[[Call, Tensor], Parts]] = {
    **dict.fromkeys(_BERTS, bert),
    **dict.fromkeys(("bart", "mbart", "plbart", "whisper", "clip"), bart),
    **dict.fromkeys(_LLAMAS, llama),
    **dict.fromkeys(("t5", "mt5"), t5),
    "albert": albert,
    "beit": beit,
    "custom": custom,
    "deberta": deberta,
    "deberta_v2": deberta_v2,
    "distilbert": distilbert,
    "gemma2": gemma2,
    "gpt2": gpt2,
    "gptj": gptj,
    "modernbert": modernbert,
    "vit": vit,
}

# (family, layer) -> tokens that a query may see on one side of it, itself included
WINDOWS = {
    **{(row, layer): WINDOW for row in ("mistral", "phi3") for layer in (0, 1)},
    **{(row, 0): WINDOW for row in ("gemma2", "gemma3_text", "qwen2")},
    ("modernbert", 1): WINDOW // 2 + 1,
}
