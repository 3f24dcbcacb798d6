"""Prefix tuning: learned keys and values that every token may attend to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat
from torch import nn

from adapterkit.errors import PlanError, Problem
from adapterkit.methods.activations import ACTIVATIONS
from adapterkit.methods.base import Layers, MethodConfig, Shared, Unit, Unmergeable
from adapterkit.methods.kept import Frozen, keepable
from adapterkit.methods.lora import Gate, uniform
from adapterkit.methods.targets import Selection, chosen_layers, reached
from adapterkit.model.blueprint import Blueprint, Slot
from adapterkit.model.cores import Core, cores
from adapterkit.model.reading import read_stacks
from adapterkit.model.walk import is_sharded

KeyValue = tuple[torch.Tensor, torch.Tensor]


class PrefixTuningConfig(MethodConfig):
    """Prefix tuning (Li and Liang 2021, arXiv:2101.00190)."""

    method: ClassVar[str] = "prefix_tuning"
    place = "core"
    passing = MethodConfig.passing | {"init", "encoder_prefix", "cross_prefix"}

    prefix_length: int = Field(
        default=30, ge=1, description="number P of keys and values before those of the tokens"
    )
    flat: bool = Field(
        default=False, description="keys and values are trained themselves, not through an MLP"
    )
    bottleneck_size: int = Field(default=512, ge=1, description="width of the MLP")
    non_linearity: str = Field(default="tanh", description="activation in the MLP")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout on keys and values, in training")
    encoder_prefix: bool = Field(default=True, description="also in stacks that another stack reads")
    cross_prefix: bool = Field(default=True, description="also where another stack is read")
    use_gating: bool = Field(
        default=False, description="keys and values by a learned gate for each example (UniPELT)"
    )
    shared_gating: bool = Field(default=True, description="one gate for keys and values, not one for each")
    shift_bias: bool = Field(
        default=False,
        description="a bias of relative positions counts the prefix among the keys, but not among the "
        "queries, as in files of AdapterHub",
    )
    init: Literal["normal"] | NonNegativeFloat = Field(
        default="normal",
        description="standard deviation of the embedded (flat: of all) numbers at first; normal: 1",
    )
    layers: Layers | None = Field(
        default=None,
        description="numbers (one stack) or addresses such as 'decoder.3', which also reach parts that words "
        "without an address do not; None: all",
    )
    leave_out: Layers = Field(default=(), description="layers that are left out, as in `layers`")

    def model_post_init(self, context: Any) -> None:
        if self.non_linearity not in ACTIVATIONS:
            raise ValueError(f"non_linearity is one of {', '.join(ACTIVATIONS)}")

    def available(self, blueprint: Blueprint) -> Mapping[str, Slot]:
        return cores(blueprint)

    def select(self, blueprint: Blueprint) -> Selection:
        kept, stacks = chosen_layers(blueprint, self.layers, self.leave_out), reached(blueprint, self.layers)
        left_out = set() if self.encoder_prefix else read_stacks(blueprint)
        return Selection.of(
            [
                core
                for core in self.available(blueprint).values()
                if (core.stack, core.layer) in kept
                and core.stack in stacks
                and (core.stack not in left_out if core.sublayer == "attention" else self.cross_prefix)
            ]
        )

    def check(self, slots: Sequence[Slot]) -> None:
        """Refuse cores whose sizes nothing shows."""
        for core in slots:
            if isinstance(core, Core) and not (
                core.kv_heads and core.key_dim and core.value_dim and core.width
            ):
                message = f"the number of key/value heads of {core.path} or their width is not known"
                expected = "an interface that says 'sizes: {kv_heads: ..., head_dim: ...}'"
                raise PlanError(Problem("no-head-size", message, core.address, expected))
        own = [core for core in slots if isinstance(core, Core) and core.sublayer == "attention"]
        if self.shift_bias and not (own and all(core.bias for core in own)):
            message = "this model makes no bias of relative positions that could be shifted"
            raise PlanError(Problem("uneven-bias", message, "shift_bias"))

    @property
    def std(self) -> float:
        return 1.0 if self.init == "normal" else self.init

    def share(self, slots: Sequence[Slot], generator: torch.Generator | None) -> Shared | None:
        return None if self.flat else SharedPrefix(slots, self, generator)

    def build(self, slot: Slot, shared: Shared | None, generator: torch.Generator | None) -> Unit:
        assert isinstance(slot, Core)
        if isinstance(shared, SharedPrefix):
            return Prefix(slot, self, shared.of(slot), generator)
        return FlatPrefix(slot, self, generator)

    def flattened(
        self, slots: Sequence[Slot], units: Mapping[str, Unit], shared: Shared | None
    ) -> tuple[Self, dict[str, Unit], Shared | None] | None:
        if self.flat:
            return None
        config, found = self.replace(flat=True), dict[str, Unit]()
        with torch.no_grad():
            for slot in slots:
                old = units[slot.address]
                assert isinstance(slot, Core) and isinstance(old, Prefix)
                found[slot.address] = unit = FlatPrefix(slot, config, None)
                unit.gates = old.gates
                with torch.autocast(old.weight.device.type, enabled=False):
                    unit.key, unit.value = (nn.Parameter(tensor.clone()) for tensor in old.states())
                unit.train(old.training)
        return config, found, None


class PrefixUnit(Unmergeable):
    """P keys and values at one attention core.

    Identity is not promised at first: a key takes attention away whatever its value.
    Shapes: x (B, T, D) -> keys (1 or B, K, P, E_k) and values (1 or B, K, P, E_v).
    """

    acts_on = "kernel"
    averages = False  # attention is no mean of what it attends to
    undoes = True
    reason = "a prefix is no change of a weight"

    def __init__(self, core: Core, config: PrefixTuningConfig, generator: torch.Generator | None) -> None:
        super().__init__()
        self.kernel, self.eager = core.kernel, core.eager
        self.location = f"{core.location}.bias"
        self.shifts = config.shift_bias and core.sublayer == "attention"
        self.bias_method = core.bias if self.shifts else None
        self.makes_bias = core.layer == 0
        self.dropout = config.dropout
        self.gates = None
        if config.use_gating:
            count = 1 if config.shared_gating else 2
            self.gates = nn.ModuleList(Gate(core.width, generator) for _ in range(count))

    def states(self) -> KeyValue:
        """Keys (P, K, E_k) and values (P, K, E_v)."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> KeyValue:
        key, value = (tensor.transpose(0, 1)[None] for tensor in self.states())
        if self.training and self.dropout:
            key, value = F.dropout(key, self.dropout), F.dropout(value, self.dropout)
        if self.gates is not None:
            scores = [gate(x)[..., None] for gate in self.gates]
            key, value = key * scores[0], value * scores[-1]
        return key, value


