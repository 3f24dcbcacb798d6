"""Config -> a tiny config of the same kind: every size made small by what its name says, relations kept.

Equal sizes stay equal and different ones different, over all sub-configs, because models are wired by them:
a width that two configs share maps to one tiny width. Layers are picked so that every kind that a config
lists is there. Where one way of shrinking breaks a rule that only the model's code knows, the next way is
tried: see `WAYS`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

HEADS, KV_HEADS, LAYERS, EXPERTS, CHOSEN, VOCAB, POSITIONS, WINDOW = 4, 2, 2, 4, 2, 128, 64, 6
MOST_KINDS = 6
FIRST_SPECIAL = 96
"""Ids of special tokens lie from here on, so that ids below are plain words."""


@dataclass(frozen=True)
class Way:
    """One way of choosing sizes; which one fits is found by trying."""

    hidden: int = 32
    """Widths of streams are multiples of it."""
    other: tuple[int, int] = (40, 16)
    """First of the other widths, and the distance between them."""
    own_head_dim: bool = True
    """Heads that have a size of their own together need not be as wide as the stream."""
    scale: int = 0
    """Divide all widths by this instead."""
    equal: bool = False
    """One width for all streams: where a default config is at odds with itself."""
    images: bool = True
    """Make images small as well."""
    layers: int = LAYERS
    heads: bool = True
    fill: bool = False
    """Give a value to what a default config leaves open, although its model needs it."""


WAYS = (
    Way(),
    Way(fill=True),
    Way(own_head_dim=False),
    Way(hidden=64, other=(96, 32)),
    Way(hidden=64, other=(96, 32), own_head_dim=False, images=False, fill=True),
    Way(equal=True, fill=True),
    Way(scale=16),
    Way(scale=8, images=False, fill=True),
    Way(scale=4, heads=False),
    Way(scale=1, heads=False, images=False),
    Way(scale=1, heads=False, images=False, layers=4),
)

_HIDDEN = re.compile(
    r"(^|_)(hidden_size|hidden_sizes|d_model|dim_model|model_dim|embed_dim|embed_dims|n_embd|hidden_dim|dim|width|emb_dim"
    r"|hidden_channels|embedding_dim|embedding_size|d_embed|n_embed|projection_dim|out_hidden_size)$"
)
_WIDTH = re.compile(
    r"(^|_)(dim|dims|size|sizes|width|channels|chans|inner|ffn|embd|ff|rank|state|filters|features|d_model|d_inner|d_state"
    r"|planes|units|latents)($|_)"
)
_NO_WIDTH = re.compile(
    r"(^|_)(image|patch|kernel|window|vocab|chunk|batch|pool|grid|merge|block|sample|crop|stride|buffer|codebook|"
    r"group|frame|segment|context|step|in_channels|num_channels|in_chans|tubelet|cache|max|min|unshuffle|position|"
    r"block|level|levels|kernel_size|downsample|upsample|resolution|target|slot)(s)?($|_)"
)
_HEAD_DIM = re.compile(
    r"(head_dim|head_size|(^|_)d_kv$|head_width|kv_channels|dim_head|d_head$|head_channels)"
)
_HEAD = re.compile(r"(^|_)(heads?|heads_kv|head_kv|query_groups|query_group_num|kv_groups)($|_)")
_LAYERS = re.compile(
    r"(^|_)(layers?|depth|blocks)$|^(num|n)_(\w+_)?(layers?|blocks)(_|$)|(^|_)(n|num)_(layers?|blocks)"
)
_NO_LAYERS = re.compile(
    r"(norm|drop|index|idx|position|step|freq|interval|size|type|shared|scale|conv_|mtp|nextn|dense|kv_|skip|select|feature_layer|target_layer|output_layer)"
)
_TOKEN = re.compile(r"(token_id|token_index|token_idx|token_ids|tokens_id|_id|_token)$")
_POSITIONS = re.compile(
    r"(max_position|n_positions|max_seq|n_ctx|max_source_pos|max_target_pos|position_embeddings?$|max_len|seq_len|seq_length|max_relative)"
)
_SUB = "model_type"


def names(config: Any) -> list[str]:
    """What the config is made with."""
    own = [field.name for field in fields(config) if field.init and not field.name.startswith("_")]
    # configs made of others may name them nowhere
    inner = [name for name, value in vars(config).items() if hasattr(value, _SUB)]
    return [name for name in dict.fromkeys((*own, *inner)) if name in vars(config)]


def sub_configs(config: Any) -> dict[str, Any]:
    """Configs inside the config, by the name of their field."""
    found = {name: vars(config)[name] for name in names(config)}
    return {name: value for name, value in found.items() if hasattr(value, _SUB)}


def _all(config: Any) -> Iterator[Any]:
    yield config
    for inner in sub_configs(config).values():
        yield from _all(inner)


def _numbers(value: Any) -> list[int]:
    """The whole numbers of a value; none if there is anything else."""
    if isinstance(value, bool):
        return []
    if isinstance(value, int):
        return [value]
    if isinstance(value, list | tuple):
        inner = [_numbers(item) for item in value]
        return [number for found in inner for number in found] if all(inner) else []
    return []


def _is_width(name: str, value: Any) -> bool:
    if _HEAD_DIM.search(name) or _HEAD.search(name) or _NO_WIDTH.search(name):
        return False
    return bool(_WIDTH.search(name) or _HIDDEN.search(name)) and min(_numbers(value) or [0]) >= 16


class Shrinker:
    """The tiny sizes of one tree of configs."""

    def __init__(self, config: Any, way: Way) -> None:
        self.way = way
        tree = list(_all(config))
        held = [(name, vars(one)[name]) for one in tree for name in names(one)]
        widths = [
            (name, number) for name, value in held if _is_width(name, value) for number in _numbers(value)
        ]
        hidden = sorted({number for name, number in widths if _HIDDEN.search(name)})
        others = sorted({number for _, number in widths} - set(hidden))
        first, step = way.other
        self.widths = {number: way.hidden * (i + 1) for i, number in enumerate(hidden)}
        self.widths |= {number: first + step * i for i, number in enumerate(others)}
        if way.equal:
            self.widths |= dict.fromkeys(hidden, way.hidden)
        if way.scale:
            self.widths = {number: max(number // way.scale, 1) for number in (*hidden, *others)}
        dims = {n for name, value in held if _HEAD_DIM.search(name) for n in _numbers(value)}
        self.dims = {number: max(number // 8 if not way.scale else number // way.scale, 4) for number in dims}
        ids = sorted(
            {n for name, v in held if _TOKEN.search(name) for n in _numbers(v) if n >= FIRST_SPECIAL}
        )
        self.ids = {number: FIRST_SPECIAL + i % (VOCAB - FIRST_SPECIAL) for i, number in enumerate(ids)}

    def shrink(self, config: Any, said: Mapping[str, Any] | None = None) -> Any:
        """A tiny config of the same class.

        Args: said: fields whose values are known, nested for a sub-config.
        Raises: whatever the class says against it.
        """
        said = {name: value for name, value in (said or {}).items() if name != _SUB}
        held = {name: vars(config)[name] for name in names(config)}
        new: dict[str, Any] = {
            name: self.shrink(value, said.get(name)) if hasattr(value, _SUB) else value
            for name, value in held.items()
        }
        new |= self._layers(held)
        heads = self._heads(held)
        for name, value in held.items():
            if name not in heads and not hasattr(value, _SUB) and new[name] is value:
                new[name] = self._value(name, value, held)
        new |= heads
        new |= self._head_dims(held, new)
        if self.way.fill:
            new |= _filled(held, new)
        rope = new.get("rope_parameters")
        if isinstance(rope, Mapping):
            new["rope_parameters"] = _rope(rope, held, new)
        new |= {name: value for name, value in said.items() if not hasattr(held.get(name), _SUB)}
        declared = {field.name for field in fields(config)}
        # what the class does not declare it takes as in a file
        return type(config)(
            **{n: v if n in declared or not hasattr(v, _SUB) else v.to_dict() for n, v in new.items()}
        )

    # ------------------------------------------------------------------------------------------------ layers

    def _layers(self, held: Mapping[str, Any]) -> dict[str, Any]:
        """Numbers of layers, with every list that has one item per layer."""
        found: dict[str, Any] = {}
        for name, count in held.items():
            if not _is_count(name, count) or count <= self.way.layers:
                continue
            given = {n: v for n, v in held.items() if isinstance(v, list | tuple) and v}
            indices = {n: v for n, v in given.items() if _is_index_list(n, v, count)}
            lists = {n: v for n, v in given.items() if len(v) == count and n not in indices}
            kept = _kept(count, lists.values(), [_numbers(v) for v in indices.values()], self.way.layers)
            found[name] = len(kept)
            found |= {n: type(v)(v[i] for i in kept) for n, v in lists.items()}
            found |= {n: type(v)(kept.index(i) for i in v if i in kept) for n, v in indices.items()}
        for name, value in held.items():
            if (
                isinstance(value, list | tuple)
                and re.search(r"depths?$|num_layers|num_blocks", name)
                and _numbers(value)
            ):
                found.setdefault(name, type(value)(min(v, 2) if isinstance(v, int) else v for v in value))
        return found

    # ------------------------------------------------------------------------------------------------- heads

    def _heads(self, held: Mapping[str, Any]) -> dict[str, Any]:
        if not self.way.heads:
            return {}
        counts = {
            n: v
            for n, v in held.items()
            if _HEAD.search(n)
            and not _HEAD_DIM.search(n)
            and isinstance(v, int)
            and not isinstance(v, bool)
            and v > 0
        }
        most = max(counts.values(), default=0)
        small: dict[str, Any] = {
            n: HEADS if v == most and v >= HEADS else min(v, KV_HEADS) for n, v in counts.items()
        }
        for name, value in held.items():
            if (
                _HEAD.search(name)
                and not _HEAD_DIM.search(name)
                and isinstance(value, list | tuple)
                and _numbers(value)
            ):
                small[name] = type(value)(1 << (min(v, HEADS).bit_length() - 1) for v in value)
        return small

    def _head_dims(self, held: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
        """Sizes of heads: as the width of the stream has it, where it has it, or of their own."""
        found = {}
        hidden = [
            n for n in held if _HIDDEN.search(n) and isinstance(held[n], int) and isinstance(new[n], int)
        ]
        heads = [n for n in held if _HEAD.search(n) and not _HEAD_DIM.search(n) and isinstance(held[n], int)]
        for name, value in held.items():
            if not (_HEAD_DIM.search(name) and isinstance(value, int) and not isinstance(value, bool)):
                continue
            fitting = [
                (h, c, held[c] * value // held[h])
                for h in hidden
                for c in heads
                if held[h] and held[c] * value % held[h] == 0 and 1 <= held[c] * value // held[h] <= 4
            ]
            exact = [fit for fit in fitting if fit[2] == 1] or [fit for fit in fitting if _akin(name, fit[1])]
            if exact and (not self.way.own_head_dim or name != "head_dim"):
                stream, count, times = exact[0]
                found[name] = new[stream] * times // new[count]
            else:
                found[name] = self.dims[value]
        return found

    # ------------------------------------------------------------------------------------------- the others

    def _value(self, name: str, value: Any, held: Mapping[str, Any]) -> Any:
        if isinstance(value, list | tuple) and _numbers(value):
            return type(value)(self._value(name, item, held) for item in value)
        if isinstance(value, bool) or not isinstance(value, int):
            return value
        if _TOKEN.search(name):
            return self.ids.get(value, value)
        if "vocab" in name or name.endswith(("codebook_size", "num_embeddings")):
            return min(value, VOCAB)
        if _is_width(name, value) or (name.endswith("groups") and value in self.widths):
            return self.widths.get(value, value)
        if name.endswith("num_queries"):
            return min(value, WINDOW)
        if name.endswith("context_size"):
            return min(value, POSITIONS // 2)
        if "expert" in name or "top_k" in name or "topk" in name or name in ("n_group", "moe_k"):
            return _expert(name, value)
        if _POSITIONS.search(name):
            return min(value, POSITIONS)
        if re.search(r"image_size|img_size|input_size$", name):
            patch = next((held[n] for n in ("patch_size", "patch_stride") if isinstance(held.get(n), int)), 8)
            return min(value, max(4 * patch, 32)) if self.way.images else value
        if re.search(r"sliding_window$|local_attention|attention_window|attention_chunk_size", name):
            return min(value, WINDOW)
        if re.search(r"first_k|dense_replace|num_dense|n_dense", name):
            return min(value, 1)
        if re.search(r"(_period|_interval|_freq|_step|every)(_n|$|_)", name):
            return min(value, 2)
        if name.endswith("_offset"):
            return min(value, 1)
        return value


def _filled(held: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Values for fields that are open, by their names."""
    numbers = {n: v for n, v in new.items() if isinstance(v, int) and not isinstance(v, bool)}
    hidden = next((v for n, v in numbers.items() if _HIDDEN.search(n)), 0)
    heads = next((v for n, v in numbers.items() if _HEAD.search(n) and not _HEAD_DIM.search(n)), 0)
    layers = next((v for n, v in numbers.items() if _is_count(n, v)), LAYERS)
    values = {
        "head_dim": hidden // heads if heads else None,
        "num_key_value_heads": heads or None,
        "vocab_size": VOCAB,
        "sliding_window": WINDOW,
        "prediction_length": WINDOW,
        "num_experts_per_tok": CHOSEN,
        "n_group": 1,
        "topk_group": 1,
        "layer_types": ["full_attention"] * layers,
        "image_token_id": FIRST_SPECIAL,
        "image_token_index": FIRST_SPECIAL,
    }
    return {name: value for name, value in values.items() if name in held and new[name] is None and value}


