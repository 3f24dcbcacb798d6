"""Our configs in AdapterHub's words: what `config` of their adapter_config.json says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adapterkit.errors import FileFormatError, Problem, listing
from adapterkit.files.adapterhub.bottleneck import COMPACTER
from adapterkit.files.adapterhub.places import Layer, layers
from adapterkit.methods.base import MethodConfig
from adapterkit.methods.bottleneck import BottleneckConfig
from adapterkit.methods.compacter import CompacterConfig
from adapterkit.methods.dora import DoRAConfig, DVoRAConfig
from adapterkit.methods.ia3 import IA3Config
from adapterkit.methods.invertible import InvertibleConfig
from adapterkit.methods.lora import LoRAConfig
from adapterkit.methods.mtl_lora import MTLLoRAConfig
from adapterkit.methods.prefix import PrefixTuningConfig
from adapterkit.methods.prompt import PromptTuningConfig
from adapterkit.methods.reft import ReFTConfig
from adapterkit.methods.silence import SilenceConfig
from adapterkit.methods.union import UnionConfig
from adapterkit.methods.vera import VeRAConfig
from adapterkit.model.blueprint import Blueprint, Slot

_SAME = (
    "non_linearity",
    "original_ln_before",
    "original_ln_after",
    "ln_before",
    "ln_after",
    "init_weights",
    "is_parallel",
    "scaling",
    "use_gating",
    "residual_before_ln",
    "adapter_residual_before_ln",
    "dropout",
    "stochastic_depth",
)
_PREFIX = (
    "flat",
    "prefix_length",
    "bottleneck_size",
    "non_linearity",
    "dropout",
    "encoder_prefix",
    "cross_prefix",
    "use_gating",
    "shared_gating",
)
_REFT = ("r", "prefix_positions", "suffix_positions", "tied_weights", "dropout", "non_linearity")


def spell(config: MethodConfig, slots: Sequence[Slot], blueprint: Blueprint) -> dict[str, Any]:
    """Their config for ours, as near as they can say it; whether it is the same is seen by reading it.

    Raises: FileFormatError: they have no such method.
    """
    members = config.members(slots) if isinstance(config, UnionConfig) else [(config, list(slots))]
    found: list[dict[str, Any]] = []
    for method, own in members:
        if isinstance(method, SilenceConfig):
            continue  # their library does it, without a word in the file
        if isinstance(method, InvertibleConfig):
            if not (found and found[-1].get("inv_adapter", "") is None):
                found.append(_without_bottlenecks())
            found[-1] |= _invertible(method, found[-1])
        else:
            found.append(_method(method, own, blueprint))
    if len(found) == 1:
        return found[0]
    if not found:
        raise unsaid("nothing of it")
    return {"architecture": "union", "configs": found}


def unsaid(what: str, where: str = "") -> FileFormatError:
    """The error for what their format cannot say."""
    return FileFormatError(Problem("not-in-format", f"AdapterHub's format cannot hold {what}", where))


def _method(config: MethodConfig, slots: Sequence[Slot], blueprint: Blueprint) -> dict[str, Any]:
    here = {(slot.stack, slot.layer) for slot in slots}
    everywhere = list(layers(blueprint))
    out = [layer.number for layer in everywhere if (layer.stack, layer.index) not in here]
    match config:
        case LoRAConfig() | IA3Config() | VeRAConfig():
            return _low_rank(config, slots, everywhere) | {"leave_out": out}
        case BottleneckConfig():
            return _bottleneck(config, slots, everywhere) | {"leave_out": out}
        case PrefixTuningConfig():
            found = {name: getattr(config, name) for name in _PREFIX}
            return {"architecture": "prefix_tuning", "leave_out": out, "init_weights_seed": None, **found}
        case PromptTuningConfig():
            return {
                "architecture": "prompt_tuning",
                "prompt_length": config.prompt_length,
                "prompt_init": "random_uniform",
                "prompt_init_text": None,
                "random_uniform_scale": config.random_uniform_scale,
                "combine": "prefix" if config.position == "before" else "prefix_after_bos",
                "init_weights_seed": None,
            }
        case ReFTConfig():
            if not config.subtract_projection:
                raise unsaid("a ReFT that does not subtract the projection: it would be loaded as NoReFT")
            found = {name: getattr(config, name) for name in _REFT}
            kept = [layer.number for layer in everywhere if (layer.stack, layer.index) in here]
            chosen = {"layers": kept if out else "all", "orthogonality": config.orthogonal}
            return {"architecture": "reft", "output_reft": True, "init_weights_seed": None, **found, **chosen}
    raise unsaid(f"the method {config.method!r}")


def _low_rank(
    config: LoRAConfig | IA3Config | VeRAConfig, slots: Sequence[Slot], everywhere: Sequence[Layer]
) -> dict[str, Any]:
    hubs = {(layer.stack, layer.index): layer.hub for layer in everywhere}
    named: set[str] = set()
    for slot in slots:
        hub, name = hubs.get((slot.stack, slot.layer or 0)), f"{slot.sublayer}.{slot.role}"
        if hub is not None and name in (hub.intermediate, hub.output):
            named.add("intermediate" if name == hub.intermediate else "output")
        elif slot.role in ("q", "k", "v") and slot.sublayer in ("attention", "cross_attention"):
            named.add(slot.role)
        else:
            raise unsaid(f"an adapter at {slot.address}", slot.address)
    found: dict[str, Any] = {
        "architecture": "mtl_lora" if isinstance(config, MTLLoRAConfig) else "lora",
        "selfattn_lora": bool(named & {"q", "k", "v"}),
        "intermediate_lora": "intermediate" in named,
        "output_lora": "output" in named,
        "attn_matrices": [role for role in ("q", "k", "v") if role in named],
        "composition_mode": "scale" if isinstance(config, IA3Config) else "add",
        "init_weights": "lora",
        "init_weights_seed": None,
        "use_dora": isinstance(config, DoRAConfig | DVoRAConfig),
        "vera_d": None,
        "vera_b": None,
        "use_gating": not isinstance(config, VeRAConfig) and config.gating,
        "dropout": 0.0 if isinstance(config, IA3Config) else config.dropout,
        "dtype": None,
    }
    if isinstance(config, IA3Config):
        return found | {"init_weights": "ia3", "r": 1, "alpha": config.alpha}
    if isinstance(config, VeRAConfig):
        alpha = config.alpha if config.alpha is not None else config.r
        found |= {"r": config.r, "alpha": alpha, "vera_d": config.d_initial, "vera_b": 0.0}
        return found | {"init_weights": "vera"}
    ranks = {(config.rank(slot), config.scaling(slot)) for slot in slots}
    if len(ranks) > 1:
        raise unsaid(f"several ranks or scales: {listing(map(str, sorted(ranks)))}", "r")
    rank, scaling = ranks.pop()
    if isinstance(config, MTLLoRAConfig):
        found |= {"n_up_projection": config.n_up, "weights_sharpness": config.sharpness}
        found |= {"task_specific_matrix_type": "singular_values"}
    return found | {"r": rank, "alpha": _plain(scaling * rank)}


def _plain(number: float) -> float:
    """A whole number as an int: theirs makes sizes of it."""
    return int(number) if number == int(number) else number


def _bottleneck(
    config: BottleneckConfig, slots: Sequence[Slot], everywhere: Sequence[Layer]
) -> dict[str, Any]:
    numbers = {f"{layer.stack}.{layer.index}": layer for layer in everywhere}
    words = set()
    for slot in slots:
        hub, sublayer = numbers[f"{slot.stack}.{slot.layer}"].hub, str(slot.sublayer)
        words.add(hub.locations.get(sublayer, sublayer))
    factor: Any = config.reduction_factor
    if isinstance(factor, Mapping):
        factors: dict[str, Any] = {}
        for slot in slots:
            own, number = _plain(config.factor(slot)), str(numbers[f"{slot.stack}.{slot.layer}"].number)
            if factors.setdefault(number, own) != own:
                raise unsaid("several reduction factors in one layer", slot.address)
        factor = factors | {"default": _plain(factor.get("default", 16))}
    else:
        factor = _plain(factor)
    found = {name: getattr(config, name) for name in _SAME}
    found |= {
        "mh_adapter": "attention" in words,
        "cross_adapter": "cross_attention" in words,
        "output_adapter": "mlp" in words,
        "reduction_factor": factor,
        "inv_adapter": None,
        "inv_adapter_reduction_factor": None,
        "init_weights_seed": None,
        "phm_layer": isinstance(config, CompacterConfig),
    }
    phm = config if isinstance(config, CompacterConfig) else CompacterConfig()
    found |= {name: getattr(phm, name) for name in COMPACTER}
    # how theirs would start them, and that they are trained
    starts = {"phm_c_init": "normal", "hypercomplex_nonlinearity": "glorot-uniform", "learn_phm": True}
    return found | starts


def _without_bottlenecks() -> dict[str, Any]:
    plain = _bottleneck(BottleneckConfig(), (), ())
    return plain | {"leave_out": [], "non_linearity": None}


def _invertible(config: InvertibleConfig, beside: Mapping[str, Any]) -> dict[str, Any]:
    if beside["non_linearity"] not in (None, config.non_linearity):
        raise unsaid("an invertible adapter with another activation than the bottleneck", "non_linearity")
    return {
        "inv_adapter": config.coupling,
        "inv_adapter_reduction_factor": config.reduction_factor,
        "non_linearity": config.non_linearity,
    }
