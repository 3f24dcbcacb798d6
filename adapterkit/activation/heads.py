"""Which heads and poolers a setup calls in place of the model's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from adapterkit.activation.places import Place, asked, kind_of
from adapterkit.adapter import Adapter
from adapterkit.composition import Average, Fuse, Setup, Split, Stack
from adapterkit.composition.rules import parts
from adapterkit.runtime import Lanes, Step

Heads = dict[Place, Step]
_HEAD = "instead"


def heads(setup: Setup, adapters: Mapping[str, Adapter]) -> Heads:
    """Heads and poolers of the adapter that acts last, or of every lane its own."""
    sizes, found = [], []
    for size, part in parts(setup):
        sizes.append(size)
        found.append(_heads(part, adapters, {}))
    return found[0] if len(found) == 1 else _beside("rows", found, tuple(sizes))


def _heads(setup: Setup, adapters: Mapping[str, Adapter], before: Heads) -> Heads:
    """The same of a part of the batch. Where Route takes none, those of what acts before it stay."""
    if isinstance(setup, str):
        adapter = adapters[setup]
        placed = [adapter.injection.by_address[address] for address in (*adapter.heads, *adapter.poolers)]
        return {Place(path, _HEAD, 0): key for path, key in placed}
    if isinstance(setup, Stack):
        for child in setup.children:
            before = _heads(child, adapters, before)
        return before
    if isinstance(setup, Fuse):
        return _heads(setup.children[-1], adapters, before)
    if isinstance(setup, Split):
        acting = [c for c, size in zip(setup.children, setup.splits, strict=True) if size]
        return _heads(acting[-1], adapters, before)
    kind, numbers = kind_of(setup)
    children = [_heads(child, adapters, before) for child in setup.children]
    if isinstance(setup, Average):
        children, numbers = _shared_out(children, numbers, before)
        if len(children) == 1:
            return children[0]
    return _beside(kind, children, numbers, before if kind == "route" else {})


def _beside(kind: str, own: Sequence[Heads], numbers: tuple[float, ...], rest: Heads | None = None) -> Heads:
    """Heads of every lane.

    Args: rest: those of examples that take no lane.
    """
    found: Heads = {}
    rest = rest or {}
    for place in dict.fromkeys(place for heads in (*own, rest) for place in heads):
        *sides, none = (((heads[place],) if place in heads else ()) for heads in (*own, rest))
        reads = dict.fromkeys(asked(step for side in (*sides, none) for step in side))
        found[place] = Lanes(kind, tuple(sides), numbers, tuple(reads), none=none)
    return found


def _shared_out(
    heads: Sequence[Heads], shares: Sequence[float], before: Heads
) -> tuple[list[Heads], tuple[float, ...]]:
    """Heads of which a mean is taken, with their shares; what is missing to 1 is that of the one before."""
    pairs = [(own, share) for own, share in zip(heads, shares, strict=True) if share]
    rest = 1.0 - sum(shares)
    pairs += [(before, rest)] if abs(rest) > 1e-9 else []
    return [own for own, _ in pairs], tuple(share for _, share in pairs)
