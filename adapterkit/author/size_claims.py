"""Claims about numbers: heads, widths, where the batch is, which rows of a fused matrix are whose."""

from __future__ import annotations

import torch

from adapterkit.author import batch_claims, mlp_claims
from adapterkit.author.graph import Call
from adapterkit.author.layers import BranchFacts
from adapterkit.author.observe import Observation
from adapterkit.author.recorder import Edit
from adapterkit.author.scene import Scene
from adapterkit.author.seen import Block, Seen, blocks
from adapterkit.model.cores import cores
from adapterkit.model.layouts import Rows


def numbers(seen: Seen, scene: Scene) -> None:
    """Every claim about numbers in the layers of a stack."""
    for index, place, calls in seen.layers():
        for block in blocks(seen, index, place):
            for call in calls[:1]:
                facts = next((b for b in seen.observation.layer(call).branches if _is_that(block, b)), None)
                if facts is None:
                    continue
                if block.word != "mlp":
                    _heads(seen, block, facts)
                if "fused" in block.slots:
                    _fused(seen, scene, block, call)
    batch_claims.batch(seen, scene)


def _is_that(block: Block, facts: BranchFacts) -> bool:
    ends = {block.path("o"), block.path("down"), block.path("out")} - {None}
    return facts.kind == block.word and facts.projection is not None and facts.projection.path in ends


def _heads(seen: Seen, block: Block, facts: BranchFacts) -> None:
    """H, K and E as the attention that was computed shows them."""
    event, graph = facts.events[-1], seen.graph
    if event.scores is None:
        return
    heads_seen, width = event.scores[0], graph.nodes[event.query].shape[-1]
    observed = {"heads": heads_seen, "head_dim": width}
    key = graph.nodes[event.key].shape
    slot = block.slots.get("k")
    alone = len({one.path for one in event.k}) == 1
    # a product takes the keys turned
    size = key[-2] if event.kind == "products" and key[-2] == width else key[-1]
    if alone and slot is not None and slot.shape is not None and slot.shape[0] % size == 0:
        observed["kv_heads"] = slot.shape[0] // size
    address = next((place.sublayer_address for place in block.places.values()), block.word)
    heads, kv_heads = seen.info.sizes.get(address, (None, None))
    sizes = getattr(block.said, "sizes", None)
    core = cores(seen.blueprint).get(f"{address}.core")
    if core is not None and kv_heads and (sizes is None or sizes.kv_heads is None):
        kv_heads = core.kv_heads or kv_heads  # a layer may have more or fewer than the config says
    dims, _ = seen.info.head_dims.get(address, (None, None))
    said = {"heads": heads, "kv_heads": kv_heads, "head_dim": dims}
    if core is not None and "prefix_tuning" not in seen.interface.unsupported:
        said["value_dim"], observed["value_dim"] = core.value_dim or None, graph.nodes[event.value].shape[-1]
    for word, number in said.items():
        if number is None or word not in observed:
            continue
        text = f"sizes.{word}: {number}"
        hint = f"say 'sizes: {{{word}: ...}}'" if sizes is None else ""
        seen.judge(
            number == observed[word], (*block.loc, "sizes", word), text, f"it is {observed[word]}", hint
        )
    if core is not None and not core.key_dim and "prefix_tuning" not in seen.interface.unsupported:
        text = "sizes: the width of a head is known"
        seen.refute(
            (*block.loc, "sizes", "head_dim"), text, f"it is {width}", "say 'sizes: {head_dim: ...}'", "known"
        )
    if heads is None and "kv_heads" in observed:
        text = "sizes: the number of heads is known"
        seen.refute(
            (*block.loc, "sizes", "heads"), text, f"it is {observed['heads']}", "say 'sizes: {heads: ...}'"
        )


# ------------------------------------------------------------------------------------------- fused matrices


def _fused(seen: Seen, scene: Scene, block: Block, call: Call) -> None:
    """Changing the rows of one role changes what is used as that role, and nothing else.

    Whatever happens in between (rotation, norms, scales, other orders of heads) is of no account.
    """
    host = block.slots["fused"]
    for role, slot in block.slots.items():
        if slot.rows is None:
            continue
        edits = {host.module: _moved(slot.rows)}
        changed = scene.once((host.path, slot.rows), lambda e=edits: scene.observe(edits=e))  # type: ignore[misc]
        if changed is None:
            continue
        parts = _parts(seen.observation, seen, block, call)
        moved = {
            name
            for name, value in parts.items()
            if _differs(seen.observation, changed, value, call, whole=False)
        }
        whole = role in parts and (
            _is_joined(seen, block, call, role)
            or _differs(seen.observation, changed, parts[role], call, whole=True)
        )
        text = f"fused.layout: the rows of {role} in {host.path.rpartition('.')[2]} ({_order(block)})"
        loc = (*block.loc, "fused", "order")
        if not parts:
            seen.unseen(loc, text, aspect=role)
            continue
        others = ", ".join(sorted(moved)) or "nothing"
        observed = (
            f"changing them changes {others}"
            if moved != {role} or whole
            else f"they are but a part of {role}"
        )
        seen.judge(moved == {role} and whole, loc, text, observed, aspect=role)


def _is_joined(seen: Seen, block: Block, call: Call, role: str) -> bool:
    """Whether another projection gives a part of the role, so that its rows here are but some of it."""
    facts = next((b for b in seen.observation.layer(call).branches if _is_that(block, b)), None)
    if facts is None or block.word == "mlp":
        return False
    return len({one.path for one in getattr(facts.events[-1], role)}) > 1


def _order(block: Block) -> str:
    said = block.said.fused if block.said is not None else None
    return f"{said.layout}, {', '.join(said.order)}" if said is not None else ""


def _moved(rows: Rows) -> Edit:
    def edit(out: torch.Tensor) -> torch.Tensor:
        moved = out.clone()
        rows.view(moved).add_(1.0 + rows.view(moved).abs())
        return moved

    return edit


def _parts(found: Observation, seen: Seen, block: Block, call: Call) -> dict[str, int]:
    """Values that are used as the roles of a fused matrix."""
    facts = next((b for b in found.layer(call).branches if _is_that(block, b)), None)
    if facts is None:
        return {}
    if block.word == "mlp":
        halves = mlp_claims.halves(found.graph, facts)
        if halves is None:
            return {}
        # before the activation, which may be flat
        return {"gate": min(halves.gate_roots), "up": min(halves.up_roots)}
    event = facts.events[-1]
    values = {"q": event.query, "k": event.key, "v": event.value}
    fused = {role for role, slot in block.slots.items() if slot.rows is not None}
    return {role: value for role, value in values.items() if role in fused}


def _differs(before: Observation, after: Observation, value: int, call: Call, *, whole: bool) -> bool:
    """Whether a value of the first layer that was edited differs, anywhere or in every number."""
    different = before.tensors[value] != after.tensors[value]
    if not whole:
        return bool(different.any())
    # every channel of every head, for some token
    if different.ndim == 4:
        different = different.movedim(2, 1)
    return bool(different.flatten(0, 1).any(0).all())