def _akin(one: str, other: str) -> bool:
    """Whether two fields speak of the same thing by their first word."""
    return one.partition("_")[0] == other.partition("_")[0]


def _is_count(name: str, value: Any) -> bool:
    return (
        isinstance(value, int)
        and not isinstance(value, bool)
        and bool(_LAYERS.search(name))
        and not _NO_LAYERS.search(name)
    )


def _is_index_list(name: str, value: Any, count: int) -> bool:
    """Whether a list names some of `count` layers by their numbers."""
    numbers = _numbers(value)
    rising = all(low < high for low, high in itertools.pairwise(numbers))
    named = re.search(r"(layers|index|indices|indexes|idx)", name) is not None
    return named and bool(numbers) and rising and 0 <= numbers[0] and numbers[-1] < count


def _kept(count: int, lists: Iterable[Any], indices: Iterable[list[int]], least: int) -> list[int]:
    """Layers that show everything that the lists say of layers, at least so many."""
    kept: set[int] = set()
    for one in lists:
        if len({repr(item) for item in one}) > MOST_KINDS:
            continue  # a value for each layer is no kind
        seen: list[Any] = []
        for i, item in enumerate(one):
            if item not in seen:
                seen.append(item)
                if not any(one[j] == item for j in kept):
                    kept.add(i)
    for chosen in indices:
        if not kept & set(chosen):
            kept.add(chosen[0])
        if not set(range(count)) - set(chosen) & kept and len(chosen) < count:
            kept.add(next(i for i in range(count) if i not in chosen))
    spare = (i for i in range(count) if i not in kept)
    while len(kept) < least:
        kept.add(next(spare))
    return sorted(kept)


