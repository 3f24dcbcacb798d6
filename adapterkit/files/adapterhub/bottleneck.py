"""Bottlenecks and Compacter: `<module>.adapters.<name>.<parameter>`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from adapterkit.errors import FileFormatError, Problem
from adapterkit.files.adapterhub.config import validated
from adapterkit.files.adapterhub.keys import Host, Keyed
from adapterkit.files.adapterhub.member import Member, Part, Shapes
from adapterkit.files.adapterhub.places import Layer, layers, left_out
from adapterkit.methods.activations import ACTIVATIONS
from adapterkit.methods.bottleneck import BottleneckConfig, Init
from adapterkit.methods.compacter import CompacterConfig
from adapterkit.model.blueprint import Blueprint
from adapterkit.model.branches import Branch, branches

Names = dict[str, tuple[str, tuple[int, ...]]]
"""Parameter in their words -> ours ('' where it is there twice), and its shape."""
_SAME = (
    "is_parallel",
    "original_ln_before",
    "original_ln_after",
    "residual_before_ln",
    "adapter_residual_before_ln",
    "ln_before",
    "ln_after",
    "scaling",
    "use_gating",
    "dropout",
    "stochastic_depth",
)
COMPACTER = (
    "phm_dim",
    "phm_rank",
    "phm_bias",
    "shared_phm_rule",
    "factorized_phm_rule",
    "shared_W_phm",
    "factorized_phm_W",
    "phm_init_range",
)


class BottleneckFile(BaseModel):
    """`config` of an adapter_config.json; fields and defaults of adapters 1.3.0, BnConfig."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    architecture: None = None
    mh_adapter: bool
    output_adapter: bool
    cross_adapter: bool = False
    reduction_factor: float | dict[str, float]
    non_linearity: str
    original_ln_before: bool = False
    original_ln_after: bool = True
    ln_before: bool = False
    ln_after: bool = False
    init_weights: Init | None = None
    init_weights_seed: int | None = None
    is_parallel: bool = False
    scaling: float | Literal["learned", "channel"] = 1.0
    use_gating: bool = False
    residual_before_ln: bool | Literal["post_add"] = True
    adapter_residual_before_ln: bool = False
    inv_adapter: Literal["nice", "glow"] | None = None
    inv_adapter_reduction_factor: float | None = None
    leave_out: tuple[int, ...] = ()
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    dtype: str | None = None
    phm_layer: bool = False
    phm_dim: int = Field(4, ge=1)
    factorized_phm_W: bool = True  # noqa: N815
    shared_W_phm: bool = False  # noqa: N815
    shared_phm_rule: bool = True
    factorized_phm_rule: bool = False
    phm_c_init: str = "normal"
    phm_init_range: float = 0.0001
    learn_phm: bool = True
    hypercomplex_nonlinearity: str = "glorot-uniform"
    phm_rank: int = Field(1, ge=1)
    phm_bias: bool = True

    @property
    def shares(self) -> bool:
        """Whether tensors are kept once for each base model."""
        return self.phm_layer and (self.shared_phm_rule or self.shared_W_phm)

    def factor(self, number: int) -> float | None:
        """The reduction factor of a layer."""
        given = self.reduction_factor
        return given.get(str(number), given.get("default")) if isinstance(given, dict) else given


