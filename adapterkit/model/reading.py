"""Which stacks of a model read which: the states of an encoder in the cross-attention of a decoder."""

from __future__ import annotations

from adapterkit.model.blueprint import Blueprint


def sources(blueprint: Blueprint, stack: str) -> list[str]:
    """The stacks of this model that a stack reads: one beside it, or those of another part."""
    reads = blueprint.stacks[stack].reads
    if reads is None:
        return []
    part, slash, _ = stack.rpartition("/")
    beside = f"{part}{slash}{reads.stack}"
    if beside in blueprint.stacks and beside != stack:
        return [beside]
    outer, slash, _ = part.rpartition("/")
    return [name for name in blueprint.stacks if name.startswith(f"{outer}{slash}{reads.stack}/")]


def read_stacks(blueprint: Blueprint) -> set[str]:
    """Stacks that another stack reads: the encoders."""
    return {source for stack in blueprint.stacks for source in sources(blueprint, stack)}