def _expert(name: str, value: int) -> int:
    if "size" in name or "dim" in name:
        return value
    if "top" in name or "per_tok" in name or "selected" in name or name == "moe_k":
        return min(value, 1 if name.endswith("group") else CHOSEN)
    if name.endswith("group"):
        return min(value, 2)
    return min(value, EXPERTS)


def _rope(rope: Mapping[str, Any], held: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Lists in the parameters of rotary embeddings, cut to the tiny head."""
    found: dict[str, Any] = {}
    old, small = _head(held), _head(new)
    for key, value in rope.items():
        if isinstance(value, Mapping):
            found[key] = _rope(value, held, new)
        elif "section" in key and _numbers(value):
            found[key] = _portions(list(value), max(sum(value) * small // max(old, 1), len(value)))
        elif isinstance(value, list | tuple) and len(value) > 8:
            found[key] = list(value)[: max(len(value) * small // max(old, 1), 1)]
        else:
            found[key] = value
    return found


def _head(values: Mapping[str, Any]) -> int:
    """Width of a head, as far as a config shows it."""
    if isinstance(values.get("head_dim"), int):
        return int(values["head_dim"])
    hidden = next((v for n, v in values.items() if _HIDDEN.search(n) and isinstance(v, int)), 0)
    heads = next((v for n, v in values.items() if _HEAD.search(n) and isinstance(v, int)), 1)
    return int(hidden) // max(int(heads), 1)


def _portions(shares: list[int], total: int) -> list[int]:
    """Whole numbers in about the proportion of `shares`, each at least 1, that sum to `total`."""
    found = [max(share * total // sum(shares), 1) for share in shares]
    while sum(found) < total:
        found[max(range(len(found)), key=lambda i: shares[i] * total / sum(shares) - found[i])] += 1
    while sum(found) > total:
        found[found.index(max(found))] -= 1
    return found
