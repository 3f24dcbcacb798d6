"""Where a stack is entered, told of positions that are inserted: ids, mask, positions and aligned inputs."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from adapterkit.errors import PlanError, Problem
from adapterkit.methods.flow import (
    Flow,
    base_forward,
    cache_of,
    can_look,
    entry_place,
    first,
    flow_of,
    given_arguments,
    past_of,
    refuse_packed,
    room_of,
    with_first,
)
from adapterkit.methods.positions import Index, Span, as_rows, insert, key, remove, shifted, start, widened
from adapterkit.model.blueprint import Blueprint, Slot, StackInfo
from adapterkit.spec.schema import Inputs, Reads

EMBEDS = "inputs_embeds"
FROM_IDS = "create_position_ids_from_input_ids"
Call = tuple[tuple[Any, ...], dict[str, Any]]


def takes(module: nn.Module, name: str | None) -> bool:
    """Whether a module can be called with an argument."""
    return name is not None and name in inspect.signature(base_forward(module)).parameters


def _must_be_given(module: nn.Module, name: str) -> bool:
    return inspect.signature(base_forward(module)).parameters[name].default is inspect.Parameter.empty


def embeds_at(blueprint: Blueprint, stack: str) -> Slot | None:
    """The module that can be given embedded tokens in place of ids: that of the stack, or its embeddings."""
    info = blueprint.stacks[stack]
    entry, out = entry_place(blueprint, stack), blueprint.places.get(f"{stack}.embeddings.out")
    if takes(entry.module, info.inputs.embeds):
        return entry
    return out if out is not None and takes(out.module, EMBEDS) else None


class Acting:
    """The prompt that acts at a stack, asked for at the module that keeps its vectors."""

    def __init__(self, module: nn.Module, stack: str, offset: int, before_padding: bool) -> None:
        self.module, self.stack, self.offset = module, stack, offset
        self.before_padding = before_padding

    def index(self, mask: torch.Tensor | None, hides: bool) -> Index:
        """Where the prompt goes in a sequence with this mask (B, T)."""
        return self.offset if self.before_padding else start(mask, self.offset, hides)

    @property
    def count(self) -> int:
        """P, the number of positions that are put in."""
        site: Any = self.module.adapterkit
        return int(site.prompt_length(self.stack))

    def put(self, x: torch.Tensor, flow: Flow) -> torch.Tensor:
        """Put the prompt into x (B, T, D) where the entry of the stack has said, else at its fixed place."""
        site: Any = self.module.adapterkit
        vectors: torch.Tensor = site.prompt(self.stack, x)
        if vectors.is_meta and not x.is_meta:
            message = "the vectors of the prompt were offloaded after attach, and no call brings them back"
            raise PlanError(Problem("prompt-away", message, self.stack, "offloading first, then attach"))
        span = flow.get(key(self.stack))
        if span is None or span.static:
            count = vectors.shape[1]
            span = Span(self.offset, count, x.shape[1] + count, static=True)
            flow[key(self.stack)] = span
        return insert(x, vectors, span.index) if span.fresh else x


class PutBehind(nn.Module):
    """At the embeddings: put the prompt behind them."""

    def __init__(self, acting: Acting) -> None:
        super().__init__()
        self.acting = acting

    def forward(self, out: Any, x: Any, host: nn.Module) -> Any:
        return with_first(out, self.acting.put(first(out), flow_of(host)))


class PutBefore(nn.Module):
    """At the first layer: put the prompt before it."""

    def __init__(self, acting: Acting) -> None:
        super().__init__()
        self.acting = acting

    def forward(self, x: torch.Tensor, host: nn.Module) -> torch.Tensor:
        return self.acting.put(x, flow_of(host))


class Widen(nn.Module):
    """At the entry of a stack: make room for P positions, and put the prompt in if it takes embeddings.

    Under a cache, the first step alone has room in it; later ones see the prompt among the keys, so that the
    mask is widened in every step and positions are moved. Real tokens keep their order; the prompt is put
    behind the padding on the left, or before it: then the model counts positions by itself, padding included.
    A stack that takes ids alone is given more of them, whose embeddings the prompt replaces at the table.
    Raises: PlanError: there is a mask of another form than (B, T), or no position embedding for so many.
    """

    def __init__(
        self,
        info: StackInfo,
        acting: Acting,
        table: nn.Module | None,
        move: bool,
        filler: int | None = None,
    ) -> None:
        super().__init__()
        self.filler = filler
        self.stack, self.inputs = info.address, info.inputs
        self.acting, self.offset, self.move = acting, acting.offset, move
        # in tuples, so that they are not registered a second time
        self.tables = () if table is None else (table,)
        self.blocks = tuple(m for m in info.root.modules() if hasattr(m, FROM_IDS))[:1]
        self.limit = capacity(info) if move else None

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], module: nn.Module, flow: Flow) -> Call:
        flow.pop(key(self.stack), None)
        given, names = given_arguments(module, args, kwargs), self.inputs
        ids = given.get(names.ids) if names.ids else None
        embeds = given.get(names.embeds) if names.embeds else None
        tokens = ids if embeds is None else embeds
        if tokens is None:
            return args, kwargs
        if tokens.ndim != (2 if embeds is None else 3):
            message = f"{tokens.ndim} axes of tokens: a prompt is put into sequences (B, T)"
            raise PlanError(Problem("unfit-input", message, self.stack))
        refuse_packed(module, given, names, self.stack, "a prompt")
        past = past_of(given)
        rows, length = tokens.shape[:2]
        count = self.acting.count
        whole: Any = given.get(names.mask) if names.mask else None
        mask = None if whole is None else _rows(whole, length, str(names.mask), self.stack)
        self._check_cache(given, mask, past, length, count)
        index = self.acting.index(mask, names.mask_hides)
        fresh, total = not past, (past or count) + length
        if self.limit is not None and total > self.limit:
            message = f"a prompt of {count} and {total - count} tokens, but {self.limit} positions"
            raise PlanError(Problem("too-long", message, self.stack, "a shorter prompt, or shorter inputs"))
        room = room_of(given)
        if room is not None and total > room:
            message = f"a prompt of {count} and {total - count} tokens, but a cache of {room} positions"
            expected = "a cache that grows, as generate(...) makes if it is told nothing"
            raise PlanError(Problem("unfit-cache", message, self.stack, expected))
        if mask is not None:
            given[str(names.mask)] = widened(whole, count, index, names.mask_hides)
        elif not self.move and takes(module, names.mask):
            # the model would make one of the length that it was given
            shown = tokens.new_full((rows, total), not names.mask_hides, dtype=torch.long)
            given[str(names.mask)] = shown
        flow[key(self.stack)] = Span(index, count, total, fresh)
        if not self.move:
            return (), given
        if self.acting.before_padding:
            given.pop(names.positions or "", None)
        elif (positions := self._positions(given, ids if embeds is None else None, past)) is not None:
            moved = shifted(positions, index, count, self.offset, rows) if fresh else positions + count
            given[str(names.positions)] = moved
        if not fresh:
            return (), given
        for name in names.aligned:
            if given.get(name) is not None:
                value = given[name]
                given[name] = insert(value, value.new_zeros(1, count, *value.shape[2:]), index)
        if self.filler is not None and ids is not None:
            given[str(names.ids)] = insert(ids, ids.new_full((1, count), self.filler), index)
        if self.tables:
            embeds = self.tables[0](ids) if embeds is None else embeds
            given[str(names.embeds)] = self.acting.put(embeds, flow)
            given.pop(str(names.ids), None)
            if takes(module, names.ids) and _must_be_given(module, str(names.ids)):
                given[str(names.ids)] = None
        return (), given

    def _check_cache(
        self, given: dict[str, Any], mask: torch.Tensor | None, past: int, length: int, count: int
    ) -> None:
        """Refuse a cache in which the prompt does not lie where the mask has it."""
        if mask is None or cache_of(given) is None:
            return
        if past and mask.shape[1] + count != past + length:
            message = (
                f"the cache holds {past} positions and {length} tokens come behind them, but the mask shows "
                f"{mask.shape[1]} tokens, beside a prompt of {count}"
            )
            expected = (
                "a cache that this prompt has begun, and the tokens that come behind: the cache's length, by "
                "which generate(...) leaves out tokens, counts the prompt"
            )
            raise PlanError(Problem("unfit-cache", message, self.stack, expected))
        if past or self.acting.before_padding or not can_look(mask):
            return
        if not bool(((mask != 0) ^ self.inputs.mask_hides).any(dim=1).all()):
            message = "a row has no token yet, so that there is no place for the prompt behind its padding"
            expected = "a first step, or prefill_chunk_size, that is longer than the padding"
            raise PlanError(Problem("unfit-cache", message, self.stack, expected))

    def _positions(self, given: dict[str, Any], ids: torch.Tensor | None, past: int) -> torch.Tensor | None:
        """The positions that are given, or those that the embeddings would count by the ids' padding."""
        name = self.inputs.positions
        positions = given.get(name) if name else None
        if positions is None and name and ids is not None and not past and self.blocks:
            block: Any = self.blocks[0]
            positions = getattr(block, FROM_IDS)(ids, block.padding_idx)
        if positions is not None and positions.ndim > 3:
            message = f"{name!r} has {positions.ndim} axes: a prompt has a place in (B, T) or (axes, B, T)"
            raise PlanError(Problem("unfit-input", message, self.stack))
        return positions


