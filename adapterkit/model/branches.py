"""Branches: sublayers seen as x -> h(x), added to the residual stream, with the points where adapters act."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from adapterkit.model.blueprint import Blueprint, Scale, Slot

# where the branch begins: a projection that is called once, on the stream itself
_INPUTS = {
    "attention": ("v", "fused", "q"),
    "cross_attention": ("q", "fused"),
    "mlp": ("gate", "up", "fused"),
}
_OUTPUTS = {"attention": "o", "cross_attention": "o", "mlp": "down"}


@dataclass(frozen=True, kw_only=True)
class Branch(Slot):
    """One sublayer of one layer as a slot: `module` is where adapters act, `shape` is (D, D)."""

    shape: tuple[int, int]
    start: Slot
    """The module whose input is the residual x: the one that is named, the norm before the branch, else its
    first projection."""
    inside: Slot
    """The first projection, whose input is what the norm before the branch gives."""
    projection: Slot
    """The module that gives the branch its output: o, down or `out`."""
    after_residual: Slot | None
    """The norm of the sum of branch and residual, in post-norm models."""
    parallel: bool
    """Attention and MLP of the layer are added together; neither has a sum of its own."""
    own_adapter: bool = False
    """The model has an adapter of its own behind the sum, which may call the norms again."""
    chunked: bool = False
    """The sublayer is called with a few positions at a time."""
    scale: Scale = 1.0
    """Factor of the branch where it is added to the stream, behind the last module."""


def branches(blueprint: Blueprint, before_norm: bool = False) -> dict[str, Branch]:
    """Every branch of the model by the address of its sublayer.

    Args: before_norm: act before the norm that follows the projection (sandwich norms), not after it.
    """
    found = {}
    for stack in blueprint.stacks.values():
        for index in range(stack.num_layers):
            for sublayer in _INPUTS:
                branch = _branch(blueprint, f"{stack.address}.{index}", sublayer, before_norm, stack.parallel)
                if branch is not None:
                    size = getattr(stack.layers[index], "chunk_size_feed_forward", None)
                    chunked = sublayer == "mlp" and bool(size)
                    found[branch.address] = branch.moved(chunked=chunked) if chunked else branch
    widths = {(branch.stack, branch.layer): branch.shape for branch in found.values() if branch.shape[0]}
    for address, branch in found.items():
        if not branch.shape[0]:  # nothing beside it shows its width, but the stream has one
            found[address] = branch.moved(shape=widths.get((branch.stack, branch.layer), (0, 0)))
    return found


def _branch(
    blueprint: Blueprint, layer: str, sublayer: str, before_norm: bool, parallel: bool
) -> Branch | None:
    address = f"{layer}.{sublayer}"
    slots, places = blueprint.slots, blueprint.places
    projection = places.get(f"{address}.out") or slots.get(f"{address}.{_OUTPUTS[sublayer]}")
    if projection is None or "branch" in blueprint.without.get(address, {}):
        return None
    inputs = (slots.get(f"{address}.{role}") for role in _INPUTS[sublayer])
    norm = places.get(f"{address}.norm.before") or places.get(f"{layer}.norm.before")
    start = places.get(f"{address}.start")
    # a module that is the whole branch, and no projection, is called with what the branch reads
    inside = next((slot for slot in inputs if slot is not None), norm or places.get(f"{address}.out"))
    if inside is None:
        return None
    points = ("tail",) if before_norm else ("norm.after", "tail")
    act = next((places[f"{address}.{p}"] for p in points if f"{address}.{p}" in places), projection)
    after = places.get(f"{address}.norm.after_residual")
    width = _width(projection, [norm, after, places.get(f"{address}.norm.after")])
    return Branch(
        address=address,
        role="branch",
        stack=act.stack,
        layer=act.layer,
        sublayer=sublayer,
        module=act.module,
        path=act.path,
        shape=(width, width),
        batch=act.batch,
        start=start or norm or inside,
        inside=inside,
        projection=projection,
        after_residual=after,
        parallel=parallel,
        own_adapter=f"{address}.own_adapter" in places,
        scale=blueprint.scales.get(address, 1.0),
    )


def _width(projection: Slot, norms: list[Slot | None]) -> int:
    """Width of the stream: that of the projection, else of a norm beside it."""
    if projection.shape is not None:
        return projection.shape[0]
    for norm in norms:
        weight = getattr(norm.module, "weight", None) if norm is not None else None
        if isinstance(weight, nn.Parameter):
            return int(weight.shape[-1])
    return 0


def layer_slots(blueprint: Blueprint) -> dict[str, Slot]:
    """Every layer as a slot of shape (D, D), by its address."""
    widths = {(branch.stack, branch.layer): branch.shape for branch in branches(blueprint).values()}
    found = {}
    for stack in blueprint.stacks.values():
        for index in range(stack.num_layers):
            place = blueprint.places[f"{stack.address}.{index}.layer"]
            shape = widths.get((stack.address, index)) or _last_width(blueprint, f"{stack.address}.{index}")
            if shape is not None:
                found[place.address] = place.moved(shape=shape)
    return found


def _last_width(blueprint: Blueprint, layer: str) -> tuple[int, int] | None:
    """(D, D) by the last projections of a layer whose sublayers are no branches: gates may follow them."""
    ends = (blueprint.slots.get(f"{layer}.{sublayer}.{role}") for sublayer, role in _OUTPUTS.items())
    widths = {slot.shape[0] for slot in ends if slot is not None and slot.shape is not None}
    return (width := widths.pop(), width) if len(widths) == 1 else None
