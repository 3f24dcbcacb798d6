"""Binding what the spec says of a layer to the modules of a layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import nn

from adapterkit.model import layouts, linear
from adapterkit.model.blueprint import Slot
from adapterkit.model.scope import ITSELF, MISSING, Draft, Found, Here
from adapterkit.model.walk import child, plain
from adapterkit.spec.schema import Attention, Layer, Sizes, Stack, Sublayer
from adapterkit.spec.text import Loc

ROLES: dict[str, tuple[str, ...]] = {
    "attention": ("q", "k", "v", "o"),
    "cross_attention": ("q", "k", "v", "o"),
    "mlp": ("gate", "up", "down"),
}
# attributes under which attention modules keep head counts, where no config shows them
_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "heads")
_GROUPS = "num_key_value_groups"  # query heads for one key/value head
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads")


def bind_layer(here: Here, stack: Stack, kind: str | None) -> None:
    """Bind one layer; `here.root` is the layer."""
    own: Layer | None = stack.kinds.of[kind] if stack.kinds and kind is not None else None
    add_place(here, f"{here.address}.layer", Found(here.root, here.path, ITSELF))
    shared = here.find(stack.shared_norm, "shared_norm")
    if shared:
        add_place(here, f"{here.address}.norm.before", shared)
    for word in ROLES:
        special = own is not None and word in own.model_fields_set
        sublayer: Sublayer | None = getattr(own if special else stack, word)
        if sublayer is not None:
            words = ("kinds", "of", str(kind), word) if special else (word,)
            address = f"{here.address}.{word}"
            _choose(here.moved(loc=(*here.loc, *words), address=address, sublayer=word), sublayer)


def _choose(here: Here, said: Sublayer) -> None:
    """One branch of one layer, through its alternatives."""
    options: tuple[Sublayer, ...] = said.any_of or (said,)
    if not here.holds(said.when):
        # seen by its first name: nothing of it is needed
        if any(child(here.root, option.first) is not None for option in options if option.first):
            here.unexpected(str(here.sublayer), said.when)
        return
    tried = []
    for index, option in enumerate(options):
        place = here if option is said else here.at("any_of", index)
        if option is not said and option.when is not None and not place.holds(option.when):
            continue
        trial = Draft()
        _bind(place.drafting(trial), option)
        tried.append(trial)
    complete = [trial for trial in tried if not trial.problems]
    complete = [trial for trial in complete if not any(_does_without(trial, o) for o in complete)]
    if said.optional is not None:
        here.draft.presence.setdefault((here.loc, str(here.sublayer)), set()).add(bool(complete))
        # nothing of it is there: absent, not misspelt
        if not complete and not any(trial.slots for trial in tried):
            return
    if len(complete) == 1:
        here.draft.absorb(complete[0])
    elif complete:
        here.note(
            "ambiguous",
            "more than one alternative fits",
            "expected exactly one on each layer",
            words=("any_of",),
        )
    elif tried:
        here.draft.absorb(min(tried, key=lambda trial: len(trial.problems)))
    else:
        here.note("no-alternative", "no alternative's 'when' holds for this config", words=("any_of",))


def _does_without(trial: Draft, other: Draft) -> bool:
    """Whether a trial is said to lack what another has found."""
    lacking, lacking_there = (
        {word for reasons in draft.without.values() for word in reasons} for draft in (trial, other)
    )
    has = {slot.role for slot in other.slots.values()} | ({"branch"} - lacking_there)
    return not lacking.isdisjoint(has)


def _bind(here: Here, said: Sublayer) -> None:
    core = here.find(said.core, "core") if isinstance(said, Attention) else None
    for name, path in said.points:
        found = core if name == "core" else here.find(path, *name.split("."))
        if found:
            add_place(here, f"{here.address}.{name}", found)
    for role in ROLES[str(here.sublayer)]:
        found = here.find(getattr(said, role, None), role)
        if found:
            add_slot(here, role, found, (role,))
    for extra, path in said.extra.items():
        found = here.find(path, "extra", extra)
        if found:
            add_slot(here, extra, found, ("extra", extra))
    if said.without:
        here.draft.without[here.address] = {str(word): why for word, why in said.without.items()}
    if said.scale is not None:
        _bind_scale(here, said.scale)
    if isinstance(said, Attention) and (core or said.fused or not said.without):
        bias = here.find(said.position_bias, "position_bias")
        if bias:
            add_place(here, f"{here.address}.position_bias", bias)
        word = str(here.sublayer)
        here.draft.kernels[word], here.draft.eager[word] = said.kernel, said.eager
        if said.kernel is not None and core is not None:
            _check_kernel(here, said.kernel.method, core)
        heads, dims = _head_sizes(here.at("sizes"), said.sizes, core)
        for key in (word, here.address):  # layers of one stack may differ
            here.draft.sizes[key], here.draft.head_dims[key] = heads, dims
    if said.fused is not None:
        host = here.find(said.fused.path, "fused", "path")
        if host:
            _bind_fused(here.at("fused"), said, host)


def add_place(here: Here, address: str, found: Found) -> None:
    """Name a place of the forward pass."""
    batch = found.said.batch or here.batch or "first"
    here.draft.places[address] = Slot(
        address,
        address.rpartition(".")[2],
        here.stack,
        here.layer,
        here.sublayer,
        found.module,
        found.path,
        batch=batch,
        was=found.said.was,
    )


def add_slot(here: Here, role: str, found: Found, words: Loc) -> Slot | None:
    """Add a linear slot; a weight that is used without calling its module is refused."""
    size = here.ask(found.module, found.path, _shape)
    if size is None:
        what = f"{found.path} is a {type(found.module).__name__}"
        expected = "expected a linear map: Linear, Conv1D or one of their quantised kinds"
        here.note("not-linear", what, expected, words=words)
        return None
    if isinstance(_parent(here, found), nn.MultiheadAttention):
        what = f"{found.path} belongs to nn.MultiheadAttention, which uses its weight without calling it"
        here.note(
            "weight-without-call", what, "expected a module that is called in the forward pass", words=words
        )
        return None
    slot = Slot(
        f"{here.address}.{role}",
        role,
        here.stack,
        here.layer,
        here.sublayer,
        found.module,
        found.path,
        size,
        None,
        linear.is_transposed(found.module),
        found.said.batch or here.batch or "first",
        found.said.was,
    )
    here.draft.slots[slot.address] = slot
    return slot


def _shape(module: nn.Module, name: str) -> tuple[int, int] | None:
    return linear.shape(module)


def _parent(here: Here, found: Found) -> nn.Module | None:
    above, _, _ = found.path.removeprefix(here.path).strip(".").rpartition(".")
    return child(here.root, above) if above else here.root


def _check_kernel(here: Here, method: str, core: Found) -> None:
    if not callable(getattr(type(core.module), method, None)):
        what = f"{core.path} ({type(core.module).__name__}) has no method {method!r}"
        here.note(
            "no-kernel", what, "expected the method that computes attention", words=("kernel", "method")
        )


def _bind_fused(here: Here, said: Sublayer, host: Found) -> None:
    """The fused matrix as a slot of its own, and each of its roles as a stretch of its rows."""
    whole = add_slot(here, "fused", host, ("path",))
    if whole is None or whole.shape is None or said.fused is None:
        return
    heads = here.draft.sizes.get(here.address, (None, None))
    core = here.draft.places.get(f"{here.address}.core")
    holders = _Holders(here, Found(core.module, core.path, ITSELF) if core else None)
    widths = {
        role: holders.said(here.at("widths", role), said) or 0 for role, said in said.fused.widths.items()
    }
    if 0 in widths.values():
        return
    try:
        rows = layouts.split(
            whole.shape[0], said.fused.layout, said.fused.order, *heads, widths, said.fused.groups
        )
    except ValueError as error:
        here.note(
            "bad-layout", f"{host.path}: {error}", "expected rows as 'layout' and 'order' say", "see 'sizes'"
        )
        return
    for role in said.fused.roles:
        stretch = rows[role]
        here.draft.slots[f"{here.address}.{role}"] = whole.moved(
            address=f"{here.address}.{role}",
            role=role,
            shape=(stretch.total, whole.shape[1]),
            rows=stretch,
        )


def usual_heads(config: Any, core: nn.Module | None) -> tuple[int | None, int | None]:
    """(query heads, key/value heads) that core or config show under the usual names."""
    heads, kv_heads = (
        next(_whole(attribute(holder, name) for holder in (core, config) for name in names), None)
        for names in (_HEADS, _KV_HEADS)
    )
    each = next(_whole([attribute(core, _GROUPS)]), 1)
    return heads, kv_heads or (heads // each if heads else None)


def attribute(holder: Any, name: str) -> Any:
    """An attribute of a config or core; None too if it differs from layer to layer."""
    try:
        return getattr(holder, name, None)
    except RuntimeError:  # such a config refuses to give one value for all
        return None


def _whole(values: Iterable[Any]) -> Iterator[int]:
    return (value for value in values if isinstance(value, int) and not isinstance(value, bool))


class _Holders:
    """Where sizes may be found: the module that computes attention, and the config."""

    def __init__(self, here: Here, core: Found | None) -> None:
        self.here, self.core = here, core

    def of_core(self, name: str) -> Any:
        if self.core is None:
            return None
        return self.here.ask(self.core.module, self.core.path, plain, name)

    def find(self, names: tuple[str, ...]) -> int | None:
        """What the core, else the config, has under one of the names.

        The core knows best: a config may speak of another stack, of most layers, or of what it does not use.
        """
        return next(_whole(chain(map(self.of_core, names), map(self.here.setting, names))), None)

    def said(self, here: Here, said: int | str) -> int | None:
        """A size that the spec says: a number, or the name of an attribute of the core or of the config."""
        if isinstance(said, int):
            return said
        number = self.find((said,))
        if number is None:
            fact = f"neither the config nor the core has a whole number {said!r}"
            here.note("unknown-config-field", fact)
        return number


def _head_sizes(
    here: Here, said: Sizes | None, core: Found | None
) -> tuple[tuple[int | None, int | None], tuple[int | None, int | None]]:
    """(query heads, key/value heads), (width of a head, of one of the values): said, or shown by the two."""
    holders = _Holders(here, core)

    def look(word: str, usual: tuple[str, ...]) -> int | None:
        declared = getattr(said, word, None)
        return holders.find(usual) if declared is None else holders.said(here.at(word), declared)

    heads, head_dim = look("heads", _HEADS), look("head_dim", ())
    kv_heads = look("kv_heads", _KV_HEADS)
    if kv_heads is None and heads is not None:
        kv_heads = heads // (holders.find((_GROUPS,)) or 1)
    return (heads, kv_heads), (head_dim, look("value_dim", ()) or head_dim)


def _bind_scale(here: Here, said: float | str) -> None:
    """The factor of a branch: a number, else a field of the config, else an attribute of the layer."""
    layer = here.root
    value = here.setting(said) if isinstance(said, str) else said
    if isinstance(value, int | float) and not isinstance(value, bool):
        here.draft.scales[here.address] = float(value)
        return
    kind = here.ask(layer, here.path, _factor, str(said))
    if kind == "factor":
        here.draft.scales[here.address] = (layer, str(said))
    elif kind != "none":
        fact = f"neither the config nor the layer has a number {said!r}"
        here.note("unknown-config-field", fact, words=("scale",))


def _factor(layer: nn.Module, name: str) -> str:
    """Whether a layer has a factor under a name, or says that it has none."""
    found = getattr(layer, name, MISSING)
    if found is None:
        return "none"
    return "factor" if isinstance(found, int | float | torch.Tensor) else "no number"
