"""Further model types: configs and inputs that nothing in a config tells, and the classes of a type."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from adapterkit.author import tiny
from adapterkit.author.shrink import WAYS, Shrinker
from adapterkit.spec import registry
from tests.models.tiny import ROWS

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2, "mamba_d_state": 16}
WINDOWS = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
PACKED = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "depth": 2, "num_heads": 4}
MIXED = {"layer_types": ["linear_attention", "full_attention"]}

CONFIGS: dict[str, dict[str, Any]] = {
    "audio-spectrogram-transformer": SMALL
    | {
        "num_attention_heads": 4,
        "patch_size": 4,
        "frequency_stride": 4,
        "time_stride": 4,
        "max_length": 16,
        "num_mel_bins": 8,
    },
    "bamba": SMALL | HEADS | MAMBA | {"attn_layer_indices": [1]},
    "deepseek_v2": SMALL
    | EXPERTS
    | {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "first_k_dense_replace": 1,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "topk_method": "greedy",
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 12,
        "qk_rope_head_dim": 8,
        "v_head_dim": 10,
    },
    "donut-swin": WINDOWS,
    "dots1": SMALL
    | HEADS
    | EXPERTS
    | {
        "head_dim": 8,
        "n_shared_experts": 1,
        "n_routed_experts": 4,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "esm": {"vocab_size": 64, "pad_token_id": 1, "mask_token_id": 2, "position_embedding_type": "rotary"},
    "falcon_h1": SMALL | HEADS | MAMBA | {"head_dim": 8, "mamba_d_ssm": 64},
    "gemma3n_text": SMALL
    | HEADS
    | {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 2,
        "attention_types": [[["global", "local"], 1]],
        "num_heads": 4,
        "intermediate_size": 64,
        "vocab_size": 64,
        "max_position_embeddings": 64,
    },
    "granite": {"residual_multiplier": 0.22},
    "granitemoe": {"residual_multiplier": 0.22},
    "granitemoehybrid": SMALL
    | HEADS
    | MAMBA
    | {
        "residual_multiplier": 0.22,
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 0,
        "shared_intermediate_size": 64,
    },
    "granitemoeshared": {"residual_multiplier": 0.22, "shared_intermediate_size": 64},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "hyperclovax": {"residual_multiplier": 0.22},
    "laguna": SMALL
    | HEADS
    | EXPERTS
    | {"head_dim": 8, "num_experts": 4, "num_attention_heads_per_layer": [4, 4]},
    "lfm2": SMALL | HEADS | {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": SMALL
    | HEADS
    | EXPERTS
    | {"layer_types": ["conv", "full_attention"], "num_experts": 4, "num_dense_layers": 1},
    "minimax": SMALL
    | HEADS
    | MIXED
    | {
        "head_dim": 8,
        "num_local_experts": 4,
        "full_attn_beta_factor": 0.7,
        "linear_attn_beta_factor": 0.6,
        "mlp_beta_factor": 0.8,
    },
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 8, "head_dim": 16},
    "nemotron_h": SMALL
    | HEADS
    | EXPERTS
    | {
        "num_hidden_layers": 4,
        "head_dim": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 2,
        "n_routed_experts": 4,
        "chunk_size": 8,
        "moe_shared_expert_intermediate_size": 24,
    },
    "qwen2_5_vl_vision": PACKED
    | {
        "hidden_size": 32,
        "out_hidden_size": 32,
        "intermediate_size": 64,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    },
    "qwen3_vl_vision": PACKED
    | {
        "hidden_size": 32,
        "out_hidden_size": 32,
        "intermediate_size": 64,
        "deepstack_visual_indexes": [1],
        "num_position_embeddings": 16,
    },
    "recurrent_gemma": SMALL
    | {
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "lru_width": 32,
        "attention_window_size": 16,
    },
    "siglip2_vision_model": SMALL | {"num_attention_heads": 4, "patch_size": 4, "num_patches": 16},
    "swin": WINDOWS,
    "swinv2": WINDOWS | {"pretrained_window_sizes": [0, 0]},
    "wav2vec2-bert": SMALL | {"num_attention_heads": 4, "feature_projection_input_dim": 20},
}
"""Settings of types whose default config cannot be made small blindly, or hides what the interface says."""

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


def _ids(high: int = 30) -> Tensor:
    return torch.randint(5, high, (2, 7), generator=torch.Generator().manual_seed(0))


def _noise(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


INPUTS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "audio-spectrogram-transformer": lambda: {"input_values": _noise(2, 16, 8)},
    "bros": lambda: {"bbox": _noise(2, 7, 8).abs()},
    "layoutlmv3": lambda: {"input_ids": _ids(), "bbox": torch.tensor([[[0, 0, 5, 5]] * 7] * 2)},
    "qwen2_5_vl_vision": lambda: {"hidden_states": _noise(16, 96), "grid_thw": torch.tensor([[1, 4, 4]])},
    "qwen3_vl_vision": lambda: {"hidden_states": _noise(16, 96), "grid_thw": torch.tensor([[1, 4, 4]])},
    "siglip2_vision_model": lambda: {
        "pixel_values": _noise(2, 16, 48),
        "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4]] * 2),
    },
    **dict.fromkeys(("swin", "swinv2", "donut-swin"), lambda: {"pixel_values": _noise(2, 3, 32, 32)}),
    "wav2vec2-bert": lambda: {"input_features": _noise(2, 12, 20)},
}
"""Arguments that are not found by trying."""

NOT_TRIED: dict[str, str] = {
    "gemma4_text": "its config refuses to be read as a whole, so that it cannot be made small",
    "qwen2_vl_vision": "its class is not public",
    **dict.fromkeys(
        ("speech-encoder-decoder", "vision-encoder-decoder", "vision-text-dual-encoder"),
        "its config needs those of two models",
    ),
}
OTHER_CLASSES = {"JevForDecision"}  # of another family
_MAPPINGS = [getattr(modeling_auto, name) for name in dir(modeling_auto) if name.endswith("MAPPING_NAMES")]


def types() -> list[str]:
    """Model types of the shipped interfaces that no row of the table stands for, as far as there are here."""
    rows = {ROWS[row].config for row in ROWS}
    shipped = (t for t, name in registry.model_types().items() if registry.is_shipped(name))
    found = (t for t in shipped if t in CONFIG_MAPPING and CONFIG_MAPPING[t].__name__ not in rows)
    return [t for t in found if not t.startswith("clip_") and t != "clip"]


def config(name: str) -> Any:
    """A small config of a type or variant."""
    model_type, settings = VARIANTS.get(name, (name, CONFIGS.get(name, {})))
    made = CONFIG_MAPPING[model_type](**settings)
    is_small = bool(settings.keys() & {"hidden_size", "embed_dim"})
    return made if is_small else Shrinker(made, WAYS[0]).shrink(made)


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
    for name in names:
        found = getattr(transformers, name, None)
        if (
            name not in OTHER_CLASSES
            and not name.endswith("PreTrainedModel")
            and isinstance(found, type)
            and issubclass(found, PreTrainedModel)
        ):
            yield found


def build(name: str) -> tuple[nn.Module, Mapping[str, Any]]:
    """A tiny model of a type or variant, and inputs. Raises: ConfigError: it cannot be made here."""
    model_type, settings = VARIANTS.get(name, (name, CONFIGS.get(name, {})))
    source = CONFIG_MAPPING[model_type](**settings) if settings else model_type
    given = INPUTS[model_type]() if model_type in INPUTS else None
    made = tiny.build(source, given=given)
    return made.model.requires_grad_(False), made.inputs