def _rows(mask: Any, length: int, name: str, stack: str) -> torch.Tensor:
    """A mask as (B, T), whose width may be that of a cache.

    Raises: PlanError: it has another form.
    """
    found = as_rows(mask, length) if isinstance(mask, torch.Tensor) else None
    if found is not None:
        return found
    message = f"{name!r} is no mask (B, T), so that it cannot be widened for a prompt"
    expected = "a mask (B, T), or one of whole numbers or bools (B, 1, T); a cache of fixed size has no room"
    raise PlanError(Problem("unfit-input", message, stack, expected))


def capacity(info: StackInfo) -> int | None:
    """How many positions the stack has learned, None if it has not learned any.

    A table of positions is an embedding outside the layers that has a row for every position; those that
    count from behind the padding index begin there.
    """
    most = getattr(getattr(info.root, "config", None), "max_position_embeddings", None)
    inside = {id(module) for layer in info.layers for module in layer.modules()}
    for path, module in info.root.named_modules():
        if isinstance(module, nn.Embedding) and id(module) not in inside and isinstance(most, int):
            if most <= module.num_embeddings <= most + 2 and "word" not in path and "token" not in path:
                padding = -1 if module.padding_idx is None else module.padding_idx
                return min(most, module.num_embeddings - padding - 1)
    return None


