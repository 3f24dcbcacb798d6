"""Known interfaces that are near a draft: what is left of the draft when it copies one of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from adapterkit.author import meaning
from adapterkit.errors import ResolveError, SpecError
from adapterkit.model.resolve import resolve
from adapterkit.spec import registry

Words = dict[str, Any]
Loc = tuple[str, ...]

CANDIDATES = 4
FEW = 1 / 3
"""A draft copies another interface if no more than this share of its words is left."""
_COMPARED = ("stacks", "heads", "between", "unsupported")
_OWN = ("adapterkit", "model_type", "source")


def shortened(model: nn.Module, data: Words) -> tuple[str, Words] | None:
    """(name, the draft as `like` that interface with its differences) of the nearest, if one is near."""
    whole = resolve(model, registry.load(data))
    wanted = meaning.facts(whole)
    target = _plain(data)
    size = len(list(_leaves(target["stacks"])))
    candidates = list(_candidates(target, data.get("model_type")))
    for name, _ in candidates:
        if _means(model, _file(data, name, {}), wanted):
            return name, _file(data, name, {})
    ranked = sorted(candidates, key=lambda one: len(list(_leaves(one[1]))))
    best: tuple[str, Words] | None = None
    for name, difference in ranked[:CANDIDATES]:
        small = _pruned(model, data, name, difference, wanted)
        if small is None:
            continue
        count = len(list(_leaves(small)))
        if count <= max(FEW * size, 2) and (best is None or count < len(list(_leaves(best[1])))):
            best = name, small
    if best is None:
        return None
    return best[0], _file(data, *best)


def _candidates(target: Words, model_type: Any) -> Iterator[tuple[str, Words]]:
    """Known interfaces with the same stacks, and what the target says otherwise; that of the type first."""
    own = registry.model_types().get(str(model_type))
    for entry in sorted(registry.known_files(), key=lambda entry: entry.name != own):
        try:
            base = _plain(registry.dump(registry.load(entry.path)))
        except SpecError:
            continue
        if set(base.get("stacks", {})) == set(target["stacks"]) and not base.get("parts"):
            yield entry.name, _difference(base, target)


def _plain(data: Mapping[str, Any]) -> Words:
    """What an interface says of modules, every module written in one way."""
    dumped = registry.dump(registry.load(dict(data)))
    return {key: value for key, value in dumped.items() if key in _COMPARED}


def _difference(base: Mapping[str, Any], target: Mapping[str, Any]) -> Words:
    """What merged over the base gives the target: as `like` merges."""
    found: Words = {}
    for key in dict.fromkeys((*base, *target)):
        if key not in target:
            if base[key] is not None:
                found[key] = None
        elif key not in base or not _mergeable(base[key], target[key]):
            if base.get(key) != target[key]:
                found[key] = target[key]
        else:
            inner = _difference(base[key], target[key])
            if inner:
                found[key] = inner
    return found


def _mergeable(low: Any, high: Any) -> bool:
    both = isinstance(low, Mapping) and isinstance(high, Mapping)
    return both and not {"any_of", "path"} & (low.keys() | high.keys())


def _pruned(
    model: nn.Module, data: Words, name: str, difference: Words, wanted: meaning.Facts
) -> Words | None:
    """The difference without what makes none on the model; None if all of it gives another meaning."""
    if not _means(model, _file(data, name, difference), wanted):
        return None
    for loc in sorted(_leaves(difference), key=len):
        trial = copy.deepcopy(difference)
        if _remove(trial, loc) and _means(model, _file(data, name, trial), wanted):
            difference = trial
    return difference


def _means(model: nn.Module, data: Words, wanted: meaning.Facts) -> bool:
    try:
        return meaning.facts(resolve(model, registry.load(data))) == wanted
    except (SpecError, ResolveError):
        return False


def _file(data: Words, name: str, difference: Words) -> Words:
    """The whole file, without a copy of blocks about foreign files, which speak of another family."""
    own = {key: data[key] for key in _OWN if key in data}
    base = registry.by_name(name)
    foreign = {"adapterhub": None} if base.adapterhub is not None else {}
    lacking = _difference(base.unsupported, data.get("unsupported", {}))
    lacking = {
        method: why for method, why in lacking.items() if why is None or method not in base.unsupported
    }
    cannot = {"unsupported": lacking} if lacking else {}
    return {**own, "like": name, **_short(difference), **cannot, **foreign}


def _short(value: Any) -> Any:
    """Modules that only have a path, as that path."""
    if isinstance(value, Mapping):
        if set(value) == {"path"}:
            return value["path"]
        return {key: _short(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_short(one) for one in value]
    return value


def _leaves(value: Any, loc: Loc = ()) -> Iterator[Loc]:
    """Where single words stand; what is replaced as a whole is one."""
    if isinstance(value, Mapping) and value and not {"any_of", "path"} & value.keys():
        for key, one in value.items():
            yield from _leaves(one, (*loc, key))
    else:
        yield loc


def _remove(data: Words, loc: Loc) -> bool:
    """Take a word out, and what is empty then; False if it is gone already."""
    holders = [data]
    for key in loc[:-1]:
        inner = holders[-1].get(key)
        if not isinstance(inner, dict):
            return False
        holders.append(inner)
    if not loc or loc[-1] not in holders[-1]:
        return False
    del holders[-1][loc[-1]]
    for key, holder, above in zip(loc[-2::-1], holders[:0:-1], holders[-2::-1], strict=True):
        if not holder:
            del above[key]
    return True
