"""One table of tiny models, built from configs without any download: one row for every shipped interface.

    model = build("bert", "BertForSequenceClassification", seed=1)
    outputs = output(model(**inputs("bert", "BertForSequenceClassification", labels=True)))

The dimensions differ where real models differ (heads against key/value heads, hidden against intermediate,
towers against each other), so that a mix-up of two of them fails instead of passing by luck.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig

from tests.models import inputs as draws
from tests.models.custom import TinyClassifier

Kind = Literal["encoder", "decoder", "seq2seq", "image", "clip", "audio", "custom"]
Settings = Mapping[str, Any]

HIDDEN, HEADS, KV_HEADS, LAYERS, INTERMEDIATE, VOCAB, POSITIONS = 32, 4, 2, 2, 40, 64, 64
HEAD_DIM, WINDOW, PROJECTION = 16, 6, 24


@dataclass(frozen=True)
class Row:
    """A family: its classes (the first is the bare base model) and the settings of its config."""

    name: str
    kind: Kind
    classes: tuple[str, ...]
    config: str
    settings: Settings = field(default_factory=dict)
    variants: Mapping[str, Settings] = field(default_factory=dict)  # further settings worth a test, by name
    pad: int = 0
    eos: int | None = None


def _row(name: str, kind: Kind, prefix: str, suffixes: str, settings: Settings, **more: Any) -> Row:
    """A row whose classes are named prefix + suffix; a trailing "-" stands for "For" + what follows it."""
    classes = tuple(prefix + suffix.replace("-", "For") for suffix in suffixes.split())
    return Row(name, kind, classes, **{"config": f"{prefix}Config", "settings": settings} | more)


# ----------------------------------------------------------------------------------------------- settings

BERT = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": INTERMEDIATE,
    "max_position_embeddings": POSITIONS,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "classifier_dropout": 0.0,
}
ROBERTA = BERT | {"type_vocab_size": 1}
DEBERTA = BERT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "pooler_dropout": 0.0}
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "intermediate_size": INTERMEDIATE,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
    "classifier_dropout": 0.0,
}
MIXED_WINDOWS = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA = LLAMA | MIXED_WINDOWS | {"head_dim": HEAD_DIM, "query_pre_attn_scalar": HEAD_DIM}
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_inner": INTERMEDIATE,
    "n_positions": POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "classifier_dropout": 0.0,
    "summary_first_dropout": 0.0,
}
BART = {
    "vocab_size": VOCAB,
    "d_model": HIDDEN,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": INTERMEDIATE,
    "decoder_ffn_dim": INTERMEDIATE,
    "max_position_embeddings": POSITIONS,
    "forced_eos_token_id": None,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "classifier_dropout": 0.0,
}
T5 = {
    "vocab_size": VOCAB,
    "d_model": HIDDEN,
    "d_kv": HIDDEN // HEADS,
    "d_ff": INTERMEDIATE,
    "num_layers": LAYERS,
    "num_decoder_layers": LAYERS,
    "num_heads": HEADS,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.0,
    "classifier_dropout": 0.0,
}
VIT = {
    "image_size": draws.IMAGE,
    "patch_size": draws.PATCH,
    "encoder_stride": draws.PATCH,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": INTERMEDIATE,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
BEIT = VIT | {
    "vocab_size": VOCAB,
    "use_absolute_position_embeddings": True,
    "use_relative_position_bias": True,
    "drop_path_rate": 0.0,
    "pool_scales": [1, 2],
    "auxiliary_channels": 8,
}
WHISPER = BART | {
    "num_mel_bins": draws.MELS,
    "max_source_positions": draws.FRAMES // 2,
    "max_target_positions": POSITIONS,
    "decoder_start_token_id": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "begin_suppress_tokens": None,
    "classifier_proj_size": 16,
}
CLIP_TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": INTERMEDIATE,
    "max_position_embeddings": POSITIONS,
    "projection_dim": PROJECTION,
    "bos_token_id": VOCAB - 2,
    "eos_token_id": VOCAB - 1,
}
CLIP_VISION = {
    "image_size": draws.IMAGE,
    "patch_size": draws.PATCH,
    "hidden_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 56,
    "projection_dim": PROJECTION,
}

# ---------------------------------------------------------------------------------------------- the table

CLASSIFIERS = "-SequenceClassification -TokenClassification"
READERS = f"{CLASSIFIERS} -QuestionAnswering"
HEADS_OF_ENCODERS = f"Model -MaskedLM {READERS} -MultipleChoice"
HEADS_OF_BART = "Model -ConditionalGeneration -SequenceClassification -QuestionAnswering -CausalLM"
HEADS_OF_T5 = f"Model -ConditionalGeneration EncoderModel {READERS}"

_rows = (
    _row(
        *("albert", "encoder", "Albert", f"{HEADS_OF_ENCODERS} -PreTraining"),
        BERT
        | {
            "embedding_size": 16,
            "num_hidden_layers": 4,
            "num_hidden_groups": 2,
            "classifier_dropout_prob": 0.0,
        },
    ),
    _row("bart", "seq2seq", "Bart", HEADS_OF_BART, BART, pad=1, eos=2),
    _row(
        *("beit", "image", "Beit"),
        "Model -MaskedImageModeling -ImageClassification -SemanticSegmentation",
        BEIT,
    ),
    _row(
        *("bert", "encoder", "Bert"),
        f"{HEADS_OF_ENCODERS} -PreTraining -NextSentencePrediction LMHeadModel",
        BERT,
    ),
    _row("bert_generation", "encoder", "BertGeneration", "Encoder Decoder", BERT | {"bos_token_id": 2}),
    _row(
        *("clip", "clip", "CLIP"),
        "Model TextModel VisionModel TextModelWithProjection VisionModelWithProjection -ImageClassification",
        {},
        pad=1,
        eos=VOCAB - 1,
    ),
    Row("custom", "custom", ("TinyClassifier",), ""),
    _row(
        "deberta",
        "encoder",
        "Deberta",
        f"Model -MaskedLM {READERS}",
        DEBERTA | {"max_relative_positions": 16},
    ),
    _row(
        *("deberta_v2", "encoder", "DebertaV2", HEADS_OF_ENCODERS),
        DEBERTA | {"position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True},
        variants={"unshared": {"share_att_key": False}},
    ),
    _row(
        *("distilbert", "encoder", "DistilBert", HEADS_OF_ENCODERS),
        {
            "vocab_size": VOCAB,
            "dim": HIDDEN,
            "n_layers": LAYERS,
            "n_heads": HEADS,
            "hidden_dim": INTERMEDIATE,
            "max_position_embeddings": POSITIONS,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "seq_classif_dropout": 0.0,
            "qa_dropout": 0.0,
        },
    ),
    _row(
        *("electra", "encoder", "Electra", f"{HEADS_OF_ENCODERS} -PreTraining -CausalLM"),
        BERT | {"embedding_size": 16, "summary_last_dropout": 0.0},
    ),
    Row(
        *("encoder_decoder", "seq2seq", ("EncoderDecoderModel",), "EncoderDecoderConfig"),
        {"encoder": "bert", "decoder": "bert"},
        {"roberta-gpt2": {"encoder": "roberta", "decoder": "gpt2"}},
    ),
    _row("gemma2", "decoder", "Gemma2", f"Model -CausalLM {CLASSIFIERS}", GEMMA),
    _row(
        *("gemma3_text", "decoder", "Gemma3", "TextModel -CausalLM Text-SequenceClassification", GEMMA),
        config="Gemma3TextConfig",
    ),
    _row("gpt2", "decoder", "GPT2", f"Model LMHeadModel {READERS} DoubleHeadsModel", GPT2),
    _row(
        *("gptj", "decoder", "GPTJ", "Model -CausalLM -SequenceClassification -QuestionAnswering"),
        GPT2 | {"rotary_dim": 4},
    ),
    _row(
        *("llama", "decoder", "Llama", f"Model -CausalLM {READERS}", LLAMA),
        variants={"biased": {"attention_bias": True, "mlp_bias": True}},
    ),
    _row("mbart", "seq2seq", "MBart", HEADS_OF_BART, BART, pad=1, eos=2),
    _row(
        *("mistral", "decoder", "Mistral", f"Model -CausalLM {READERS}"),
        LLAMA | {"sliding_window": WINDOW},
    ),
    _row(
        *("modernbert", "encoder", "ModernBert", HEADS_OF_ENCODERS),
        BERT
        | {
            "local_attention": WINDOW,
            "layer_types": ["full_attention", "sliding_attention"],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "cls_token_id": 1,
            "sep_token_id": 2,
            "attention_dropout": 0.0,
        },
        variants={"biased": {"attention_bias": True, "mlp_bias": True, "norm_bias": True}},
    ),
    _row("mt5", "seq2seq", "MT5", HEADS_OF_T5, T5 | {"feed_forward_proj": "gated-gelu"}, eos=1),
    _row(
        *("phi", "decoder", "Phi", f"Model -CausalLM {CLASSIFIERS}"),
        LLAMA | {"partial_rotary_factor": 0.5},
    ),
    _row("phi3", "decoder", "Phi3", f"Model -CausalLM {CLASSIFIERS}", LLAMA | {"sliding_window": WINDOW}),
    _row(
        *("plbart", "seq2seq", "PLBart"),
        "Model -ConditionalGeneration -SequenceClassification -CausalLM",
        BART,
        pad=1,
        eos=2,
    ),
    _row(
        *("qwen2", "decoder", "Qwen2", f"Model -CausalLM {READERS}"),
        LLAMA | MIXED_WINDOWS | {"use_sliding_window": True},
    ),
    _row("qwen3", "decoder", "Qwen3", f"Model -CausalLM {READERS}", LLAMA | {"head_dim": HEAD_DIM}),
    _row("roberta", "encoder", "Roberta", f"{HEADS_OF_ENCODERS} -CausalLM", ROBERTA, pad=1),
    _row(
        *("t5", "seq2seq", "T5", HEADS_OF_T5, T5),
        variants={"gated": {"feed_forward_proj": "gated-gelu"}},
        eos=1,
    ),
    _row("vit", "image", "ViT", "Model -MaskedImageModeling -ImageClassification", VIT),
    _row(
        *("whisper", "audio", "Whisper", "Model -ConditionalGeneration -CausalLM -AudioClassification"),
        WHISPER,
    ),
    _row("xlm_roberta", "encoder", "XLMRoberta", f"{HEADS_OF_ENCODERS} -CausalLM", ROBERTA, pad=1),
    _row(
        *("xmod", "encoder", "Xmod", f"{HEADS_OF_ENCODERS} -CausalLM"),
        ROBERTA | {"languages": ["en_XX", "de_DE"], "default_language": "en_XX"},
        pad=1,
    ),
)

ROWS: dict[str, Row] = {row.name: row for row in _rows}

WORKS_FROM = {"XLMRobertaForMultipleChoice": "5.14"}  # built without the pooler that it reads, before that

# ------------------------------------------------------------------------------------------------- models


def model_class(row: str, cls: str | None = None) -> type[nn.Module]:
    """A class of the row, the bare base model unless named."""
    name = cls or ROWS[row].classes[0]
    if name not in ROWS[row].classes:
        raise KeyError(f"row {row} has no class {name}")
    return TinyClassifier if row == "custom" else getattr(transformers, name)


def classes(row: str) -> tuple[str, ...]:
    """The classes of the row that this version of transformers has, and has in working order."""
    here = Version(transformers.__version__)
    working = (cls for cls in ROWS[row].classes if here >= Version(WORKS_FROM.get(cls, "0")))
    return tuple(cls for cls in working if row == "custom" or hasattr(transformers, cls))


def can_generate(row: str, cls: str) -> bool:
    """Whether `generate` works with what `inputs` gives: classes with a head for language modeling."""
    unfit = cls.endswith("DoubleHeadsModel") or cls == "WhisperForCausalLM"  # texts in 3-D; half of a cache
    return issubclass(model_class(row, cls), GenerationMixin) and not unfit


def config(row: str, cls: str | None = None, **overrides: Any) -> PreTrainedConfig:
    """The config of a class: settings of the row, then needs of the class, then overrides."""
    found = ROWS[row]
    name = cls or found.classes[0]
    settings = {**found.settings, **_needs(found, name), **overrides}
    if row == "clip":
        return _clip_config(name, settings)
    if row == "encoder_decoder":
        return _pair_config(settings)
    return getattr(transformers, found.config)(**settings)


def _needs(row: Row, cls: str) -> dict[str, Any]:
    pairs = cls.endswith(("QuestionAnswering", "ForPreTraining"))  # start and end, in order or swapped
    needs: dict[str, Any] = {"num_labels": 2 if pairs else draws.LABELS}
    if row.kind not in ("image", "clip"):
        needs["pad_token_id"] = row.pad
    if row.kind == "encoder" and cls.endswith(("ForCausalLM", "LMHeadModel", "GenerationDecoder")):
        needs["is_decoder"] = True
    if cls == "BeitForMaskedImageModeling":
        needs["use_mask_token"] = True
    if cls == "BeitForSemanticSegmentation":
        needs |= {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]}
    return needs


def _clip_config(cls: str, settings: dict[str, Any]) -> PreTrainedConfig:
    """Config of one tower or of both; text_config and vision_config then hold overrides for one."""
    text, vision = CLIP_TEXT | {"pad_token_id": ROWS["clip"].pad}, CLIP_VISION
    if cls.startswith("CLIPText"):
        return transformers.CLIPTextConfig(**text | settings)
    if cls.startswith("CLIPVision"):
        return transformers.CLIPVisionConfig(**vision | settings)
    towers = {
        "text_config": text | settings.pop("text_config", {}),
        "vision_config": vision | settings.pop("vision_config", {}),
    }
    return transformers.CLIPConfig(**{"projection_dim": PROJECTION} | towers | settings)


def _pair_config(settings: dict[str, Any]) -> PreTrainedConfig:
    """Config of two rows as encoder and decoder; two different rows also get different widths."""
    encoder, decoder = settings.pop("encoder"), settings.pop("decoder")
    wider = {"hidden_size": 48} if encoder != decoder else {}
    pad = {"pad_token_id": ROWS["encoder_decoder"].pad}
    both = config(encoder, **pad | wider), config(decoder, **pad)
    return transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        *both, **{"decoder_start_token_id": 1, "eos_token_id": 2} | settings
    )


def build(
    row: str,
    cls: str | None = None,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    attn: str | None = None,
    **overrides: Any,
) -> nn.Module:
    """A model in eval mode; the seed decides every weight, the overrides go into its config."""
    wanted = model_class(row, cls)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if row == "custom":
            model = wanted(**overrides)
        else:
            model = wanted(config(row, cls, **overrides | ({"attn_implementation": attn} if attn else {})))
    redraw(model, seed)
    return model.to(dtype).eval()


@torch.no_grad()
def redraw(model: nn.Module, seed: int) -> None:
    """Draw every matrix anew, large enough for attention to be uneven; move biases and norms a little."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():  # tied ones are listed once
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise * 0.15 if parameter.dim() > 1 else parameter + noise * 0.05)


