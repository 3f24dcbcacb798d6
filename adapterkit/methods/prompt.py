"""Prompt tuning: trained vectors put into the sequence as if they were tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeInt
from torch import nn

from adapterkit.errors import ConfigError, PlanError, Problem
from adapterkit.methods import entering
from adapterkit.methods.base import Helper, MethodConfig, Shared, Unit, Unmergeable, Words
from adapterkit.methods.flow import base_forward, entry_place
from adapterkit.methods.positions import Strip, StripRead
from adapterkit.methods.targets import Selection, unknown_stacks
from adapterkit.model.blueprint import Blueprint, Slot, StackInfo
from adapterkit.model.branches import layer_slots
from adapterkit.model.embeddings import embedding_slots
from adapterkit.model.reading import read_stacks, sources
from adapterkit.model.walk import join


class PromptTuningConfig(MethodConfig):
    """Prompt tuning (Lester et al. 2021, arXiv:2104.08691)."""

    method: ClassVar[str] = "prompt_tuning"
    passing = MethodConfig.passing | {"init", "random_uniform_scale", "init_text_ids", "stacks"}

    prompt_length: int = Field(default=10, ge=1, description="number P of trained vectors")
    position: Literal["before", "after_first"] = Field(
        default="before", description="before the first token, or behind it (BOS, CLS)"
    )
    init: Literal["random_uniform", "vocabulary", "from_text"] = Field(
        default="random_uniform",
        description="uniform numbers, random rows of the embedding table, or those of init_text_ids",
    )
    random_uniform_scale: float = Field(default=0.5, gt=0, description="numbers start in +-scale")
    init_text_ids: tuple[NonNegativeInt, ...] = Field(
        default=(), description="token ids of the text to start from, repeated or cut to the prompt's length"
    )
    insert: Literal["embeds", "out"] = Field(
        default="embeds",
        description="among the embedded tokens, or behind the whole embeddings, without a position embedding",
    )
    keep_positions: bool = Field(
        default=False, description="outputs keep the prompt's positions, and poolers and heads read them"
    )
    before_padding: bool = Field(
        default=False,
        description="before padding on the left, which then counts among the positions, whatever positions "
        "are given; as in files of PEFT",
    )
    stacks: Words | None = Field(
        default=None, description="stacks that get a prompt; None: those that read no other"
    )
    first_only: bool = Field(
        default=False,
        description="acts only where its adapter is the first of a setup, as in setups of AdapterHub",
    )

    def model_post_init(self, context: Any) -> None:
        if (self.init == "from_text") != bool(self.init_text_ids):
            raise ValueError("init='from_text' and init_text_ids need each other")
        if self.before_padding and (self.position, self.insert) != ("before", "embeds"):
            raise ValueError("before_padding goes with position='before' and insert='embeds'")

    def available(self, blueprint: Blueprint) -> Mapping[str, Slot]:
        return {f"{stack}.prompt": _host(blueprint, stack, self) for stack in blueprint.stacks}

    def select(self, blueprint: Blueprint) -> Selection:
        names = self.stacks
        if names is None:
            names = tuple(
                name
                for name, info in blueprint.stacks.items()
                if info.by_default and not sources(blueprint, name)
            )
        missing = unknown_stacks(names, list(blueprint.stacks))
        known = [name for name in names if name in blueprint.stacks]
        return Selection.of([_host(blueprint, name, self) for name in known], missing)

    def build(self, slot: Slot, shared: Shared | None, generator: torch.Generator | None) -> Unit:
        return Prompt(slot, self, generator)

    def helpers(self, slots: Sequence[Slot], blueprint: Blueprint) -> list[Helper]:
        return [helper for slot in slots for helper in _helpers(blueprint, slot, self)]


class Prompt(Unmergeable):
    """P vectors of the width of the embeddings, which wait at the table until the stack is entered.

    Source: Lester et al. 2021, arXiv:2104.08691, section 2: [P; X] in place of the embedded input X.
    Shapes: x (B, T, D) -> (B, P + T, D); `embeds` (P, D).
    """

    acts_on = "held"
    averages = False  # positions of different contents
    reason = "positions of a sequence are no change of a weight"

    def __init__(self, slot: Slot, config: PromptTuningConfig, generator: torch.Generator | None) -> None:
        super().__init__()
        self.stack = slot.stack
        self.first_only = config.first_only
        self.place = (slot.path, config.position, config.keep_positions, config.before_padding)
        """Prompts of one stack that act together are put in at the same place."""
        width = (slot.shape or (1, 1))[0]
        self.embeds = nn.Parameter(torch.empty(config.prompt_length, width))
        with torch.no_grad():
            scale = config.random_uniform_scale
            if config.init == "random_uniform":
                self.embeds.uniform_(-scale, scale, generator=generator)
            elif not self.embeds.is_meta:
                self.embeds.copy_(_rows(slot, config, generator))


def _rows(slot: Slot, config: PromptTuningConfig, generator: torch.Generator | None) -> torch.Tensor:
    """Embeddings (P, D) of tokens, as the model's own table gives them."""
    table: Any = slot.module
    size = getattr(table, "num_embeddings", None)
    if slot.role != "tokens" or size is None:
        message = "there is no table of embeddings at this place from which a prompt could start"
        raise ConfigError(Problem("no-vocabulary", message, slot.address, "init='random_uniform'"))
    count = config.prompt_length
    if config.init == "vocabulary":
        ids = torch.randint(size, (count,), generator=generator)
    else:
        ids = torch.tensor([config.init_text_ids[i % len(config.init_text_ids)] for i in range(count)])
        if int(ids.max()) >= size:
            message = (
                f"init_text_ids go from {int(ids.min())} to {int(ids.max())}, but there are {size} tokens"
            )
            raise ConfigError(Problem("bad-option", message, slot.address))
    rows: torch.Tensor = base_forward(table)(table, ids.to(table.weight.device))
    return rows.detach()


