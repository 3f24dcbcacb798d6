"""Prefixes inside attention: keys and values come before those of the tokens, behind rotation and cache.

Three ways to a core, decided by its class. Interface: its forward looks the attention function up by the
config; it is shown a config under which it finds one that puts the prefix first. Method: the interface file
names the method that computes attention; the swapped class overrides it. Else whatever its forward calls is
watched: see intercept.py.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention.bias import causal_lower_right

from adapterkit.errors import PlanError, Problem
from adapterkit.inject import lanes
from adapterkit.inject.intercept import Intercept
from adapterkit.inject.prefix import Prefix
from adapterkit.runtime import Step
from adapterkit.spec.schema import Kernel

IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention")
_EAGER = "eager_attention_forward"
_NAME = "adapterkit:"


@dataclass(frozen=True)
class Route:
    """How the attention functions of a class are found."""

    interface: Any
    """The AttentionInterface of its source file."""
    eager: Callable[..., Any]
    """The function that the class takes where the config says eager."""


# ------------------------------------------------------------------------------------------ the swapped class


def namespace(base: type[nn.Module], kernel: Kernel | None, eager: str | None) -> dict[str, Any]:
    """What the swapped class of an attention core has beside its forward; nothing for other modules."""
    # a class that has lost its own method, in a newer version, computes attention in one of the other ways
    if kernel is not None and hasattr(base, kernel.method):
        return {"_adapterkit_routed": True, kernel.method: _method(getattr(base, kernel.method), kernel)}
    route = _route(base.forward, eager)
    if route is None:
        return {"_adapterkit_routed": False}
    for implementation in IMPLEMENTATIONS:
        route.interface.register(_NAME + implementation, _FUNCTIONS[implementation])
    return {"_adapterkit_routed": True, "_adapterkit_route": route, "config": property(_config, _set_config)}


def _route(forward: Callable[..., Any], eager: str | None) -> Route | None:
    """The attention interface that a forward looks up, None if it looks up none."""
    function = inspect.unwrap(forward)
    code = getattr(function, "__code__", None)
    names = set(_names(code)) if code is not None else set()
    if "_attn_implementation" not in names or "config" not in names:
        return None
    constants = () if code is None else code.co_consts
    if any(set(words) <= {*IMPLEMENTATIONS} for words in constants if isinstance(words, tuple) and words):
        return None  # it does more under some names, of which ours is none: the choice of a sparse mask
    found = {name: function.__globals__[name] for name in names if name in function.__globals__}
    interfaces = [value for value in found.values() if hasattr(value, "get_interface")]
    eagers = [found[name] for name in found if (name == eager if eager else name.endswith(_EAGER))]
    return Route(interfaces[0], eagers[0]) if len(interfaces) == len(eagers) == 1 else None


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


class _View:
    """A config as a core sees it in its forward: only the name of the attention function is another."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def _attn_implementation(self) -> str:
        name = self.config._attn_implementation or "eager"
        if name not in IMPLEMENTATIONS:
            message = f"prefix tuning does not work with the attention function {name!r}"
            expected = f"model.set_attn_implementation with one of {', '.join(IMPLEMENTATIONS)}"
            raise PlanError(Problem("attention-function", message, expected=expected))
        return _NAME + name

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["config"], name)


def _config(self: Any) -> Any:
    # kept at the site as well: compilers before torch 2.13 take `self.__dict__["config"]` for this property
    found = self.adapterkit.host_config
    return found if current(self) is None else _View(found)


def _set_config(self: Any, value: Any) -> None:
    self.__dict__["config"] = self.adapterkit.__dict__["host_config"] = value


# ----------------------------------------------------------------------------------------------- the forward


def current(core: Any) -> Prefix | None:
    """The prefix of the call of a core that runs in this thread."""
    site = core.adapterkit
    found: Prefix | None = site.runtime.override.flow.get(f"{site.key}.prefix")
    return found


