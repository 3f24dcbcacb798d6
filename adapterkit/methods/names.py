"""Names of methods -> configs: plain names, shorthands such as "lora[r=4]", dicts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import yaml
from pydantic import ValidationError

from adapterkit.errors import ConfigError, Problem, did_you_mean, listing
from adapterkit.methods.base import MethodConfig
from adapterkit.methods.bottleneck import BottleneckConfig
from adapterkit.methods.compacter import CompacterConfig
from adapterkit.methods.dora import DoRAConfig, DVoRAConfig
from adapterkit.methods.fusion import FusionConfig
from adapterkit.methods.ia3 import IA3Config
from adapterkit.methods.invertible import InvertibleConfig
from adapterkit.methods.lora import LoRAConfig
from adapterkit.methods.mtl_lora import MTLLoRAConfig
from adapterkit.methods.prefix import PrefixTuningConfig
from adapterkit.methods.prompt import PromptTuningConfig
from adapterkit.methods.reft import ReFTConfig
from adapterkit.methods.silence import SilenceConfig
from adapterkit.methods.union import UnionConfig, union
from adapterkit.methods.vera import VeRAConfig

# the parser of libyaml, where PyYAML was built with it, is ten times faster
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

METHODS: dict[str, type[MethodConfig]] = {
    config.method: config
    for config in (
        LoRAConfig,
        IA3Config,
        VeRAConfig,
        DoRAConfig,
        DVoRAConfig,
        MTLLoRAConfig,
        BottleneckConfig,
        CompacterConfig,
        ReFTConfig,
        PromptTuningConfig,
        PrefixTuningConfig,
        InvertibleConfig,
        SilenceConfig,
        UnionConfig,
        FusionConfig,
    )
}

_SEQUENTIAL = {"locations": ("mlp",), "original_ln_before": True}
_PARALLEL = {
    "locations": ("mlp",),
    "reduction_factor": 2.0,
    "is_parallel": True,
    "init_weights": "mam_adapter",
    "scaling": 4.0,
}
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "seq_bn": ("bottleneck", _SEQUENTIAL),
    "double_seq_bn": ("bottleneck", {"non_linearity": "silu"}),
    "par_bn": ("bottleneck", _PARALLEL),
    "scaled_par_bn": ("bottleneck", {**_PARALLEL, "scaling": "learned"}),
    "adapterplus": (
        "bottleneck",
        {
            "locations": ("mlp",),
            "reduction_factor": 96.0,
            "non_linearity": "gelu",
            "original_ln_before": True,
            "original_ln_after": False,
            "residual_before_ln": False,
            "scaling": "channel",
            "init_weights": "houlsby",
            "stochastic_depth": 0.1,
        },
    ),
    "compacter++": ("compacter", {"locations": ("mlp",)}),
    "seq_bn_inv": ("union", {"configs": ("seq_bn", "invertible")}),
    "double_seq_bn_inv": ("union", {"configs": ("double_seq_bn", "invertible")}),
    "prefix_tuning_flat": ("prefix_tuning", {"flat": True}),
    "mam": ("union", {"configs": ("prefix_tuning[bottleneck_size=800]", "par_bn")}),
    "unipelt": (
        "union",
        {
            "configs": (
                "prefix_tuning[prefix_length=10, use_gating=true]",
                "seq_bn[use_gating=true]",
                "lora[gating=true]",
            )
        },
    ),
    "loreft": ("reft", {}),
    "noreft": ("reft", {"orthogonal": False}),
    "direft": ("reft", {"orthogonal": False, "subtract_projection": False}),
}
"""Names with options of their own: name -> (method, options)."""

LEGACY = {
    "pfeiffer": "seq_bn",
    "houlsby": "double_seq_bn",
    "parallel": "par_bn",
    "scaled_parallel": "scaled_par_bn",
    "pfeiffer+inv": "seq_bn_inv",
    "houlsby+inv": "double_seq_bn_inv",
}
"""Names that AdapterHub used before."""


_WHOLE = re.compile(r"(0|[1-9][0-9]{0,8})\Z", re.ASCII)


def parse(method: str | Mapping[str, Any] | MethodConfig) -> MethodConfig:
    """The config of a method given by name, shorthand, dict or as it is.

    Raises: ConfigError: unknown name or option, wrong value.
    """
    if isinstance(method, MethodConfig):
        return method
    if isinstance(method, str):
        return _from_text(method)
    if isinstance(method, Mapping):
        given = dict(method)
        if "method" not in given:
            found = f"the dict names no method: its keys are {listing(map(str, given))}"
            raise ConfigError(Problem("unknown-method", found, "", "{'method': 'lora', 'r': 4}, say"))
        return _make(str(given.pop("method")), given)
    kind = type(method).__name__
    raise ConfigError(Problem("unknown-method", f"a method is a name, a dict or a config, not {kind}"))


@lru_cache(256)  # configs are never changed
def _from_text(text: str) -> MethodConfig:
    return union([_shorthand(part) for part in _split(text, "|")])


def _shorthand(text: str) -> MethodConfig:
    name, bracket, rest = text.strip().partition("[")
    if not bracket:
        return _make(name, {})
    if not rest.endswith("]"):
        raise ConfigError(
            Problem("bad-shorthand", f"{text!r} has no closing ']'", expected="such as 'lora[r=4,alpha=8]'")
        )
    given = {}
    for item in filter(str.strip, _split(rest[:-1])):
        key, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(
                Problem("bad-shorthand", f"{item!r} is not option=value", expected="such as 'lora[r=4]'")
            )
        if key.strip() in given:
            raise ConfigError(Problem("bad-shorthand", f"{key.strip()!r} is given twice"))
        try:
            # a whole number, the usual case, needs no loader
            given[key.strip()] = int(value) if _WHOLE.match(value) else yaml.load(value, Loader=_Loader)
        except yaml.YAMLError:
            raise ConfigError(Problem("bad-shorthand", f"the value of {item!r} cannot be read")) from None
    return _make(name, given)


def _split(text: str, mark: str = ",") -> list[str]:
    """Cut at marks that stand outside brackets."""
    items, depth, start = [], 0, 0
    for at, letter in enumerate(text):
        depth += (letter in "[({") - (letter in "])}")
        if letter == mark and not depth:
            items.append(text[start:at])
            start = at + 1
    return [*items, text[start:]]


def _make(name: str, given: dict[str, Any]) -> MethodConfig:
    name = LEGACY.get(name, name)
    method, options = PRESETS.get(name, (name, {}))
    config = METHODS.get(method)
    if config is None:
        known = (*METHODS, *PRESETS)
        message = f"there is no method {name!r}"
        hint = did_you_mean(name, known)
        raise ConfigError(Problem("unknown-method", message, "", f"one of {listing(known, 40)}", hint))
    if "configs" in options and given.keys() - {"configs"}:
        parts = "|".join(map(str, options["configs"]))
        message = f"{name} has no options of its own"
        raise ConfigError(Problem("unknown-option", message, "", f"options of its parts: {parts!r}"))
    return validate(config, {**options, **given})


def validate(config: type[MethodConfig], given: Mapping[str, Any]) -> MethodConfig:
    """A config of this class from plain values, with our errors."""
    try:
        return config.model_validate(given)
    except ValidationError as error:
        raise ConfigError(_problem(config, item) for item in error.errors(include_url=False)) from None


def _problem(config: type[MethodConfig], item: Any) -> Problem:
    where = ".".join(str(part) for part in item["loc"][:1])
    if item["type"] == "extra_forbidden":
        message = f"{config.method} has no option {where!r}"
        known = list(config.model_fields)
        return Problem(
            "unknown-option", message, "", f"options: {listing(known, 30)}", did_you_mean(where, known)
        )
    reason = item["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    if not where:
        return Problem("bad-option", f"{config.method}: {reason}")
    return Problem("bad-option", f"{config.method}: {item['input']!r} does not fit {where!r}", where, reason)