# -- where a stack can take a prompt


def _host(blueprint: Blueprint, stack: str, config: PromptTuningConfig) -> Slot:
    """The module that keeps the vectors, by where they go in:

    `tokens`: the table, whose output they join before the stack is entered, or in place of that of fillers;
    `out`: behind the embeddings; `layer`: in front of the first layer.
    Raises: PlanError: the embeddings are no module of their own, so that there is no place behind them.
    """
    info, address = blueprint.stacks[stack], f"{stack}.prompt"
    table = blueprint.places.get(f"{stack}.embeddings.table")
    out = blueprint.places.get(f"{stack}.embeddings.out")
    shapes = {slot.stack: slot.shape for slot in embedding_slots(blueprint).values()}
    if info.inputs.ids is not None and table is not None and out is not None:
        inner = entering.embeds_at(blueprint, stack)
        if config.insert == "out":
            block, positions = _block(info, out), info.inputs.positions
            # where the stack takes positions and the embeddings do not, the layers have them
            if block is None or (
                entering.takes(entry_place(blueprint, stack).module, positions)
                and not entering.takes(block.module, positions)
            ):
                message = "positions are added outside the embeddings, so nothing can come in behind them"
                raise PlanError(Problem("no-place-behind", message, address, "insert='embeds'"))
            return out.moved(address=address, role="out", shape=shapes[stack])
        if inner is None and info.inputs.filler is not None:
            size = getattr(table.module, "num_embeddings", None)
            if size is not None and info.inputs.filler >= size:
                message = f"'filler' of the interface is {info.inputs.filler}, but there are {size} tokens"
                raise PlanError(Problem("no-vocabulary", message, address, f"an id below {size}"))
        if inner is not None or info.inputs.filler is not None:
            return table.moved(address=address, role="tokens", shape=shapes[stack])
    elif info.inputs.ids is None and out is not None:
        return out.moved(address=address, role="out", shape=shapes[stack])
    layers = [slot for slot in layer_slots(blueprint).values() if slot.stack == stack]
    layer = next(slot for slot in layers if slot.layer == 0)
    place = blueprint.places[f"{stack}.0.layer"]
    return place.moved(address=address, role="layer", shape=layer.shape, layer=None, sublayer=None)