class Embed(nn.Module):
    """At embeddings that can be given embedded tokens, in a stack that cannot: put the prompt among them."""

    def __init__(self, ids: str, acting: Acting) -> None:
        super().__init__()
        self.ids, self.acting = ids, acting

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], module: nn.Module, flow: Flow) -> Call:
        given = given_arguments(module, args, kwargs)
        embeds = self.acting.module(given.pop(self.ids))
        return (), {**given, EMBEDS: self.acting.put(embeds, flow)}


class PutOver(nn.Module):
    """At a table that looks up a sequence in which room was made: put the prompt there."""

    def __init__(self, stack: str, acting: Acting) -> None:
        super().__init__()
        self.stack, self.acting = stack, acting

    def forward(self, out: Any, x: Any, host: nn.Module) -> Any:
        span: Span | None = flow_of(host).get(key(self.stack))
        if span is None or not span.fresh:
            return out
        return self.acting.put(remove(out, span.index, span.count, 1), flow_of(host))


class Narrow(nn.Module):
    """At embeddings behind which the prompt is put: masks (B, P + T) that they get are cut to (B, T)."""

    def __init__(self, stack: str) -> None:
        super().__init__()
        self.stack = stack

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], module: nn.Module, flow: Flow) -> Call:
        span: Span | None = flow.get(key(self.stack))
        if span is None:
            return args, kwargs

        def own(value: Any) -> Any:
            wide = isinstance(value, torch.Tensor) and value.ndim == 2 and value.shape[1] == span.total
            return remove(value, span.index, span.count, 1) if wide else value

        return tuple(own(value) for value in args), {name: own(value) for name, value in kwargs.items()}


def _mask_key(stack: str) -> str:
    return f"{stack}.prompt_mask"


class SeeMask(nn.Module):
    """At the entry of a stack whose layers alone are told of the prompt: remember its mask."""

    def __init__(self, stack: str, mask: str) -> None:
        super().__init__()
        self.stack, self.mask = stack, mask

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], module: nn.Module, flow: Flow) -> Call:
        flow[_mask_key(self.stack)] = given_arguments(module, args, kwargs).get(self.mask)
        return args, kwargs


class WidenLayer(nn.Module):
    """At a layer of a stack that pools by its own mask: the layer alone is told of the prompt.

    A layer may call the mask otherwise than the stack, or be given bools that the stack has made of it.
    Raises: PlanError: the layer gets another mask than (B, T).
    """

    def __init__(self, stack: str, inputs: Inputs, acting: Acting, is_first: bool) -> None:
        super().__init__()
        self.stack, self.mask, self.acting = stack, str(inputs.mask), acting
        self.hides, self.is_first = inputs.mask_hides, is_first

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], module: nn.Module, flow: Flow) -> Call:
        given = given_arguments(module, args, kwargs)
        whole = flow.get(_mask_key(self.stack))
        name = self.mask if self.mask in given or whole is None else _made_of(whole, given) or self.mask
        mask = given.get(name)
        is_made = name != self.mask and mask is not whole
        length = next(iter(given.values())).shape[1]
        shown = whole if is_made else mask
        if shown is not None:
            seen = length - self.acting.count * (not self.is_first)
            shown = _rows(shown, seen, name, self.stack)
        index, count = self.acting.index(shown, self.hides), self.acting.count
        flow[key(self.stack)] = Span(index, count, length + count * self.is_first)
        if is_made and mask is not None:
            given[name] = _like_shown(mask, start(shown, 0, self.hides), count, index)
        elif mask is not None:
            given[name] = widened(mask, count, index, self.hides)
        return (), given


