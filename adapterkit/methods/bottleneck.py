"""Bottleneck adapters: a small MLP beside or behind a sublayer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field, PositiveFloat
from torch import nn

from adapterkit.errors import PlanError, Problem
from adapterkit.methods.activations import ACTIVATIONS
from adapterkit.methods.base import BranchConfig, Helper, Shared, Unit, Unmergeable
from adapterkit.methods.flow import (
    Capture,
    Flow,
    Result,
    apart,
    base_forward,
    called_alone,
    first,
    flow_of,
    number,
    runs_again,
    with_first,
)
from adapterkit.methods.lora import Gate
from adapterkit.methods.targets import Selection, chosen_layers
from adapterkit.model.blueprint import Blueprint, Slot
from adapterkit.model.branches import Branch, branches

Init = Literal["bert", "mam_adapter", "houlsby"]


def _text_keys(value: Any) -> Any:
    """Numbers of layers may be numbers, as YAML reads them."""
    return {str(key): item for key, item in value.items()} if isinstance(value, Mapping) else value


Reduction = Annotated[PositiveFloat | dict[str, PositiveFloat], BeforeValidator(_text_keys)]


class BottleneckConfig(BranchConfig):
    """Bottleneck adapters (Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2020, arXiv:2005.00247)."""

    method: ClassVar[str] = "bottleneck"
    passing = BranchConfig.passing | {"init_weights", "stochastic_depth"}

    reduction_factor: Reduction = Field(
        default=16.0,
        description="D / bottleneck width: one, or by stack, layer ('encoder.3'; a number where there is one "
        "stack), branch and 'default'",
    )
    non_linearity: str = Field(default="relu", description="activation in the bottleneck")
    is_parallel: bool = Field(default=False, description="reads the residual and is added to the branch")
    original_ln_before: bool = Field(
        default=False, description="reads branch + residual, normed where the model does"
    )
    original_ln_after: bool = Field(default=True, description="the model's residual add and norm follow")
    residual_before_ln: bool | Literal["post_add"] = Field(
        default=True,
        description="the adapter's own residual: the branch (true), what it reads (false), or branch + x",
    )
    adapter_residual_before_ln: bool = Field(default=False, description="own residual before ln_after")
    ln_before: bool = Field(default=False, description="a new norm before the bottleneck")
    ln_after: bool = Field(default=False, description="a new norm behind it")
    scaling: float | Literal["learned", "channel"] = Field(
        default=1.0, description="factor of the bottleneck's output"
    )
    residual: Literal["stream", "input", "chained"] = Field(
        default="stream",
        description="what x is; files of AdapterHub also have the normed input of the branch, and the stream "
        "with the attention beside it ('chained')",
    )
    original_ln_first: bool = Field(
        default=False,
        description="the branch is first replaced by (the norm of) its sum with x; so are some adapters of "
        "AdapterHub in blocks",
    )
    swapped: bool = Field(
        default=False, description="branch and residual change places, as in some files of AdapterHub"
    )
    use_gating: bool = Field(default=False, description="a learned gate for each example (UniPELT)")
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="dropout on the bottleneck's output, in training"
    )
    stochastic_depth: float = Field(
        default=0.0, ge=0, lt=1, description="chance to leave it out for an example, in training"
    )
    init_weights: Init = Field(default="bert", description="how the matrices start")

    def model_post_init(self, context: Any) -> None:
        if self.non_linearity not in ACTIVATIONS:
            raise ValueError(f"non_linearity is one of {', '.join(ACTIVATIONS)}")

    def factor(self, branch: Slot) -> float:
        """The reduction factor of a branch, by the most exact word for it."""
        given = self.reduction_factor
        if not isinstance(given, Mapping):
            return given
        words = (branch.address, f"{branch.stack}.{branch.layer}", str(branch.layer), branch.stack, "default")
        usual = type(self).model_fields["reduction_factor"].default
        return next((given[word] for word in words if word in given), float(usual))

    def width(self, branch: Branch) -> int:
        """Width of the bottleneck at a branch."""
        return max(int((branch.shape or (1, 1))[0] // self.factor(branch)), 1)

    def select(self, blueprint: Blueprint) -> Selection:
        """What is asked for.

        Raises: PlanError: `reduction_factor` names a layer or branch that does not exist.
        """
        for word in self.reduction_factor if isinstance(self.reduction_factor, Mapping) else ():
            if word != "default" and word not in self.available(blueprint):
                chosen_layers(blueprint, (int(word) if word.isdigit() else word,), ())
        return super().select(blueprint)

    def check(self, slots: Sequence[Slot]) -> None:
        """Refuse what has no meaning at a branch."""
        problems = []
        for branch in slots:
            own_sum = self.original_ln_after or self.exact or self.residual == "chained"
            if isinstance(branch, Branch) and branch.parallel and not own_sum:
                message = (
                    "leaves out the residual add, but the branches of this layer are added together in one"
                )
                problems.append(Problem("no-own-sum", message, branch.address, "original_ln_after=True"))
            if isinstance(branch, Branch) and branch.chunked and (self.needs_residual or self.over_examples):
                message = "acts on whole examples, but chunk_size_feed_forward cuts them into parts here"
                problems.append(
                    Problem("chunked-feed-forward", message, branch.address, "chunk_size_feed_forward=0")
                )
        if self.residual == "input" and not self.original_ln_after:
            message = "leaves out the stream, but takes the normed input of the branch for it"
            problems.append(Problem("no-own-sum", message, "", "original_ln_after=True"))
        if problems:
            raise PlanError(problems)

    def helpers(self, slots: Sequence[Slot], blueprint: Blueprint) -> list[Helper]:
        if self.residual == "input":
            # it must not take the place of the stream, which other adapters read
            return [
                *super().helpers(slots, blueprint),
                *(_input_helper(s) for s in slots if isinstance(s, Branch)),
            ]
        if self.residual != "chained":
            return super().helpers(slots, blueprint)
        found = branches(blueprint, self.branch == "before_norm")
        beside = [found[a] for slot in slots if (a := f"{slot.stack}.{slot.layer}.attention") in found]
        everything = {slot.address: slot for slot in (*slots, *beside)}
        results = {
            slot.address: Helper(
                slot,
                f"result__{slot.address.replace('.', '_').replace('/', '_')}",
                partial(Result, f"{slot.stack}.{slot.layer}.mlp"),
                "output",
                3,
            )
            for slot in beside
        }
        return [*results.values(), *super().helpers(list(everything.values()), blueprint)]

    @property
    def needs_residual(self) -> bool:
        return (
            self.is_parallel
            or self.swapped
            or self.original_ln_before
            or self.original_ln_first
            or self.residual_before_ln == "post_add"
            or not self.original_ln_after
        )

    @property
    def reads_stream(self) -> bool:
        """It reads nothing of the branch, whatever adapters before it have made of that."""
        return self.is_parallel or (self.swapped and not self.original_ln_before)

    @property
    def over_examples(self) -> bool:
        """One position's result depends on the others of its example."""
        return self.use_gating or self.stochastic_depth > 0

    @property
    def exact(self) -> bool:
        """The result holds branch + x by itself, so that the model's own residual add can stay."""
        own = self.residual_before_ln == "post_add" or (
            not self.residual_before_ln and self.original_ln_before
        )
        return own and not (self.is_parallel or self.ln_after or self.swapped or self.original_ln_first)

    def build(self, branch: Branch, shared: Shared | None, generator: torch.Generator | None) -> Unit:
        return Bottleneck(branch, self, shared, generator)

    def projections(
        self, branch: Branch, shared: Shared | None, generator: torch.Generator | None
    ) -> tuple[nn.Module, nn.Module]:
        """Down (D -> width) and up (width -> D), started as `init_weights` says."""
        d_model, width = (branch.shape or (1, 1))[0], self.width(branch)
        down, up = nn.Linear(d_model, width), nn.Linear(width, d_model)
        with torch.no_grad():
            for linear in (down, up):
                if self.init_weights == "mam_adapter" and linear is down:
                    nn.init.kaiming_uniform_(linear.weight, a=5**0.5, generator=generator)
                elif self.init_weights == "mam_adapter":
                    linear.weight.zero_()
                elif self.init_weights == "houlsby":
                    nn.init.trunc_normal_(linear.weight, std=1e-2, a=-2e-2, b=2e-2, generator=generator)
                else:
                    nn.init.normal_(linear.weight, std=0.02, generator=generator)
                linear.bias.zero_()
        return down, up


