"""A model that owes nothing to transformers: plain modules, fused projections, attention written by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class TinyAttention(nn.Module):
    """Grouped-query attention over one fused projection that holds the blocks query, key, value."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        self.qkv = nn.Linear(hidden, sum(self.sizes))
        self.out = nn.Linear(heads * head_dim, hidden)

    def forward(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        split = [
            part.unflatten(-1, (-1, self.head_dim)) for part in self.qkv(states).split(self.sizes, dim=-1)
        ]
        query, key, value = (part.transpose(1, 2) for part in split)
        key, value = (part.repeat_interleave(self.heads // self.kv_heads, dim=1) for part in (key, value))
        scores = query @ key.transpose(2, 3) * self.head_dim**-0.5
        scores = scores.masked_fill(~attention_mask[:, None, None, :], torch.finfo(scores.dtype).min)
        return self.out((scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2))


class TinyMLP(nn.Module):
    """Gated feed-forward; one projection holds the blocks gate, up."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden, 2 * intermediate)
        self.down = nn.Linear(intermediate, hidden)

    def forward(self, states: Tensor) -> Tensor:
        gate, up = self.gate_up(states).chunk(2, dim=-1)
        return self.down(functional.silu(gate) * up)


class TinyBlock(nn.Module):
    """Pre-norm encoder layer."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, head_dim: int, intermediate: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden)
        self.attention = TinyAttention(hidden, heads, kv_heads, head_dim)
        self.mlp_norm = nn.LayerNorm(hidden)
        self.mlp = TinyMLP(hidden, intermediate)

    def forward(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        states = states + self.attention(self.attention_norm(states), attention_mask)
        return states + self.mlp(self.mlp_norm(states))


class TinyClassifier(nn.Module):
    """Sequence classifier: embeddings, blocks, final norm, mean over the attended positions, head."""

    def __init__(
        self,
        *,
        vocab: int = 64,
        positions: int = 32,
        hidden: int = 32,
        heads: int = 4,
        kv_heads: int = 2,
        head_dim: int = 8,
        intermediate: int = 40,
        layers: int = 2,
        labels: int = 3,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, hidden)
        self.positions = nn.Embedding(positions, hidden)
        self.blocks = nn.ModuleList(
            TinyBlock(hidden, heads, kv_heads, head_dim, intermediate) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, labels)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        attended = (
            torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        )
        states = self.tokens(input_ids) + self.positions.weight[: input_ids.shape[1]]
        for block in self.blocks:
            states = block(states, attended)
        weights = attended.unsqueeze(-1).to(states.dtype)
        logits = self.head((self.norm(states) * weights).sum(1) / weights.sum(1))
        if labels is None:
            return {"logits": logits}
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}
