"""Further model types: tiny models of them, other structures of some, and the classes of a type."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from adapterkit.author import tiny
from adapterkit.author.shrink import WAYS, Shrinker
from adapterkit.spec import registry
from adapterkit.spec.making import Tiny
from tests.models.tiny import ROWS

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom-post-norm": (
        "bloom",
        {
            "hidden_size": 32,
            "n_head": 4,
            "n_layer": 2,
            "vocab_size": 64,
            "apply_residual_connection_post_layernorm": True,
        },
    ),
    "dinov2-gated": ("dinov2", {"use_swiglu_ffn": True}),
    "dinov3_vit-gated": ("dinov3_vit", {"use_gated_mlp": True}),
    "falcon-grouped": (
        "falcon",
        SMALL | {"num_attention_heads": 4, "num_kv_heads": 2, "new_decoder_architecture": True},
    ),
    "falcon-sequential": (
        "falcon",
        SMALL | {"num_attention_heads": 4, "parallel_attn": False, "multi_query": False},
    ),
    "gpt_bigcode-heads": (
        "gpt_bigcode",
        {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_inner": 64, "vocab_size": 64, "multi_query": False},
    ),
    "gpt_neox-sequential": ("gpt_neox", SMALL | {"num_attention_heads": 4, "use_parallel_residual": False}),
    "opt-post-norm": (
        "opt",
        {
            "hidden_size": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 64,
            "word_embed_proj_dim": 24,
            "max_position_embeddings": 64,
            "do_layer_norm_before": False,
        },
    ),
    "stablelm-parallel": ("stablelm", SMALL | HEADS | {"use_parallel_residual": True}),
    "wav2vec2-stable": ("wav2vec2", {"do_stable_layer_norm": True}),
    "wavlm-stable": ("wavlm", {"do_stable_layer_norm": True}),
}
"""Other structures of a type: name -> (model type, settings)."""


OTHER_CLASSES = {"JevForDecision"}  # of another family
_MAPPINGS = [getattr(modeling_auto, name) for name in dir(modeling_auto) if name.endswith("MAPPING_NAMES")]


def types() -> list[str]:
    """Model types of the shipped interfaces that no row of the table stands for, as far as there are here."""
    rows = {ROWS[row].config for row in ROWS}
    shipped = (t for t, name in registry.model_types().items() if registry.is_shipped(name))
    found = (t for t in shipped if t in CONFIG_MAPPING and CONFIG_MAPPING[t].__name__ not in rows)
    return [t for t in found if not t.startswith("clip_") and t != "clip"]


def config(model_type: str) -> Any:
    """A small config of a type."""
    made = tiny.config_of(model_type)
    return Shrinker(made, WAYS[0]).shrink(
        made, registry.by_name(model_type).tiny.get(model_type, Tiny()).config
    )


def classes(model_type: str) -> Iterator[type[PreTrainedModel]]:
    """Public classes of a type: those of the auto classes, and those of its source file with its config."""
    names: dict[str, None] = {}
    for mapping in _MAPPINGS:
        value = mapping.get(model_type, ())
        names |= dict.fromkeys([value] if isinstance(value, str) else value)
    kind = CONFIG_MAPPING[model_type]
    try:
        module = importlib.import_module(kind.__module__.replace("configuration", "modeling"))
    except ImportError:  # the classes of another family serve the type
        module = None
    for name in getattr(module, "__all__", ()):
        if getattr(getattr(module, name), "config_class", None) is kind:
            names[name] = None
    public = [
        found
        for name in names
        if name not in OTHER_CLASSES and not name.endswith("PreTrainedModel")
        if isinstance(found := getattr(transformers, name, None), type) and issubclass(found, PreTrainedModel)
        if found.forward is not PreTrainedModel.forward  # what other classes have in common
    ]
    yield from public or [tiny.class_of(tiny.config_of(model_type))]


def build(name: str) -> tuple[nn.Module, Mapping[str, Any]]:
    """A tiny model of a type or variant, and inputs. Raises: ConfigError: it cannot be made here."""
    model_type, settings = VARIANTS.get(name, (name, {}))
    made = tiny.build(CONFIG_MAPPING[model_type](**settings) if settings else model_type)
    return made.model.requires_grad_(False), {k: v for k, v in made.inputs.items() if v is not None}
