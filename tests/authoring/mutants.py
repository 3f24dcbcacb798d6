"""Mutants of an interface: one word swapped, dropped, moved or misnamed, in every way the language has."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from torch import nn

from adapterkit.model.walk import child, expand

Data = Any
Loc = tuple[str | int, ...]

# what speaks of foreign files or to people, and claims nothing about the model
SILENT = {"adapterhub", "peft", "was", "adapterkit", "like", "only", "tiny"}
NORMS = ("before", "after", "after_residual")
# words that may stand in each other's place: a mutant moves one to the other
MOVES = {
    "tail": ("out",),
    "out": ("tail",),
    "o": ("out",),
    "down": ("out", "up"),
    "up": ("gate", "down"),
    "gate": ("up",),
    "final_norm": ("exit", "pooler"),
    "exit": ("final_norm", "pooler"),
    "pooler": ("exit", "final_norm"),
    "table": ("out",),
    "attention": ("cross_attention", "mlp"),
    "cross_attention": ("attention",),
    "mlp": ("attention",),
    "own_adapter": ("tail",),
}
INPUT_NAMES = {
    "ids": "input_ids",
    "embeds": "inputs_embeds",
    "mask": "attention_mask",
    "positions": "position_ids",
}
LAYOUTS = ("blocks", "per_head", "per_group")


@dataclass(frozen=True)
class Mutant:
    """An interface with one change."""

    kind: str
    loc: Loc
    what: str
    data: Data

    def __str__(self) -> str:
        return f"{self.kind} {'.'.join(map(str, self.loc))}: {self.what}"


def mutants(data: Data, model: nn.Module, roots: dict[str, tuple[nn.Module, nn.Module]]) -> Iterator[Mutant]:
    """Every mutant of an interface that is written out.

    Args: roots: of each stack, its root and its first layer, from which misnamed paths are taken.
    """
    seen: set[str] = set()
    for mutant in _all(data, model, roots):
        text = repr(mutant.data)
        if mutant.data != data and text not in seen:
            seen.add(text)
            yield mutant


def _all(data: Data, model: nn.Module, roots: dict[str, tuple[nn.Module, nn.Module]]) -> Iterator[Mutant]:
    for loc, value in list(_walk(data)):
        if not loc:
            continue
        yield from _dropped(data, loc, value)
        if isinstance(value, dict):
            yield from _swapped(data, loc, value)
            yield from _moved(data, loc, value)
        yield from _said_otherwise(data, loc, value)
        yield from _added(data, loc, value)
        yield from _misnamed(data, loc, value, model, roots)
    stacks = data.get("stacks", {})
    for one, other in itertools.combinations(stacks, 2):
        for word in stacks[one].keys() & stacks[other].keys():
            changed = copy.deepcopy(data)
            a, b = changed["stacks"][one], changed["stacks"][other]
            a[word], b[word] = b[word], a[word]
            yield Mutant("swap", ("stacks", one, word), f"with that of {other}", changed)


def _walk(value: Data, loc: Loc = ()) -> Iterator[tuple[Loc, Data]]:
    if not (loc and loc[-1] in SILENT):
        yield loc, value
        items = (
            value.items()
            if isinstance(value, dict)
            else enumerate(value)
            if isinstance(value, list | tuple)
            else ()
        )
        for key, item in items:
            yield from _walk(item, (*loc, key))


def _at(data: Data, loc: Loc) -> Data:
    for part in loc:
        data = data[part]
    return data


def _with(data: Data, loc: Loc, value: Data) -> Data:
    changed = copy.deepcopy(data)
    _at(changed, loc[:-1])[loc[-1]] = value
    return changed


def _dropped(data: Data, loc: Loc, value: Data) -> Iterator[Mutant]:
    if loc[-1] == "any_of" or loc == ("stacks",) or loc == ("parts",):
        return
    changed = copy.deepcopy(data)
    del _at(changed, loc[:-1])[loc[-1]]
    if len(loc) > 1 and loc[-2] == "any_of":
        rest = _at(changed, loc[:-1])
        if len(rest) == 1:  # one that is left is no alternative
            holder, word = loc[:-2], loc[-3] if len(loc) > 2 else ""
            only = rest[0]
            kept = {k: v for k, v in _at(changed, holder).items() if k != "any_of"}
            if isinstance(only, dict):
                only = {**kept, **only}
            elif kept:
                only = {"path": only, **kept}
            changed = _with(changed, holder, only)
            yield Mutant("drop", loc, f"alternative {loc[-1]} of {word}", changed)
            return
    yield Mutant("drop", loc, "dropped", changed)


def _swapped(data: Data, loc: Loc, value: dict[str, Data]) -> Iterator[Mutant]:
    for one, other in itertools.combinations(value, 2):
        if SILENT & {one, other} or type(value[one]) is not type(value[other]):
            continue
        if loc[-1] in ("unsupported", "without"):  # reasons are for people
            continue
        changed = copy.deepcopy(data)
        place = _at(changed, loc)
        place[one], place[other] = place[other], place[one]
        yield Mutant("swap", (*loc, one), f"with {other}", changed)


def _moved(data: Data, loc: Loc, value: dict[str, Data]) -> Iterator[Mutant]:
    for word in value:
        others = NORMS if loc[-1] == "norm" else MOVES.get(word, ())
        if loc[-1] in ("extra", "order"):
            continue
        for other in others:
            if other not in value:
                changed = copy.deepcopy(data)
                place = _at(changed, loc)
                place[other] = place.pop(word)
                yield Mutant("move", (*loc, word), f"to {other}", changed)


def _said_otherwise(data: Data, loc: Loc, value: Data) -> Iterator[Mutant]:
    """Other values of words that take one of a few."""
    word = loc[-1]
    others: list[Data] = []
    if word == "layout":
        others = [layout for layout in LAYOUTS if layout != value]
    elif word == "order":
        others = [list(order) for order in itertools.permutations(value) if list(order) != list(value)]
    elif word == "block":
        others = ["sequential" if value == "parallel" else "parallel"]
    elif (word == "batch" and isinstance(value, str)) or loc[-2:-1] == ("batch",):
        others = [axis for axis in ("first", "second", "none") if axis != value]
    elif word in ("by_default", "mask_hides"):
        others = [not value]
    elif word == "eager":
        others = [f"{value}_"]
    elif word == "scale":
        others = [2 * value if isinstance(value, float) else "layer_norm_eps", 1.0]
    elif word == "groups":
        others = [value + 1, 2 * value]
    elif len(loc) > 1 and loc[-2] == "widths":
        others = [value + 1 if isinstance(value, int) else "hidden_size"]
    elif word == "args" and len(loc) > 1 and loc[-2] == "kernel":
        others = [list(order) for order in itertools.permutations(value)]
    elif word in ("bias", "method"):
        others = ["forward", "extra_repr"]
    elif word == "by" and len(loc) > 1 and loc[-2] == "kinds":
        others = ["architectures", "num_hidden_layers"]
    elif "parallel_when" in loc and not isinstance(value, dict | list | tuple):
        others = [not value] if isinstance(value, bool) else [f"{value}x"]
    elif len(loc) > 1 and loc[-2] == "when":
        others = [not value] if isinstance(value, bool) else [f"{value}x"]
    elif len(loc) > 1 and loc[-2] == "sizes":
        others = [value + 1 if isinstance(value, int) else "num_hidden_layers", "encoder_layers"]
    elif len(loc) > 1 and loc[-2] == "inputs" and word in INPUT_NAMES:
        others = [INPUT_NAMES[str(word)] if value is None else None, "labels", "output_attentions"]
    elif len(loc) > 1 and loc[-2] == "aligned":
        others = ["position_ids", "labels"]
    elif word == "states":
        others = ["inputs_embeds", "hidden_states"]
    elif len(loc) > 1 and loc[-2] == "present_in":
        others = [f"{value}s"]
    elif word == "config":
        others = ["text_config", "vision_config", "encoder"]
    elif "source" in loc and isinstance(value, str):
        others = [value.replace(".py", "_.py")]
    elif word == "model_type" and isinstance(value, str):
        others = [f"{value}_"]
    elif word == "stack":
        siblings = _at(data, loc[:-3])
        others = [name for name in siblings if name != value]
    for other in others:
        if other != value:
            yield Mutant("say", loc, f"{other!r} for {value!r}", _with(data, loc, other))


def _added(data: Data, loc: Loc, value: Data) -> Iterator[Mutant]:
    """Words that are not there and would change what is meant."""
    if not isinstance(value, dict):
        return
    if len(loc) == 2 and loc[0] in ("stacks", "parts"):
        # of two towers either may be the one that roles mean: that is a choice and no claim
        every = [one for word in ("stacks", "parts") for one in data.get(word, {}).values()]
        usual = [one for one in every if one.get("by_default", True)]
        if usual == [value]:
            yield Mutant("add", (*loc, "by_default"), "False", _with(data, (*loc, "by_default"), False))
    if len(loc) == 2 and loc[0] == "stacks":
        words: dict[str, Data] = {"batch": "second", "aside": "it does not"}
        words |= {} if "block" in value or "kinds" in value else {"block": "parallel"}
    elif loc[-1] in ("inputs", "reads"):
        words = {"mask_hides": True}
        words |= {"batch": {"hidden_states": "none"}} if loc[-1] == "inputs" else {}
    elif loc[-1] in ("attention", "mlp") and ("o" in value or "down" in value):
        words = {"scale": 0.5}
    elif "path" in value and len(value) == 1 and loc[-1] in ("q", "v", "up", "down", "o"):
        words = {"batch": "second"}
    else:
        words = {}
    for word, said in words.items():
        if word not in value:
            yield Mutant("add", (*loc, word), f"{said!r}", _with(data, (*loc, word), said))


def _misnamed(
    data: Data, loc: Loc, value: Data, model: nn.Module, roots: dict[str, tuple[nn.Module, nn.Module]]
) -> Iterator[Mutant]:
    """Paths of other modules: the likest one of the same class, the parent, and one that does not exist."""
    if not isinstance(value, str) or not _is_path(loc):
        return
    yield Mutant("misname", loc, f"{value}x", _with(data, loc, f"{value}x"))
    if "." in value:
        parent = value.rpartition(".")[0]
        yield Mutant("misname", loc, f"its parent {parent}", _with(data, loc, parent))
    for root in _roots(loc, model, roots):
        if "*" in value:
            continue
        found = child(root, value)
        if loc[-1] == "layers" or (len(loc) > 1 and loc[-2] == "layers"):
            lists = [p for p, m in root.named_modules() if p and p != value and expand(root, p)]
            for path in _likest(value, lists)[:2]:
                yield Mutant("misname", loc, f"list {path}", _with(data, loc, path))
        elif found is not None:
            alike = [p for p, m in root.named_modules() if p and type(m) is type(found) and m is not found]
            for path in _likest(value, alike)[:2]:
                yield Mutant("misname", loc, f"module {path}", _with(data, loc, path))


def _is_path(loc: Loc) -> bool:
    words = [part for part in loc if isinstance(part, str)]
    silent = {"when", "optional", "otherwise", "without", "inputs", "reads", "present_in", "config"}
    silent |= {"model_type", "source", "sizes", "parallel_when", "aside", "interface", "widths", "kernel"}
    silent |= {"by", "scale", "bias", "eager"}
    if silent & set(words) or words[-1] in ("layout", "order", "block", "batch", "only"):
        return False
    return words[0] in ("stacks", "parts", "heads") and words[-1] not in ("by",)


def _roots(
    loc: Loc, model: nn.Module, roots: dict[str, tuple[nn.Module, nn.Module]]
) -> tuple[nn.Module, ...]:
    if loc[0] != "stacks" or "unembed" in loc:
        return (model,)
    if str(loc[1]) not in roots:
        return ()
    root, layer = roots[str(loc[1])]
    in_layer = {"attention", "cross_attention", "mlp", "shared_norm"} & {p for p in loc if isinstance(p, str)}
    if "at" in loc:
        return (model,)
    return (layer,) if in_layer else (root,)


def _likest(path: str, others: list[str]) -> list[str]:
    return sorted(others, key=lambda other: -SequenceMatcher(None, path, other).ratio())