def run(original: Callable[..., Any], steps: tuple[Step, ...], core: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of a core with the prefixes of these units, in order.

    Raises: PlanError: attention was computed in a way that is not seen, so that the prefix took no part.
    """
    site = core.adapterkit
    x = args[0] if args else next(iter(kwargs.values()))
    state = lanes.kernel(steps, x, core)
    if state is None:
        return original(core, *args, **kwargs)
    prefix = Prefix(*state)
    flow, place = site.runtime.override.flow, f"{site.key}.prefix"
    shared = _shift(prefix, site, steps, flow, x.shape[1])
    flow[place] = prefix
    try:
        if type(core)._adapterkit_routed:
            out = original(core, *args, **kwargs)
        else:
            with Intercept(prefix, x.shape[0]):
                out = original(core, *args, **kwargs)
    finally:
        del flow[place]
    if shared and prefix.bias is not None:
        flow[shared] = prefix.bias
    if not prefix.hits:
        message = (
            f"attention is not computed in {site.key} ({type(core).__name__}), or in a way that is not seen"
        )
        expected = (
            "a core that calls the attention interface, its 'kernel' method, or matmul, softmax and matmul"
        )
        raise PlanError(Problem("attention-not-hit", message, expected=expected))
    return out


def _shift(prefix: Prefix, site: Any, steps: tuple[Step, ...], flow: dict[str, Any], queries: int) -> str:
    """Whether the bias of relative positions counts the prefix; where its columns are kept for later layers.

    Raises: PlanError: only some of the prefixes want it; the first layer, which makes the bias, has none.
    """
    units = [site._modules[key] for key in lanes.keys(steps)]
    wanted = {unit.shifts for unit in units}
    if not any(wanted):
        return ""
    shared, makes = str(units[0].location), units[0].makes_bias
    if makes:
        flow.pop(shared, None)
        prefix.shifts = True
    else:
        prefix.bias = flow.get(shared)
    fits = makes or (prefix.bias is not None and prefix.bias.shape[-2:] == (queries, prefix.length))
    if len(wanted) > 1 or not fits:
        message = "the bias of relative positions is shifted by prefixes of the same length in all layers"
        raise PlanError(Problem("uneven-bias", message, site.key))
    return shared


def shifted(original: Callable[..., Any]) -> Callable[..., Any]:
    """A method that makes a bias (1, H, Q, T) for numbers of queries and keys, told of the prefix's keys.

    Queries count from where they counted before; the keys of tokens come behind those of the prefix.
    """

    def method(self: Any, queries: int, keys: int, *args: Any, **kwargs: Any) -> Any:
        prefix = current(self)
        if prefix is None or not prefix.shifts:
            return original(self, queries, keys, *args, **kwargs)
        whole = original(self, queries, keys + prefix.length, *args, **kwargs)
        prefix.bias = whole[..., : prefix.length]
        return whole[..., prefix.length :]

    return method


# -------------------------------------------------------------------------------------- attention functions

Columns = tuple[torch.Tensor, torch.Tensor, Any]
"""Keys (B, K, T, E_k), values (B, K, T, E_v) and what masks them."""


def _causal(
    prefix: Prefix,
    module: nn.Module,
    length: int,
    key: torch.Tensor,
    value: torch.Tensor,
    given: dict[str, Any],
) -> Columns:
    """What `is_causal` tells sdpa, as a mask: the flag would let the first query see the first key only."""
    causal = given.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if not causal or length == 1:
        return key, value, prefix.unmasked(key.shape[2], torch.bool)
    # the prompt in a static cache: what lies behind it is still empty, and transformers cuts it off as well
    key, value, bias = key[:, :, :length], value[:, :, :length], given.get("position_bias")
    # under autocast the queries and keys may be wider than the values, which this form of a mask refuses
    if bias is None and prefix.visible is None and key.dtype == value.dtype:
        return key, value, causal_lower_right(length, prefix.length + length)
    if bias is not None:
        given["position_bias"] = bias[..., :length]
    visible = torch.ones(length, prefix.length + length, dtype=torch.bool, device=key.device)
    visible, own = visible.tril(prefix.length), prefix.unmasked(length, torch.bool)
    return key, value, visible if own is None else visible & own


def _block_mask(prefix: Prefix, mask: Any) -> Any:
    """A mask of flex attention with columns for the prefix, which every query of an example sees or none."""
    from torch.nn.attention.flex_attention import create_block_mask

    length, old, visible = prefix.length, mask.mask_mod, prefix.visible

    def mask_mod(b: Any, h: Any, q: Any, k: Any) -> Any:
        own = k < length
        if visible is not None:
            own = own & visible[b, k.clamp(max=length - 1)]
        return own | ((k >= length) & old(b, h, q, (k - length).clamp(min=0)))

    rows, heads = mask.kv_num_blocks.shape[:2]
    rows = rows if visible is None else visible.shape[0]
    queries, keys = mask.seq_lengths
    device = str(mask.kv_num_blocks.device)
    return create_block_mask(mask_mod, rows, heads, queries, keys + length, device, mask.BLOCK_SIZE)


def _rows_mask(prefix: Prefix, queries: int, keys: int) -> Any:
    """The same where the model has no mask."""
    from torch.nn.attention.flex_attention import create_block_mask

    visible = prefix.unmasked(keys, torch.bool)
    assert visible is not None

    def mask_mod(b: Any, h: Any, q: Any, k: Any) -> Any:
        return visible[b, 0, 0, k]

    device = str(visible.device)
    return create_block_mask(mask_mod, visible.shape[0], None, queries, prefix.length + keys, device)


def _function(implementation: str) -> Callable[..., Any]:
    """The attention function under a name of ours: that of `implementation`, given the module's prefix."""

    def attention(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        route, prefix = type(module)._adapterkit_route, current(module)
        assert prefix is not None
        if isinstance(attention_mask, torch.Tensor):
            mask = prefix.extended(attention_mask)
        elif attention_mask is not None:
            mask = _block_mask(prefix, attention_mask)
        elif implementation == "sdpa":
            key, value, mask = _causal(prefix, module, query.shape[2], key, value, kwargs)
        elif implementation == "eager":
            mask = prefix.unmasked(key.shape[2], query.dtype)
        elif prefix.visible is not None:
            mask = _rows_mask(prefix, query.shape[2], key.shape[2])
        else:
            mask = None
        if kwargs.get("position_bias") is not None:
            kwargs["position_bias"] = prefix.biased(kwargs["position_bias"])
        key, value = prefix.before(key, value)
        function = route.interface.get_interface(implementation, route.eager)
        out, weights = function(module, query, key, value, mask, *args, **kwargs)
        return out, prefix.stripped(weights) if implementation == "eager" else weights

    return attention


_FUNCTIONS = {implementation: _function(implementation) for implementation in IMPLEMENTATIONS}


# ------------------------------------------------------------------------------------------ a method by name


def _method(original: Callable[..., Any], kernel: Kernel) -> Callable[..., Any]:
    """A method of the core that computes attention from q, k, v and a mask, with the prefix put first."""
    parameters = list(inspect.signature(original).parameters)[1:]
    names = dict(zip(kernel.args, parameters, strict=False))

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        prefix = current(self)
        if prefix is None:
            return original(self, *args, **kwargs)
        given = {**dict(zip(parameters, args, strict=False)), **kwargs}
        given[names["k"]], given[names["v"]] = prefix.before(given[names["k"]], given[names["v"]])
        if "mask" in names:
            mask, key = given.get(names["mask"]), given[names["k"]]
            masked = prefix.extended(mask) if mask is not None else None
            given[names["mask"]] = (
                prefix.unmasked(key.shape[2] - prefix.length, key.dtype) if mask is None else masked
            )
        out = original(self, **given)
        return (out[0], *map(prefix.stripped, out[1:])) if isinstance(out, tuple) else out

    return method