class BottleneckMember(Member):
    """A bottleneck config on one model."""

    def __init__(self, config: Mapping[str, Any], blueprint: Blueprint) -> None:
        self.theirs = validated(BottleneckFile, config)
        self.blueprint = blueprint
        self.shares = self.theirs.shares
        wanted = {
            "attention": self.theirs.mh_adapter,
            "cross_attention": self.theirs.cross_adapter,
            "mlp": self.theirs.output_adapter,
        }
        everything = branches(blueprint)
        self.layers: dict[str, Layer] = {}
        """Address of every adapted branch -> its layer."""
        self.branches: dict[str, Branch] = {}
        for layer in layers(blueprint):
            counted = layer.hub.locations
            for sublayer in (word for word in wanted if wanted[counted.get(word, word)]):
                address = f"{layer.address}.{sublayer}"
                if address in everything and layer.number not in self.theirs.leave_out:
                    self.layers[address], self.branches[address] = layer, everything[address]

    def refusals(self) -> Iterator[Problem]:
        theirs = self.theirs
        if theirs.non_linearity.lower() not in ACTIVATIONS:
            message = f"there is no activation {theirs.non_linearity!r}"
            yield Problem("unsupported-option", message, "non_linearity")
        if theirs.phm_layer and not theirs.learn_phm:
            yield Problem("unsupported-option", "rules that are not trained are not supported", "learn_phm")
        for address, layer in self.layers.items():
            if theirs.factor(layer.number) is None:
                message = f"names no factor for layer {layer.number}"
                yield Problem("bad-option", message, "reduction_factor", "a 'default'")
            for reason in self._reasons(address, layer):
                yield Problem("not-reproducible", reason, address)

    def _reasons(self, address: str, layer: Layer) -> Iterator[str]:
        """Why the numbers at a branch cannot be had."""
        theirs, branch, hub = self.theirs, self.branches[address], layer.hub
        sublayer = str(branch.sublayer)
        reads_sum = theirs.original_ln_before and not theirs.is_parallel
        if reads_sum and sublayer in hub.other_norm:
            yield "AdapterHub reads branch and residual through the norm of another layer"
        if sublayer in hub.unnormed and (reads_sum or not theirs.original_ln_after):
            yield "AdapterHub leaves out the norm of the sum"
        if branch.own_adapter and not theirs.original_ln_after:
            yield "AdapterHub leaves out the norm before the model's own adapters"
        if theirs.residual_before_ln == "post_add" and not theirs.is_parallel:
            if not theirs.original_ln_before or branch.after_residual is None:
                yield "AdapterHub has no 'post_add' here: it needs original_ln_before and a norm of the sum"
        if hub.hooked and not theirs.original_ln_after:
            yield "AdapterHub cannot leave out the residual add of this model"
        if hub.residual.get(sublayer) == "none" and theirs.is_parallel:
            yield "AdapterHub has no residual here, which a parallel adapter reads"

    def wanted(self, given: Keyed) -> dict[Host, Shapes]:
        return {
            ("bottleneck", address): {name: shape for name, (_, shape) in self._names(address).items()}
            for address in self.branches
        }

    def parts(self, given: Keyed) -> Iterator[Part]:
        groups: dict[tuple[Any, ...], list[str]] = {}
        for address, layer in self.layers.items():
            base = given.base_of(("bottleneck", address)) if self.shares else None
            groups.setdefault((base, *self._quirks(address, layer).items()), []).append(address)
        bases = [key[0] for key in groups]
        if self.shares and len(set(bases)) < len(bases):
            message = "shares tensors between branches that AdapterHub computes in different ways"
            raise FileFormatError(Problem("not-reproducible", message))
        for (base, *quirks), addresses in groups.items():
            units = {}
            for address in addresses:
                found = given.parts["bottleneck", address]
                names = self._names(address)
                for word in ("weight", "bias") if self.theirs.ln_before else ():
                    if not torch.equal(found[f"adapter_norm_before.{word}"], found[f"adapter_down.0.{word}"]):
                        message = "the norm before the bottleneck is there twice, and not the same"
                        raise FileFormatError(Problem("bad-file", message, address))
                units[address] = {ours: found[name] for name, (ours, _) in names.items() if ours}
            shared = self._shared(given, base, addresses[0]) if self.shares else {}
            yield Part(self._config(addresses, dict(quirks)), units, shared)

    def _quirks(self, address: str, layer: Layer) -> dict[str, Any]:
        """Options in which AdapterHub computes otherwise here than what the file says by itself."""
        hub, sublayer = layer.hub, str(self.branches[address].sublayer)
        found: dict[str, Any] = {}
        if hub.hooked:
            found["branch"] = "before_norm"
        residual = hub.residual.get(sublayer)
        if residual == "none":
            found |= {"original_ln_before": False} if self.theirs.original_ln_before else {}
        elif residual is not None:
            found["residual"] = residual
        if sublayer in hub.swapped:
            found["swapped"] = True
        return found

    def _config(self, addresses: list[str], quirks: Mapping[str, Any]) -> BottleneckConfig:
        theirs = self.theirs
        options = {name: getattr(theirs, name) for name in _SAME}
        options |= {"init_weights": theirs.init_weights} if theirs.init_weights else {}
        options["non_linearity"] = theirs.non_linearity.lower()
        options["leave_out"] = left_out(self.blueprint, theirs.leave_out)
        options["locations"] = self._locations(addresses)
        factor: Any = theirs.reduction_factor
        if isinstance(factor, dict):
            here = [self.layers[address] for address in addresses]
            factor = {layer.address: theirs.factor(layer.number) for layer in here}
        options["reduction_factor"] = factor
        if not theirs.phm_layer:
            return BottleneckConfig(**{**options, **quirks})
        options |= {name: getattr(theirs, name) for name in COMPACTER}
        return CompacterConfig(**{**options, **quirks})

    def _locations(self, addresses: list[str]) -> tuple[str, ...]:
        """Sublayers; with their stacks where not all stacks have the adapter there."""
        own = [self.branches[address] for address in addresses]
        found: dict[str, None] = {}
        for sublayer in dict.fromkeys(str(branch.sublayer) for branch in own):
            stacks = {branch.stack: None for branch in own if branch.sublayer == sublayer}
            everywhere = {b.stack for b in branches(self.blueprint).values() if b.sublayer == sublayer}
            whole = everywhere == stacks.keys()
            found |= {sublayer: None} if whole else {f"{stack}.{sublayer}": None for stack in stacks}
        return tuple(found)

    def _width(self, address: str) -> int:
        factor = self.theirs.factor(self.layers[address].number)
        return max(int((self.branches[address].shape or (1, 1))[0] // (factor or 1)), 1)

    def _names(self, address: str) -> Names:
        """Every tensor that they keep at a branch (adapters 1.3.0, methods/modeling.py, Adapter)."""
        theirs, width = self.theirs, self._width(address)
        d_model = (self.branches[address].shape or (1, 1))[0]
        down = f"adapter_down.{int(theirs.ln_before)}"
        found: Names = {}
        norms = {"adapter_norm_before": "norm_before", "adapter_down.0": ""} if theirs.ln_before else {}
        norms |= {"adapter_norm_after": "norm_after"} if theirs.ln_after else {}
        for name, ours in norms.items():
            for word in ("weight", "bias"):
                found[f"{name}.{word}"] = (ours and f"{ours}.{word}", (d_model,))
        for name, ours, d_in, d_out in ((down, "down", d_model, width), ("adapter_up", "up", width, d_model)):
            found |= (
                self._phm(name, ours, d_in, d_out)
                if theirs.phm_layer
                else {
                    f"{name}.weight": (f"{ours}.weight", (d_out, d_in)),
                    f"{name}.bias": (f"{ours}.bias", (d_out,)),
                }
            )
        if isinstance(theirs.scaling, str):
            found["scaling"] = ("scale", (1,) if theirs.scaling == "learned" else (d_model,))
        if theirs.use_gating:
            found |= {"gate.weight": ("gate.weight", (1, d_model)), "gate.bias": ("gate.bias", (1,))}
        return found

    def _phm(self, name: str, ours: str, d_in: int, d_out: int) -> Names:
        theirs = self.theirs
        found: Names = {f"{name}.b": (f"{ours}.bias", (d_out,))} if theirs.phm_bias else {}
        if not theirs.shared_phm_rule:
            found |= {f"{name}.{w}": (f"{ours}.rule.{o}", shape) for w, (o, shape) in self._rule().items()}
        if not theirs.shared_W_phm:
            factors = self._factors(d_in, d_out)
            found |= {f"{name}.W{w}": (f"{ours}.factors.{o}", shape) for w, (o, shape) in factors.items()}
        return found

    def _rule(self) -> Names:
        n = self.theirs.phm_dim
        if self.theirs.factorized_phm_rule:
            return {"phm_rule_left": ("left", (n, n, 1)), "phm_rule_right": ("right", (n, 1, n))}
        return {"phm_rule": ("rule", (n, n, n))}

    def _factors(self, d_in: int, d_out: int) -> Names:
        n, rank = self.theirs.phm_dim, self.theirs.phm_rank
        if self.theirs.factorized_phm_W:
            return {"_left": ("left", (n, d_in // n, rank)), "_right": ("right", (n, rank, d_out // n))}
        return {"": ("W", (n, d_in // n, d_out // n))}

    def shared_wanted(self) -> Shapes:
        first = next(iter(self.branches), None)
        names = self._shared_names(first) if self.shares and first is not None else {}
        return {name: shape for name, (_, shape) in names.items()}

    def _shared_names(self, address: str) -> Names:
        """Every tensor that the branches of one base model share."""
        d_model, width = (self.branches[address].shape or (1, 1))[0], self._width(address)
        names: Names = {}
        if self.theirs.shared_phm_rule:
            names |= {w: (f"rule.{o}", shape) for w, (o, shape) in self._rule().items()}
        if self.theirs.shared_W_phm:
            for side, d_in, d_out in (("down", d_model, width), ("up", width, d_model)):
                factors = self._factors(d_in, d_out)
                names |= {f"W_{side}{w}": (f"{side}.{o}", shape) for w, (o, shape) in factors.items()}
        return names

    def _shared(self, given: Keyed, base: str | None, address: str) -> dict[str, Any]:
        """What the branches of one base model share."""
        names = self._shared_names(address)
        if base is None or given.shared[base].keys() != names.keys():
            message = (
                "the file lacks Compacter's shared tensors, which AdapterHub does not save from a base model "
                "class"
            )
            hint = "save from a class with a head"
            raise FileFormatError(Problem("shared-not-saved", message, address, hint=hint))
        for name, (_, shape) in names.items():
            if tuple(given.shared[base][name].shape) != shape:
                found = tuple(given.shared[base][name].shape)
                message = f"has shape {found}, {shape} was expected"
                raise FileFormatError(Problem("other-shape", message, f"shared_parameters.{name}"))
        return {ours: given.shared[base][name] for name, (ours, _) in names.items()}