# --------------------------------------------------------------------------------------- inputs and outputs


def shape(row: str, cls: str | None = None) -> draws.Shape:
    """What a class takes."""
    found = ROWS[row]
    name = cls or found.classes[0]
    heads = name.removeprefix("CLIP")
    text = found.kind in ("encoder", "decoder", "seq2seq", "custom") or name == "WhisperForCausalLM"
    pair = found.kind in ("seq2seq", "audio") and not name.endswith(("ForCausalLM", "EncoderModel"))
    return draws.Shape(
        text=text or (found.kind == "clip" and heads.startswith(("Model", "Text"))),
        choices=name.endswith(("MultipleChoice", "DoubleHeadsModel")),
        decoder=pair and not name.endswith(("Classification", "QuestionAnswering")),
        image=found.kind == "image" or (found.kind == "clip" and not heads.startswith("Text")),
        patches=name.endswith("MaskedImageModeling"),
        audio=found.kind == "audio" and not name.endswith("ForCausalLM"),
        states=HIDDEN if name == "WhisperForCausalLM" else 0,
        left=found.kind == "decoder",
        pad=found.pad,
        eos=found.eos,
    )


def inputs(
    row: str,
    cls: str | None = None,
    *,
    batch: int = 2,
    seed: int = 0,
    padded: bool = True,
    labels: bool = False,
) -> dict[str, Tensor]:
    """What the class takes; the first example of the batch has full length, the others have padding."""
    generator = torch.Generator().manual_seed(seed)
    given = draws.draw(shape(row, cls), batch, padded=padded, generator=generator)
    if not labels:
        return given
    wanted = model_class(row, cls)
    names = inspect.signature(wanted.forward).parameters
    return given | draws.labels(wanted.__name__, given, names, generator)


def fields(result: Mapping[str, Any]) -> dict[str, Tensor]:
    """The main outputs of a model by name: no loss, no cache, no states from the way there."""
    return {
        name: value
        for name, value in result.items()
        if isinstance(value, Tensor) and "loss" not in name and name != "encoder_last_hidden_state"
    }


def output(result: Mapping[str, Any]) -> Tensor:
    """All main outputs of a model as one flat tensor, to compare two runs."""
    return torch.cat([value.flatten() for value in fields(result).values()])
