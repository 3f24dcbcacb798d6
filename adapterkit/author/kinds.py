"""What the layers of a column have in common, and how those differ that do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from adapterkit.author.describe import Words

_PARTS: Mapping[str, tuple[str, ...]] = {
    "attention": ("branch", "core", "q", "k", "v", "o"),
    "cross_attention": ("branch", "core", "q", "k", "v", "o"),
    "mlp": ("branch", "gate", "up", "down"),
}
"""What a layer is without that lacks a sublayer."""


def share_norm(told: list[Words]) -> Words:
    """The one norm before both branches of a parallel block, taken out of them."""
    norms = {one.get(word, {}).get("norm", {}).get("before") for one in told for word in ("attention", "mlp")}
    if len(norms) != 1 or None in norms:
        return {}
    for one in told:
        for word in ("attention", "mlp"):
            norm = one[word]["norm"]
            del norm["before"]
            if not norm:
                del one[word]["norm"]
    return {"shared_norm": norms.pop()}


def kinds_of(config: Any, told: list[Words]) -> Words:
    """The sublayers of all layers; those that differ by the kind of a layer, or as alternatives."""
    common = {word: told[0][word] for word in told[0] if all(one.get(word) == told[0][word] for one in told)}
    differing = [w for w in ("attention", "cross_attention", "mlp") if any(w in one for one in told)]
    differing = [word for word in differing if word not in common]
    if not differing:
        return common
    by = _field(config, [{w: one[w] for w in differing if w in one} for one in told])
    if by is not None:
        name, values = by
        kinds: Words = {}
        for value, one in zip(values, told, strict=True):
            kinds.setdefault(str(value), {w: one[w] for w in differing if w in one})
        return {**common, "kinds": {"by": name, "of": kinds}}
    for word in differing:
        options: list[Words] = []
        for one in told:
            if word in one and one[word] not in options:
                options.append(one[word])
        options = [_told_apart(word, one, options) for one in options]
        if not all(word in one for one in told):
            options.append({"without": dict.fromkeys(_PARTS[word], "the layer has no such part")})
        common[word] = {"any_of": options} if len(options) > 1 else options[0]
    return {word: common[word] for word in ("attention", "cross_attention", "mlp") if word in common}


def _told_apart(word: str, option: Words, options: list[Words]) -> Words:
    """An alternative that says which roles it has not, but others have: else it would fit where they do."""
    lacking = [
        role
        for role in _PARTS[word]
        if role != "branch" and not _has(option, role) and any(_has(other, role) for other in options)
    ]
    if not lacking:
        return option
    reasons = dict.fromkeys(lacking, "no module of such a layer gives it alone")
    return option | {"without": reasons | option.get("without", {})}


def _has(option: Words, role: str) -> bool:
    return role in option or role in option.get("fused", {}).get("order", ())


def _field(config: Any, told: list[Words]) -> tuple[str, list[Any]] | None:
    """The list in the config that has one value for each kind of layer."""
    for name, values in _items(config):
        if not isinstance(values, list | tuple) or len(values) != len(told):
            continue
        if not all(isinstance(value, str | int | bool) for value in values):
            continue
        by: dict[str, Words] = {}
        if all(by.setdefault(str(v), one) == one for v, one in zip(values, told, strict=True)):
            return name, list(values)
    return None


def _items(config: Any) -> Iterable[tuple[str, Any]]:
    if config is None:
        return ()
    public = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    # lists that a config computes are properties
    for name in dir(type(config)):
        if name.endswith(("types", "type")) and name not in public and not name.startswith("_"):
            try:
                public[name] = getattr(config, name)
            except Exception:  # a property of another class of configs
                continue
    return public.items()
