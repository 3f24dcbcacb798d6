"""The two ends of a stack as slots: where the stream begins, and the output embeddings that read it."""

from __future__ import annotations

from torch import nn

from adapterkit.model import linear
from adapterkit.model.blueprint import Blueprint, Slot
from adapterkit.model.branches import layer_slots
from adapterkit.model.walk import child


def embedding_slots(blueprint: Blueprint) -> dict[str, Slot]:
    """`<stack>.embeddings`: the last module before the stream enters the stack, with its own width."""
    widths = {slot.stack: slot.shape for slot in reversed(layer_slots(blueprint).values())}
    found = {}
    for stack in blueprint.stacks:
        place = blueprint.places.get(f"{stack}.embeddings.out")
        if place is None:
            continue
        table = blueprint.places.get(f"{stack}.embeddings.table")
        width = getattr(table.module, "embedding_dim", None) if table is not None else None
        shape = (width, width) if isinstance(width, int) else widths.get(stack)
        address = f"{stack}.embeddings"
        found[address] = place.moved(address=address, role="embeddings", shape=shape)
    return found


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """The matrix that gives the vocabulary, as the model itself tells it."""
    getter = getattr(model, "get_output_embeddings", None)
    try:
        found = getter() if getter is not None else None
    except (NotImplementedError, AttributeError):
        return None
    return found if isinstance(found, nn.Module) else None


def unembed_slots(blueprint: Blueprint) -> dict[str, Slot]:
    """`<stack>.unembed`: the output embeddings of the model, as the far end of the embeddings of a stack.

    In a model of encoder and decoder the vocabulary is read off the decoder, whichever embeddings were
    changed.
    """
    told = output_embeddings(blueprint.model)
    found = {}
    for stack, info in blueprint.stacks.items():
        said = info.interface.stacks[stack.rpartition("/")[2]].unembed
        names = said.path.names() if said is not None and said.path is not None else ()
        named = [module for name in names if (module := child(blueprint.model, name)) is not None]
        module = named[0] if named else told
        size = linear.shape(module) if module is not None else None
        if module is None or size is None:
            continue
        path = next(name for name, one in blueprint.model.named_modules() if one is module)
        table = blueprint.places.get(f"{stack}.embeddings.table")
        words = getattr(table.module, "num_embeddings", size[0]) if table is not None else size[0]
        # some classes name another matrix than the one that gives the vocabulary: no width fits it
        width = size[1] if words == size[0] else 0
        address = f"{stack}.unembed"
        found[address] = Slot(address, "unembed", stack, None, None, module, path, (width, width))
    return found
