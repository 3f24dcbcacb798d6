"""ReFT: interventions on the hidden states at a few positions behind each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from adapterkit.errors import ConfigError, PlanError, Problem
from adapterkit.methods.activations import ACTIVATIONS
from adapterkit.methods.base import Helper, Layers, MethodConfig, Shared, Unit, Unmergeable
from adapterkit.methods.flow import (
    AGAIN,
    Flow,
    apart,
    can_look,
    entry_place,
    first,
    flow_of,
    given_arguments,
    past_of,
    refuse_packed,
    runs_again,
    task,
    with_first,
)
from adapterkit.methods.targets import Selection, chosen_layers, reached
from adapterkit.methods.weights import float_of
from adapterkit.model.blueprint import Blueprint, Slot
from adapterkit.model.branches import layer_slots
from adapterkit.spec.schema import Inputs


class ReFTConfig(MethodConfig):
    """Representation finetuning (Wu et al. 2024, arXiv:2404.03592)."""

    method: ClassVar[str] = "reft"

    r: int = Field(default=1, ge=1, description="rank R of the subspace that is edited")
    prefix_positions: int = Field(default=3, ge=0, description="edited positions from the first token on")
    suffix_positions: int = Field(default=0, ge=0, description="edited positions up to the last token")
    orthogonal: bool = Field(default=True, description="the rows of R are orthonormal (LoReFT)")
    subtract_projection: bool = Field(
        default=True, description="the present state in the subspace is taken out"
    )
    into_padding: bool = Field(
        default=False,
        description="where an example is shorter than its prefix, positions of padding behind it are edited "
        "as well, as AdapterHub's library does",
    )
    tied_weights: bool = Field(default=False, description="one intervention for prefix and suffix")
    non_linearity: str | None = Field(default=None, description="activation of the learned source")
    dropout: float = Field(default=0.05, ge=0, lt=1, description="dropout on edited states, in training")
    layers: Layers | None = Field(
        default=None,
        description="numbers (one stack) or addresses such as 'decoder.3', which also reach parts that words "
        "without an address do not; None: all",
    )
    leave_out: Layers = Field(default=(), description="layers that are left out, as in `layers`")
    first_only: bool = Field(
        default=False,
        description="acts only where its adapter is the first of a setup, as in setups of AdapterHub",
    )

    def model_post_init(self, context: Any) -> None:
        if not self.prefix_positions and not self.suffix_positions:
            raise ValueError("prefix_positions or suffix_positions must be at least 1")
        if self.non_linearity is not None and self.non_linearity not in ACTIVATIONS:
            raise ValueError(f"non_linearity is one of {', '.join(ACTIVATIONS)}")

    def available(self, blueprint: Blueprint) -> Mapping[str, Slot]:
        return layer_slots(blueprint)

    def select(self, blueprint: Blueprint) -> Selection:
        kept, stacks = chosen_layers(blueprint, self.layers, self.leave_out), reached(blueprint, self.layers)
        slots = (slot for slot in self.available(blueprint).values() if slot.stack in stacks)
        return Selection.of([slot for slot in slots if (slot.stack, slot.layer) in kept])

    def check(self, slots: Sequence[Slot]) -> None:
        """Refuse more orthonormal rows than there are dimensions."""
        widths = ((slot.address, (slot.shape or (1,))[0]) for slot in slots)
        problems = [
            Problem(
                "bad-rank", f"rank {self.r} is not between 1 and {width}, the width of the stream", address
            )
            for address, width in widths
            if self.orthogonal and self.r > width
        ]
        if problems:
            raise ConfigError(problems)

    def build(self, slot: Slot, shared: Shared | None, generator: torch.Generator | None) -> Unit:
        return ReFT(slot, self, generator)

    def helpers(self, slots: Sequence[Slot], blueprint: Blueprint) -> list[Helper]:
        found = []
        for stack in dict.fromkeys(slot.stack for slot in slots):
            inputs, name = blueprint.stacks[stack].inputs, stack.replace("/", "_")
            entry = entry_place(blueprint, stack)
            found.append(Helper(entry, f"entry_info__{name}", partial(Entered, stack, inputs), "entry", 0))
            if inputs.layer_mask is not None:
                make = partial(LayerEntered, stack, inputs.layer_mask)
                layers = [
                    blueprint.places[f"{stack}.{slot.layer}.layer"] for slot in slots if slot.stack == stack
                ]
                found += [Helper(layer, f"layer_info__{name}", make, "entry", 0) for layer in layers]
        return found


class Intervention(nn.Module):
    """h + R^T (act(W h + b) - R h), edited in a subspace of R dimensions.

    Source: Wu et al. 2024, arXiv:2404.03592, eq. 2 (LoReFT: orthonormal R); NoReFT lets R be any matrix,
    DiReFT (eq. 3) also leaves out R h.
    Dropout is on the result, so that states which nothing edits have none; as in the authors' code.
    Shapes: h (..., D) -> (..., D); R `projection` (R, D), W and b `source` (R, D), (R,).
    """

    def __init__(self, d_model: int, config: ReFTConfig, generator: torch.Generator | None) -> None:
        super().__init__()
        self.subtract = config.subtract_projection
        self.act = None if config.non_linearity is None else ACTIVATIONS[config.non_linearity]
        self.orthogonal = config.orthogonal
        self.dropout = config.dropout
        self.source = nn.Linear(d_model, config.r)
        self.projection = nn.Parameter(torch.empty(config.r, d_model))
        bound = d_model**-0.5
        with torch.no_grad():
            for tensor in (self.source.weight, self.source.bias, self.projection):
                tensor.uniform_(-bound, bound, generator=generator)
            if config.orthogonal and not self.projection.is_meta:
                nn.init.orthogonal_(self.projection, generator=generator)

    def rows(self) -> torch.Tensor:
        """R (R, D). Where its rows are orthonormal, they are those of the QR decomposition of `projection`,
        signs kept: a plain tensor that can be pickled, averaged and loaded, and that is R itself when its
        rows are orthonormal already.
        """
        if not self.orthogonal:
            return self.projection
        # there is no decomposition in half precision
        wide = torch.promote_types(self.projection.dtype, torch.float32)
        q, r = torch.linalg.qr(self.projection.to(wide).t())
        rows: torch.Tensor = (q * r.diagonal().sign().detach()).t()
        return rows.to(self.projection.dtype)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        rows = self.rows()
        source = self.source(h)
        source = source if self.act is None else self.act(source)
        if self.subtract:
            source = source - F.linear(h, rows)
        edited = h + source @ rows
        return F.dropout(edited, self.dropout) if self.training and self.dropout else edited


class Entered(nn.Module):
    """Where a stack is entered: remember which positions are real, and how many a cache already holds.

    Raises: PlanError: several texts are packed into one row.
    """

    def __init__(self, stack: str, inputs: Inputs) -> None:
        super().__init__()
        self.stack, self.inputs = stack, inputs

    def forward(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], module: nn.Module, flow: Flow
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given, names = given_arguments(module, args, kwargs), self.inputs
        refuse_packed(module, given, names, self.stack, "ReFT")
        mask = given.get(names.mask) if names.mask else None
        if names.mask_hides and mask is not None:
            mask = mask == 0
        past = past_of(given)
        if not past and _parted(mask):
            message = "the mask parts a row into texts that do not see each other, of which the first alone"
            expected = "one text in each row"
            raise PlanError(Problem("packed", f"{message} would be edited", self.stack, expected))
        flow[f"{self.stack}.mask"], flow[f"{self.stack}.past"] = mask, past
        flow.pop(f"{self.stack}.late", None)
        if (late := _late(mask, past)) is not None:
            flow[f"{self.stack}.late"] = late
        flow.pop(f"{self.stack}.task", None)
        if runs_again():
            flow[f"{self.stack}.task"] = task()
        return args, kwargs


class LayerEntered(nn.Module):
    """Where a layer is entered that alone is told which positions are real: samples may be fewer, say."""

    def __init__(self, stack: str, mask: str) -> None:
        super().__init__()
        self.stack, self.mask = stack, mask

    def forward(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], module: nn.Module, flow: Flow
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        flow[f"{self.stack}.mask"] = given_arguments(module, args, kwargs).get(self.mask)
        return args, kwargs


def _parted(mask: Any) -> bool:
    """Whether a token does not see the one before it, in what queries see of keys (B, 1, T, K)."""
    if isinstance(mask, Mapping):
        return bool(mask) and all(map(_parted, mask.values()))
    if not isinstance(mask, torch.Tensor) or mask.ndim != 4 or mask.shape[2] < 2 or not can_look(mask):
        return False
    tokens = tokens_of(mask, mask.shape[2])
    if tokens is None:
        return False
    before = _seen(mask)[:, 0].diagonal(offset=-1, dim1=1, dim2=2)[:, : mask.shape[2] - 1]
    return bool((tokens[:, 1:] & tokens[:, :-1] & ~before).any())


def _late(mask: Any, past: int) -> int | None:
    """How many tokens the row that begins last has in a cache, if several more come; else None."""
    if not past:
        return None
    if isinstance(mask, Mapping):
        found = [late for late in (_late(one, past) for one in mask.values()) if late is not None]
        return max(found, default=None)  # of a window only the end is seen
    if not isinstance(mask, torch.Tensor):
        return past if mask is None else None
    if (mask.shape[2] if mask.ndim == 4 else mask.shape[1] - past) < 2 or not can_look(mask):
        return None
    seen = _seen(mask)
    return past - int((seen[:, 0, 0] if mask.ndim == 4 else seen).long().argmax(dim=1).max())


class ReFT(Unmergeable):
    """Edit the first and last positions of every example behind one layer.

    Positions are counted by the stack's own mask, from its first one on; padding is not edited, but where
    `into_padding` says so. Under a cache only the first step is edited, since its positions are those of the
    prompt. Where both overlap, the suffix is taken.
    Shapes: h (B, T, D) -> (B, T, D).
    """

    phase = 4
    reason = "an intervention on states is no change of a weight"

    def __init__(self, slot: Slot, config: ReFTConfig, generator: torch.Generator | None) -> None:
        super().__init__()
        d_model = (slot.shape or (1, 1))[0]
        self.stack = slot.stack
        self.config = config
        self.first_only = config.first_only
        if config.prefix_positions:
            self.prefix = Intervention(d_model, config, generator)
        if config.suffix_positions and not (config.tied_weights and config.prefix_positions):
            self.suffix = Intervention(d_model, config, generator)

    @property
    def per_example(self) -> tuple[str, ...]:
        return (f"{self.stack}.mask",)

    def forward(self, out: Any, x: Any, host: nn.Module) -> Any:
        flow = flow_of(host)
        if runs_again() and AGAIN not in flow and flow.get(f"{self.stack}.task") != task():
            raise apart(self.stack)
        h = first(out)
        config, length = self.config, h.shape[1]
        if flow.get(f"{self.stack}.past"):
            late, count = flow.get(f"{self.stack}.late"), config.prefix_positions
            if late is not None and length > 1 and late < count:
                message = f"{count} positions are edited, but {max(late, 0)} of them were in the first step"
                expected = "a first step, or prefill_chunk_size, longer than padding and positions"
                raise PlanError(Problem("late-positions", message, self.stack, expected))
            return out
        begin, end = spans(flow.get(f"{self.stack}.mask"), h)
        result = h
        if config.prefix_positions:
            behind = torch.full_like(end, length) if config.into_padding else end
            result = edit(h, result, self.prefix, begin, begin, behind, min(config.prefix_positions, length))
        if config.suffix_positions:
            count = min(config.suffix_positions, length)
            unit = self.prefix if config.tied_weights and config.prefix_positions else self.suffix
            result = edit(h, result, unit, torch.maximum(end - count, begin), begin, end, count)
        return with_first(out, result)


def tokens_of(mask: Any, length: int) -> torch.Tensor | None:
    """Which positions are tokens (B, T), as bools, from what a stack is given as its mask; None: all.

    `generate` with a cache of fixed size gives what queries see of keys (B, 1, T, K), one for each kind of
    layer. There a token is a position that sees itself, whatever window or order the layer has.
    """
    if isinstance(mask, Mapping):
        mask = next(iter(mask.values()), None)
    if not isinstance(mask, torch.Tensor):
        return None
    seen = _seen(mask)
    if seen.ndim > 2:
        seen = seen[:, 0] if seen.ndim == 4 else seen
        seen = seen[:, 0] if seen.shape[1] == 1 else seen.diagonal(dim1=1, dim2=2)
        seen = seen[:, :length]
    return seen if seen.shape[1] == length else None


def _seen(mask: torch.Tensor) -> torch.Tensor:
    """What a mask shows, as bools; with four axes its numbers are added to scores."""
    additive = mask.is_floating_point() and mask.ndim == 4
    return mask > torch.finfo(mask.dtype).min / 2 if additive else mask != 0


def spans(mask: Any, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First position and the one behind the last of every example: (B,) each."""
    rows, length = h.shape[:2]
    seen = tokens_of(mask, length)
    if seen is None:
        begin = torch.zeros(rows, dtype=torch.long, device=h.device)
        return begin, begin + length
    ones = seen.expand(rows, -1).long().to(h.device)
    begin = ones.argmax(dim=1)
    return begin, begin + ones.sum(dim=1)


def edit(
    h: torch.Tensor,
    result: torch.Tensor,
    unit: nn.Module,
    start: torch.Tensor,
    begin: torch.Tensor,
    end: torch.Tensor,
    count: int,
) -> torch.Tensor:
    """`result` with unit(h) at `count` positions from `start`, as far as they lie between begin and end.

    Shapes: h, result (B, T, D); start, begin, end (B,).
    """
    steps = start[:, None] + torch.arange(count, device=h.device)
    inside = (steps >= begin[:, None]) & (steps < end[:, None])
    # positions outside wrap around: they stay different from one another, and get back what they had
    index = (steps % h.shape[1])[:, :, None].expand(-1, -1, h.shape[2])
    own = h.gather(1, index)
    dtype = float_of(unit)
    new = unit(own.to(dtype)).to(h.dtype)
    return result.scatter(1, index, torch.where(inside[:, :, None], new, result.gather(1, index)))
