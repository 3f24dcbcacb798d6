"""Attention with a prefix against the float64 reference, for every core of every family."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.model.blueprint import Slot
from tests.laws.matrix import CUSTOM
from tests.mechanisms.families import FAMILIES, WINDOWS, Call
from tests.models import tiny
from tests.oracles.prefix import attend

P = 3
CAUSAL = {("clip", "text")} | {
    (row, "decoder") for row, found in tiny.ROWS.items() if found.kind in ("decoder", "seq2seq", "audio")
}
READERS = {row for row, found in tiny.ROWS.items() if found.kind in ("seq2seq", "audio")}


def implementations(row: str) -> Iterator[str | None]:
    """The attention functions that a family has in this version."""
    if row == "custom":
        yield None
        return
    yield "eager"
    if tiny.model_class(row)._supports_sdpa:
        yield "sdpa"


CASES = [(row, attn) for row in FAMILIES for attn in implementations(row)]


def test_every_row_is_described() -> None:
    assert FAMILIES.keys() == tiny.ROWS.keys()


@pytest.mark.parametrize(("row", "attn"), CASES, ids=str)
@torch.no_grad()
def test_attention_is_that_of_the_reference(row: str, attn: str | None) -> None:
    model, inputs = tiny.build(row, attn=attn), tiny.inputs(row)
    interface = CUSTOM if row == "custom" else None
    method = {"method": "prefix_tuning", "flat": True, "prefix_length": P}
    slots = ak.plan(model, method, interface=interface).slots
    before = recorded(model, slots, inputs)
    for slot in slots:
        compare(row, model, slot, inputs, before[slot.path], None)

    kit = ak.attach(model, method, interface=interface, seed=1)
    after, tensors = recorded(model, slots, inputs), kit["default"].state_dict()
    with kit.disabled():
        for slot in slots:
            prefix = tensors[f"{slot.address}.key"], tensors[f"{slot.address}.value"]
            compare(row, model, slot, inputs, after[slot.path], prefix)
            assert (after[slot.path][2] - before[slot.path][2]).abs().max() > 0.01


Recorded = tuple[tuple[Any, ...], dict[str, Any], Tensor]


def recorded(model: nn.Module, slots: Iterable[Slot], inputs: dict[str, Tensor]) -> dict[str, Recorded]:
    """Arguments and output of the first call of every core."""
    calls: dict[str, Recorded] = {}

    def remember(path: str, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        calls.setdefault(path, (args, dict(kwargs), out[0] if isinstance(out, tuple) else out))

    hooks = [
        model.get_submodule(path).register_forward_hook(partial(remember, path), with_kwargs=True)
        for path in (slot.path for slot in slots)
    ]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    return calls


def compare(
    row: str, model: nn.Module, slot: Slot, inputs: dict[str, Tensor], call: Recorded, prefix: Any
) -> None:
    args, kwargs, found = call
    stack = slot.address.split(".")[0].partition("/")[0]  # of two BERTs, the first is the encoder
    x, reads = (args[0] if args else kwargs["hidden_states"]), slot.sublayer == "cross_attention"
    read = next(states(args[1:], kwargs)) if reads else x
    parts = FAMILIES[row](Call(model.get_submodule(slot.path), x, args, kwargs), read)
    own_mask = "decoder_attention_mask" if stack == "decoder" and row in READERS else "attention_mask"
    queries = real(inputs, own_mask, x.shape)
    keys = real(inputs, "attention_mask", read.shape) if reads else queries
    causal = (row, stack) in CAUSAL and not reads
    window = WINDOWS.get((row, slot.layer))

    def visible(b: int, i: int, j: int) -> bool:
        if not keys[b, j] or (causal and j > i):
            return False
        return window is None or abs(i - j) < window

    if getattr(getattr(model, "config", None), "_attn_implementation", None) == "sdpa":
        parts.cap = None  # sdpa knows none; older versions leave it out there
    mixed = attend(parts.q, parts.k, parts.v, prefix, parts.scale, visible, parts.bias, parts.cap)
    expected = parts.out(mixed.float())
    assert found.shape == expected.shape
    torch.testing.assert_close(found[queries], expected[queries], rtol=1e-4, atol=2e-5)


def real(inputs: dict[str, Tensor], name: str, shape: torch.Size) -> Tensor:
    """Which positions (B, T) hold tokens."""
    given = inputs.get(name)
    fits = given is not None and given.shape == shape[:2]
    return given.bool() if fits else torch.ones(shape[:2], dtype=torch.bool)


def states(args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The states that cross-attention is given."""
    named = (kwargs.get(name) for name in ("key_value_states", "encoder_hidden_states"))
    return (value for value in (*named, *args) if isinstance(value, Tensor) and value.ndim == 3)