def _input_helper(branch: Branch) -> Helper:
    key = f"captureinput__{branch.address.replace('.', '_').replace('/', '_')}"
    return Helper(branch.inside, key, partial(Capture, f"{branch.address}~"), "input", -1)


class Bottleneck(Unmergeable):
    """u = s * up(act(down(LN(z)))) with a residual, at one branch h of the residual stream x.

    Sequential: z is h, or h + x (through the model's own norm in post-norm models) with
    `original_ln_before`; the adapter's residual r is h, z or h + x. Parallel: z is x, and the result is h +
    u.
    Source: Houlsby et al. 2019, fig. 2; He et al. 2022, arXiv:2110.04366, table 1 (parallel, scaled); Steitz
    and Roth 2024, arXiv:2406.06820 (`scaling="channel"`, post-adapter).
    Shapes: h, x (B, T, D) -> (B, T, D).
    """

    phase = 2
    reason = "a bottleneck is no change of a weight"

    def __init__(
        self,
        branch: Branch,
        config: BottleneckConfig,
        shared: Shared | None,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        d_model = (branch.shape or (1, 1))[0]
        self.config = config
        self.branch = branch.address
        self.per_position = not config.over_examples
        chained = config.residual == "chained" and branch.sublayer == "mlp"
        self.beside = f"{branch.address}+" if chained else None
        self.act = ACTIVATIONS[config.non_linearity]
        self.down, self.up = config.projections(branch, shared, generator)
        # in a tuple, so that the model's own norm is not registered here a second time
        after = branch.after_residual
        self.norm: tuple[nn.Module, ...] = () if after is None else (after.module,)
        self.norm_forward = None if after is None else base_forward(after.module)
        self.replaces_norm = after is not None and not branch.own_adapter
        self.factor = branch.scale
        if config.ln_before:
            self.norm_before = nn.LayerNorm(d_model)
        if config.ln_after:
            self.norm_after = nn.LayerNorm(d_model)
        if config.scaling == "learned":
            self.scale = nn.Parameter(torch.ones(1))
        elif config.scaling == "channel":
            self.scale = nn.Parameter(torch.ones(d_model))
        if config.use_gating:
            self.gate = Gate(d_model, generator)

    @property
    def per_example(self) -> tuple[str, ...]:
        return self.branch, f"{self.branch}~", f"{self.branch}+"

    @property
    def leaves(self) -> str:
        return self.branch

    @property
    def dtype(self) -> torch.dtype:
        shared: Any = getattr(self.down, "shared", ())
        tensors = (t for module in (self, *shared) if module is not None for t in module.parameters())
        own = next(tensors, None)
        # quantised after attach, its maps may have none, and take float32
        return torch.float32 if own is None else own.dtype

    def up_output(self, z: torch.Tensor) -> torch.Tensor:
        """What the bottleneck gives, s * up(act(down(LN(z)))): (B, T, D) -> (B, T, D)."""
        config, given = self.config, z.dtype
        u = z.to(self.dtype)
        u = self.norm_before(u) if config.ln_before else u
        u = self.up(self.act(self.down(u)))
        if self.training and config.stochastic_depth:
            kept = torch.rand((u.shape[0], *[1] * (u.ndim - 1)), device=u.device) >= config.stochastic_depth
            u = u * kept / (1 - config.stochastic_depth)
        if isinstance(config.scaling, str):
            u = u * self.scale
        elif config.scaling != 1:
            u = u * config.scaling
        result: torch.Tensor = u.to(given)
        return result

    def update(self, z: torch.Tensor) -> torch.Tensor:
        """`up_output` with dropout and gate."""
        u = self.up_output(z)
        if self.training and self.config.dropout:
            u = F.dropout(u, self.config.dropout)
        return u * self.gate(z.to(self.dtype)).to(u.dtype) if self.config.use_gating else u

    def residual(self, flow: Flow, h: torch.Tensor) -> torch.Tensor:
        """The residual x of the branch h, as the options say; h itself where nothing reads it."""
        if not self.config.needs_residual:
            return h
        place = f"{self.branch}~" if self.config.residual == "input" else self.branch
        if place not in flow and runs_again():
            raise apart(self.branch)
        found: torch.Tensor = flow[place]
        found = found if self.beside is None else found + flow[self.beside]
        # some branches list the tokens of all examples: (B T, D)
        is_flat = h.ndim == 2 and found.ndim == 3 and h.shape[0] == found.shape[0] * found.shape[1]
        return found.flatten(0, 1) if is_flat else found

    def summed(self, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Branch and residual, through the model's own norm in post-norm models."""
        if self.norm_forward is None:
            return h + x
        return called_alone(self.norm[0], self.norm_forward, h + x)

    def reads(self, h: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the bottleneck reads, and the adapter's own residual, for the branch h and the residual x."""
        config = self.config
        if config.is_parallel:
            return x, h
        if config.original_ln_first:
            h = self.summed(h, x)
        z = residual = h
        if config.original_ln_before:
            z = self.summed(h, x)
        if config.residual_before_ln == "post_add":
            residual = h + x
        elif not config.residual_before_ln:
            residual = z
        return z, residual

    def leave(self, out: Any, result: torch.Tensor) -> Any:
        """`out` such that `result` is what the model adds to the stream."""
        if self.factor == 1:
            return with_first(out, result)
        h, factor = first(out), number(self.factor)
        return with_first(out, h + (result - h * factor) / factor)  # the same bits if nothing is added

    def gives(self, out: Any, result: torch.Tensor, x: torch.Tensor, flow: Flow) -> Any:
        """Let `result` leave the sublayer: to the model's own residual add, or past it."""
        if self.config.original_ln_after:
            return self.leave(out, result)
        if not self.replaces_norm:
            # the model adds the residual that the adapter leaves out: one rounding
            flow[f"{self.branch}^"] = 1.0
            return self.leave(out, result - x)
        flow[f"{self.branch}="] = result
        return out

    def takes(self, out: Any, flow: Flow) -> torch.Tensor:
        """The branch h as it is added: the output of the sublayer, or what an adapter before made of it."""
        h, b = first(out), self.branch
        if self.factor != 1:
            h = h * number(self.factor)
        done, share = flow.pop(f"{b}=", None), flow.pop(f"{b}^", None)
        if done is not None:
            where = flow.pop(f"{b}?", None)
            h = done if where is None else torch.where(where, done, h)
        if share is None:
            return h
        x: torch.Tensor = flow[b]
        beside = flow.get(f"{b}+")
        result: torch.Tensor = h + share * (x if beside is None else x + beside)
        return result

    def forward(self, out: Any, x: Any, host: nn.Module) -> Any:
        flow, config = flow_of(host), self.config
        if not flow.get(f"{self.branch}!"):
            return out
        h = self.takes(out, flow)
        residual = self.residual(flow, h)
        z, own = self.reads(residual, h) if config.swapped else self.reads(h, residual)
        u = self.update(z)
        if self.norm_forward is None and config.exact and not config.original_ln_after:
            # branch + x is what the model makes of the branch alone
            flow[f"{self.branch}^"] = 1.0
            return self.leave(out, h + u)
        inside = config.adapter_residual_before_ln and not config.is_parallel
        if config.ln_after:
            u = self.norm_after((u + own if inside else u).to(self.dtype)).to(u.dtype)
        result = u if config.ln_after and inside else u + own
        if config.swapped and config.original_ln_after:
            result = result + h - residual  # the model adds the residual, and not the branch
        return self.gives(out, result, residual, flow)
