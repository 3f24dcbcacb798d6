"""How the rows of a fused projection lie: found by moving some of its channels and seeing who notices."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adapterkit.author.attention import Attention
from adapterkit.author.gated import Halves
from adapterkit.author.observe import Observation, observe
from adapterkit.model import layouts

_LAYOUTS: tuple[Literal["blocks", "per_head", "per_group"], ...] = ("blocks", "per_head", "per_group")
_MOVE = 3.0

Fused = dict[str, Any]


class Rows:
    """Experiments on one model with one set of inputs.

    Args: seen: the forward pass as it is without a change.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any], seen: Observation) -> None:
        self.model, self.inputs, self.seen = model, inputs, seen

    def attention(
        self, host: nn.Module, event: Attention, roles: Sequence[str], heads: int, kv_heads: int
    ) -> tuple[str, tuple[str, ...]] | None:
        """(layout, order) of a matrix that holds these roles of attention; None if no layout says it.

        Each piece of the output, one head wide, is moved in those runs that its number has a bit for; the
        runs in which a head of q, k or v moves are the number of its piece.
        """
        total = self._width(host, event)
        values = {"q": event.query, "k": event.key, "v": event.value}
        wide = self._heads(values["q"], heads).shape[-1]
        if "q" not in roles:
            wide = total // (kv_heads * len(roles))
        if not wide or total % wide:
            return None
        pieces = total // wide
        found: dict[str, list[int]] = {role: [] for role in roles}
        numbers = {role: [0] * self._heads(values[role], heads).shape[1] for role in roles}
        for bit in range((pieces + 1).bit_length()):
            mask = torch.tensor([float((i // wide + 1) >> bit & 1) for i in range(total)])
            after = observe(self.model, self.inputs, edits={host: partial(_moved, mask=mask)})
            for role in roles:
                for head, differs in enumerate(self._differs(after, values[role], heads)):
                    numbers[role][head] |= int(differs) << bit
        for role in roles:
            found[role] = [number - 1 for number in dict.fromkeys(numbers[role])]
        for layout in _LAYOUTS:
            for order in itertools.permutations(roles):
                if _pieces(total, wide, layout, order, heads, kv_heads) == found:
                    return layout, order
        return None

    def latent(self, host: nn.Module, event: Attention) -> tuple[int, int] | None:
        """(a, b): for each head a rows that are a part of its key, then b rows that are its value.

        None if the rows of this matrix, which is behind keys and values, do not lie so.
        """
        total = self._width(host, event)
        key, value = (self.seen.tensors[at] for at in (event.key, event.value))
        if key.dim() != 4 or value.dim() != 4 or total % value.shape[1]:
            return None
        heads, wide = value.shape[1], value.shape[-1]
        own = total // heads - wide
        if not 0 < own < key.shape[-1]:
            return None
        at = torch.arange(total)
        is_value = at % (own + wide) >= own
        numbers = {role: [0] * heads for role in ("k", "v")}
        for bit in range((heads + 1).bit_length()):
            chosen = ((at // (own + wide) + 1) >> bit) & 1 == 1
            for role, mask in (("k", chosen & ~is_value), ("v", chosen & is_value)):
                after = observe(self.model, self.inputs, edits={host: partial(_moved, mask=mask.float())})
                moved = {
                    "k": self._differs(after, event.key, heads),
                    "v": self._differs(after, event.value, heads),
                }
                if any(moved["v" if role == "k" else "k"]):
                    return None
                for head, differs in enumerate(moved[role]):
                    numbers[role][head] |= int(differs) << bit
        in_order = list(range(1, heads + 1))
        return (own, wide) if numbers == {"k": in_order, "v": in_order} else None

    def gated(self, host: nn.Module, halves: Halves, width: int) -> tuple[str, ...] | None:
        """Order of gate and up in one matrix of so many rows; None if they are no two blocks."""
        mask = (torch.arange(width) < width // 2).float()
        after = observe(self.model, self.inputs, edits={host: partial(_moved, mask=mask)})
        gate, up = (self._changed(after, value) for value in (halves.gate, halves.up))
        if gate == up:
            return None
        return ("gate", "up") if gate else ("up", "gate")

    def _width(self, host: nn.Module, event: Attention) -> int:
        graph = self.seen.graph
        made = (*event.q, *event.k, *event.v)
        modules = dict(self.model.named_modules())
        return next(graph.nodes[one.node].shape[-1] for one in made if modules[one.path] is host)

    def _heads(self, value: int, heads: int) -> Tensor:
        """A value as (B, heads, T, E); products may have joined the first two, or turned the last two."""
        tensor = self.seen.tensors[value]
        return _by_head(tensor, heads)

    def _differs(self, after: Observation, value: int, heads: int) -> list[bool]:
        before, now = (_by_head(one.tensors[value], heads) for one in (self.seen, after))
        return [not torch.allclose(before[:, i], now[:, i], atol=1e-6) for i in range(before.shape[1])]

    def _changed(self, after: Observation, value: int) -> bool:
        return not torch.allclose(self.seen.tensors[value], after.tensors[value], atol=1e-6)


def _by_head(tensor: Tensor, heads: int) -> Tensor:
    if tensor.dim() == 3:
        return tensor.unflatten(0, (-1, heads)) if tensor.shape[0] % heads == 0 else tensor[:, None]
    if tensor.dim() == 4 and tensor.shape[2] == heads != tensor.shape[1]:  # (B, T, heads, E)
        return tensor.transpose(1, 2)
    return tensor


def _moved(out: Tensor, mask: Tensor) -> Tensor:
    """Channels of the mask get noise: neither a norm nor a softmax lets it vanish."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(out.shape, generator=generator).to(out)
    return out + _MOVE * noise * mask.to(out)


def _pieces(
    total: int,
    wide: int,
    layout: Literal["blocks", "per_head", "per_group"],
    order: tuple[str, ...],
    heads: int,
    kv_heads: int,
) -> dict[str, list[int]] | None:
    """Numbers of the pieces of each role, in the order of its heads, as a layout has them."""
    try:
        rows = layouts.split(total, layout, order, heads, kv_heads)
    except ValueError:
        return None
    channels = torch.arange(total)
    taken = {role: one.take(channels).view(-1, wide) for role, one in rows.items() if one.total % wide == 0}
    if len(taken) < len(rows):
        return None
    return {role: [int(piece[0]) // wide for piece in pieces] for role, pieces in taken.items()}