def _made_of(mask: torch.Tensor, given: dict[str, Any]) -> str | None:
    """The argument that is a mask (B, T), or holds bools of its form, with axes of one between."""
    same = (name for name, value in given.items() if value is mask)
    bools = (
        name
        for name, value in given.items()
        if isinstance(value, torch.Tensor) and value.dtype == torch.bool and value.numel() == mask.numel()
        if (value.shape[0], value.shape[-1]) == (mask.shape[0], mask.shape[-1])
    )
    return next(same, None) or next(bools, None)


def _like_shown(bools: torch.Tensor, first: Index, count: int, index: Index) -> torch.Tensor:
    """Bools (B, ..., T) with those of a prompt, as the first visible token has them: (B, ..., P + T)."""
    flat = bools.flatten(1)
    at = torch.as_tensor(first, device=flat.device).expand(len(flat))[:, None]
    return insert(flat, flat.gather(1, at).expand(-1, count), index).view(*bools.shape[:-1], -1)


class Fits(nn.Module):
    """At the first layer of a stack whose layers alone have a mask of positions: that is not widened.

    Raises: PlanError: the layer gets a mask without the prompt.
    """

    def __init__(self, stack: str, mask: str) -> None:
        super().__init__()
        self.stack, self.mask = stack, mask

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], module: nn.Module, flow: Flow) -> Call:
        span: Span | None = flow.get(key(self.stack))
        if span is None:
            return args, kwargs
        mask = given_arguments(module, args, kwargs).get(self.mask)
        if isinstance(mask, torch.Tensor) and mask.shape[-1] == span.total - span.count:
            message = f"{self.mask!r} of the layers hides positions, but was made without those of the prompt"
            raise PlanError(Problem("unfit-input", message, self.stack, "inputs without a mask"))
        return args, kwargs


class WidenMask(nn.Module):
    """At the entry of a stack that is given no ids and makes its masks behind its embeddings: widen the mask.

    Shapes: mask (B, T) -> (B, P + T), with the prompt at the place where the embeddings get it.
    """

    def __init__(self, stack: str, inputs: Inputs, acting: Acting) -> None:
        super().__init__()
        self.stack, self.mask, self.acting = stack, str(inputs.mask), acting
        self.hides = inputs.mask_hides

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], module: nn.Module, flow: Flow) -> Call:
        given = given_arguments(module, args, kwargs)
        mask = given.get(self.mask)
        if mask is None:
            return args, kwargs
        _rows(mask, mask.shape[-1], self.mask, self.stack)
        given[self.mask] = widened(mask, self.acting.count, self.acting.offset, self.hides)
        return (), given


class WidenRead(nn.Module):
    """At the entry of a stack that reads another: its mask of the other's states, widened to their length.

    States that are given may have come without a prompt; those that are made in the same call have it.
    """

    def __init__(self, reads: Reads, acting: Acting) -> None:
        super().__init__()
        self.states, self.mask, self.acting = reads.states, str(reads.mask), acting
        self.hides = reads.mask_hides

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], module: nn.Module, flow: Flow) -> Call:
        given = given_arguments(module, args, kwargs)
        mask, count = given.get(self.mask), self.acting.count
        states = None if self.states is None else given.get(self.states)
        if mask is not None and self._lacks_it(mask.shape[-1] + count, states):
            rows = _rows(mask, mask.shape[-1], self.mask, self.acting.stack)
            index = self.acting.index(rows, self.hides)
            given[self.mask] = widened(mask, count, index, self.hides)
        return (), given

    def _lacks_it(self, length: int, states: torch.Tensor | None) -> bool:
        """Whether states that have the prompt are of this length."""
        return self.states is None or (states is not None and states.shape[1] == length)


class WidenBias(nn.Module):
    """At a bias of fixed positions: the prompt has no position, so that its scores get none.

    Shapes: out (1, H, T, T) -> (1, H, P + T, P + T).
    Raises: PlanError: the bias was made for another length than that of the input.
    """

    def __init__(self, stack: str) -> None:
        super().__init__()
        self.stack = stack

    def forward(self, out: torch.Tensor, x: Any, host: nn.Module) -> torch.Tensor:
        span: Span = flow_of(host)[key(self.stack)]
        if out.shape[-1] != span.total - span.count or not isinstance(span.index, int):
            message = f"a bias of {out.shape[-1]} positions for {span.total - span.count} and a prompt"
            raise PlanError(Problem("unfit-input", message, self.stack, "inputs that need no interpolation"))
        before, after = span.index, out.shape[-1] - span.index
        bias = out.new_zeros(*out.shape[:2], span.total, span.total)
        ends = torch.arange(span.total, device=out.device)
        real = torch.cat([ends[:before], ends[span.total - after :]])
        bias[:, :, real[:, None], real] = out
        return bias