def _block(info: StackInfo, out: Slot) -> Slot | None:
    """The embeddings as one module, whose end is `out`; None if there is none."""
    path, _, _ = out.path.removeprefix(info.path).strip(".").rpartition(".")
    return out.moved(path=join(info.path, path), module=info.root.get_submodule(path)) if path else None


def _helpers(blueprint: Blueprint, slot: Slot, config: PromptTuningConfig) -> list[Helper]:
    """What makes room for the prompt of a stack, and what takes its positions out again."""
    stack = slot.stack
    acting = entering.Acting(slot.module, stack, int(config.position == "after_first"), config.before_padding)
    info, places = blueprint.stacks[stack], blueprint.places
    placed = "before_padding" if config.before_padding else config.position
    entry, own = entry_place(blueprint, stack), _key("prompt", stack, placed, config.insert)
    found = []

    def add(place: Slot | None, word: str, make: Callable[[], nn.Module], acts_on: Any = "entry") -> None:
        if place is not None:
            phase = 0 if word == "put" else -2 if acts_on == "entry" else 6
            found.append(Helper(place, f"{own}__{word}", make, acts_on, phase, slot.address))

    if slot.role == "out":
        add(slot, "put", partial(entering.PutBehind, acting), "output")
    elif slot.role == "layer":
        add(slot, "put", partial(entering.PutBefore, acting), "input")
    strip = partial(Strip, stack)
    last = places[f"{stack}.{info.num_layers - 1}.layer"]
    in_layers = slot.role == "layer" or info.inputs.ids is None
    is_read = stack in read_stacks(blueprint)
    at = entering.embeds_at(blueprint, stack)
    if slot.role == "tokens" and at is None:
        add(entry, "widen", partial(entering.Widen, info, acting, None, True, info.inputs.filler))
        add(slot, "put", partial(entering.PutOver, stack, acting), "output")
        if not config.keep_positions and not is_read:
            add(places.get(f"{stack}.final_norm") or last, "strip", strip, "output")
    elif slot.role == "tokens":
        assert at is not None
        table = slot.module if at.path == entry.path else None
        add(entry, "widen", partial(entering.Widen, info, acting, table, True))
        if table is None:
            add(at, "embed", partial(entering.Embed, str(info.inputs.ids), acting))
            if not config.keep_positions:
                # what pools the states of the right tokens is the stack itself
                add(places.get(f"{stack}.final_norm"), "strip", strip, "output")
    elif not in_layers:
        add(entry, "widen", partial(entering.Widen, info, acting, None, False))
        add(_block(info, slot), "narrow", partial(entering.Narrow, stack))
    elif slot.role == "out" and info.inputs.mask is not None:
        add(entry, "widen", partial(entering.WidenMask, stack, info.inputs, acting))
    elif info.inputs.mask is not None:
        add(entry, "mask", partial(entering.SeeMask, stack, info.inputs.mask))
        for index in range(info.num_layers):
            make = partial(entering.WidenLayer, stack, info.inputs, acting, index == 0)
            add(places[f"{stack}.{index}.layer"], "widen", make)
    if info.inputs.layer_mask is not None:
        add(places[f"{stack}.0.layer"], "fits", partial(entering.Fits, stack, info.inputs.layer_mask))
    for address, place in places.items():
        if place.stack == stack and place.role == "position_bias":
            add(place, _key("bias", address), partial(entering.WidenBias, stack), "output")
    if not config.keep_positions:
        add(places.get(f"{stack}.pooler"), "pool", strip)
        if not is_read:
            add(places.get(f"{stack}.exit"), "strip", strip, "output")
            add(entry, "leave", strip, "output")
            if in_layers:
                add(last, "strip", strip, "output")
    for reader in blueprint.stacks:
        if stack in sources(blueprint, reader):
            reads, place = blueprint.stacks[reader].reads, entry_place(blueprint, reader)
            if reads is not None and reads.mask is not None:
                make_read = partial(entering.WidenRead, reads, acting)
                add(place, f"read_{reader.replace('/', '_')}", make_read)
            add(place, f"leave_{reader.replace('/', '_')}", partial(StripRead, stack), "output")
    return found


def _key(*words: Any) -> str:
    return "__".join(str(word).replace("/", "_") for word in words)