class FlatPrefix(PrefixUnit):
    """Keys and values as they are; Liu et al. 2022 (P-tuning v2), arXiv:2110.07602."""

    def __init__(self, core: Core, config: PrefixTuningConfig, generator: torch.Generator | None) -> None:
        super().__init__(core, config, generator)
        lead = (config.prefix_length, core.kv_heads)
        self.key = nn.Parameter(torch.empty(*lead, core.key_dim).normal_(std=config.std, generator=generator))
        self.value = nn.Parameter(
            torch.empty(*lead, core.value_dim).normal_(std=config.std, generator=generator)
        )

    def states(self) -> KeyValue:
        return self.key, self.value


_WHOLE = "fully_shard of the whole model at once, or prefix_tuning_flat (kit.eject), which shares nothing"


class Embedded(nn.Module):
    """P embeddings through the first matrix of the MLP, for all layers of a sublayer: h = act(W e + b).

    Shapes: e `embedding` (P, D), W `weight` (R, D), b `bias` (R,), h (P, R).
    """

    def __init__(self, width: int, config: PrefixTuningConfig, generator: torch.Generator | None) -> None:
        super().__init__()
        self.act = ACTIVATIONS[config.non_linearity]
        self.embedding = nn.Parameter(
            torch.empty(config.prefix_length, width).normal_(std=config.std, generator=generator)
        )
        self.weight = uniform((config.bottleneck_size, width), width, generator)
        self.bias = uniform((config.bottleneck_size,), width, generator)

    def forward(self) -> torch.Tensor:
        if is_sharded(self.weight):  # with the layer that holds it, while another one asks
            message = "the MLP that all layers share was sharded together with one of them"
            raise PlanError(Problem("shared-apart", message, expected=_WHOLE))
        return self.act(F.linear(self.embedding, self.weight, self.bias))


class SharedPrefix(Shared):
    """The embeddings of every sublayer of every stack."""

    def __init__(
        self, slots: Sequence[Slot], config: PrefixTuningConfig, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        widths: dict[str, int] = {}
        for slot in slots:
            if isinstance(slot, Core):
                widths.setdefault(_key(slot), slot.width)
        self.locations = nn.ModuleDict({key: Embedded(w, config, generator) for key, w in widths.items()})

    def of(self, core: Core) -> Embedded:
        found: Any = self.locations[_key(core)]
        return found  # type: ignore[no-any-return]


def _key(core: Core) -> str:
    return core.location.replace(".", "_").replace("/", "_")


class Prefix(PrefixUnit):
    """Keys and values through an MLP that all layers of a sublayer share but for rows of the last matrix.

    Source: Li and Liang 2021, arXiv:2101.00190, section 4.3.
    Shapes: h (P, R) -> (P, K (E_k + E_v)) by `weight` and `bias`, first the rows of keys, then of values.
    """

    def __init__(
        self, core: Core, config: PrefixTuningConfig, embedded: Embedded, generator: torch.Generator | None
    ) -> None:
        super().__init__(core, config, generator)
        self.heads = core.kv_heads
        self.sizes = [core.kv_heads * core.key_dim, core.kv_heads * core.value_dim]
        self.weight = uniform((sum(self.sizes), config.bottleneck_size), config.bottleneck_size, generator)
        self.bias = uniform((sum(self.sizes),), config.bottleneck_size, generator)
        # in a tuple, so that what is shared is registered at its owner alone
        self.owner = (embedded,)
        self.kept: tuple[Frozen, KeyValue] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "kept": None}

    def states(self) -> KeyValue:
        """As the MLP gives them: of frozen weights once, not for each token that follows."""
        owner = self.owner[0]
        tensors = [self.weight, self.bias, owner.embedding, owner.weight, owner.bias]
        if torch.compiler.is_compiling() or torch.is_autocast_enabled(self.weight.device.type):
            return self._computed()
        if not keepable(tensors):
            self.kept = None
            return self._computed()
        if self.kept is None or not self.kept[0].are(tensors):
            with torch.inference_mode(False), torch.no_grad():
                self.kept = Frozen(tensors), self._computed()
        return self.kept[1]

    def _computed(self) -> KeyValue:
        hidden = self.owner[0]().to(self.weight.device)
        both = F.linear(hidden, self.weight, self.bias).split(self.sizes, dim=-1)
        key, value = (tensor.unflatten(-1, (self.heads, -1)) for tensor in both)
        return key, value
