"""The table: families, their classes, and the settings that make their configs tiny.

The dimensions differ where real models differ (heads against key/value heads, hidden against intermediate,
towers against each other), so that a mix-up of two of them fails instead of passing by luck.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tests.models.inputs import FRAMES, IMAGE, MELS, PATCH

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
    """A row whose classes are named prefix + suffix, where a leading "-" of a suffix is short for "For"."""
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
ALBERT = BERT | {
    "embedding_size": 16,
    "num_hidden_layers": 4,
    "num_hidden_groups": 2,
    "classifier_dropout_prob": 0.0,
}
BERT_GENERATION = BERT | {"bos_token_id": 2, "eos_token_id": 1}
ELECTRA = BERT | {"embedding_size": 16, "summary_last_dropout": 0.0}
MODERNBERT = BERT | {
    "local_attention": WINDOW,
    "layer_types": ["full_attention", "sliding_attention"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "attention_dropout": 0.0,
}
ROBERTA = BERT | {"type_vocab_size": 1}
XMOD = ROBERTA | {"languages": ["en_XX", "de_DE"], "default_language": "en_XX"}
RELATIVE = BERT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "pooler_dropout": 0.0}
DEBERTA = RELATIVE | {"max_relative_positions": 16}
DEBERTA_V2 = RELATIVE | {"position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True}
DISTILBERT = {
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
}
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
WINDOWED = LLAMA | {"sliding_window": WINDOW}
ALTERNATING = WINDOWED | {"layer_types": ["sliding_attention", "full_attention"]}
GEMMA = ALTERNATING | {"head_dim": HEAD_DIM, "query_pre_attn_scalar": HEAD_DIM}
QWEN2 = ALTERNATING | {"use_sliding_window": True}
QWEN3 = LLAMA | {"head_dim": HEAD_DIM}
PHI = LLAMA | {"partial_rotary_factor": 0.5}
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
GPTJ = GPT2 | {"rotary_dim": 4}
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
MT5 = T5 | {"feed_forward_proj": "gated-gelu"}
VIT = {
    "image_size": IMAGE,
    "patch_size": PATCH,
    "encoder_stride": PATCH,
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
    "num_mel_bins": MELS,
    "max_source_positions": FRAMES // 2,
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
    "image_size": IMAGE,
    "patch_size": PATCH,
    "hidden_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 56,
    "projection_dim": PROJECTION,
}

# ---------------------------------------------------------------------------------------------- the table

CLASSIFIERS = "-SequenceClassification -TokenClassification"
READERS = f"{CLASSIFIERS} -QuestionAnswering"
ENCODERS = f"Model -MaskedLM {READERS} -MultipleChoice"
BARTS = "Model -ConditionalGeneration -SequenceClassification -CausalLM"
T5S = f"Model -ConditionalGeneration EncoderModel {READERS}"
BERTS = f"{ENCODERS} -PreTraining -NextSentencePrediction LMHeadModel"
BEITS = "Model -MaskedImageModeling -ImageClassification -SemanticSegmentation"
CLIPS = "Model TextModel VisionModel TextModelWithProjection VisionModelWithProjection -ImageClassification"
WHISPERS = "Model -ConditionalGeneration -CausalLM -AudioClassification"

BIASED = {"biased": {"attention_bias": True, "mlp_bias": True}}
GATED = {"gated": {"feed_forward_proj": "gated-gelu"}}
UNSHARED = {"unshared": {"share_att_key": False}}
MIXED = {"roberta-gpt2": {"encoder": "roberta", "decoder": "gpt2"}}
PAIR = {"encoder": "bert", "decoder": "bert"}

# fmt: off
_rows = (
    _row("albert", "encoder", "Albert", f"{ENCODERS} -PreTraining", ALBERT),
    _row("bart", "seq2seq", "Bart", f"{BARTS} -QuestionAnswering", BART, pad=1, eos=2),
    _row("beit", "image", "Beit", BEITS, BEIT),
    _row("bert", "encoder", "Bert", BERTS, BERT),
    _row("bert_generation", "encoder", "BertGeneration", "Encoder Decoder", BERT_GENERATION),
    _row("clip", "clip", "CLIP", CLIPS, {}, pad=1, eos=CLIP_TEXT["eos_token_id"]),
    _row("custom", "custom", "Tiny", "Classifier", {}),
    _row("deberta", "encoder", "Deberta", f"Model -MaskedLM {READERS}", DEBERTA),
    _row("deberta_v2", "encoder", "DebertaV2", ENCODERS, DEBERTA_V2, variants=UNSHARED),
    _row("distilbert", "encoder", "DistilBert", ENCODERS, DISTILBERT),
    _row("electra", "encoder", "Electra", f"{ENCODERS} -PreTraining -CausalLM", ELECTRA),
    _row("encoder_decoder", "seq2seq", "EncoderDecoder", "Model", PAIR, variants=MIXED),
    _row("gemma2", "decoder", "Gemma2", f"Model -CausalLM {CLASSIFIERS}", GEMMA),
    _row("gemma3_text", "decoder", "Gemma3", "TextModel -CausalLM Text-SequenceClassification", GEMMA,
         config="Gemma3TextConfig"),
    _row("gpt2", "decoder", "GPT2", f"Model LMHeadModel {READERS} DoubleHeadsModel", GPT2),
    _row("gptj", "decoder", "GPTJ", "Model -CausalLM -SequenceClassification -QuestionAnswering", GPTJ),
    _row("llama", "decoder", "Llama", f"Model -CausalLM {READERS}", LLAMA, variants=BIASED),
    _row("mbart", "seq2seq", "MBart", f"{BARTS} -QuestionAnswering", BART, pad=1, eos=2),
    _row("mistral", "decoder", "Mistral", f"Model -CausalLM {READERS}", WINDOWED),
    _row("modernbert", "encoder", "ModernBert", ENCODERS, MODERNBERT, variants=BIASED),
    _row("mt5", "seq2seq", "MT5", T5S, MT5, eos=1),
    _row("phi", "decoder", "Phi", f"Model -CausalLM {CLASSIFIERS}", PHI),
    _row("phi3", "decoder", "Phi3", f"Model -CausalLM {CLASSIFIERS}", WINDOWED),
    _row("plbart", "seq2seq", "PLBart", BARTS, BART, pad=1, eos=2),
    _row("qwen2", "decoder", "Qwen2", f"Model -CausalLM {READERS}", QWEN2),
    _row("qwen3", "decoder", "Qwen3", f"Model -CausalLM {READERS}", QWEN3),
    _row("roberta", "encoder", "Roberta", f"{ENCODERS} -CausalLM", ROBERTA, pad=1),
    _row("t5", "seq2seq", "T5", T5S, T5, eos=1, variants=GATED),
    _row("vit", "image", "ViT", "Model -MaskedImageModeling -ImageClassification", VIT),
    _row("whisper", "audio", "Whisper", WHISPERS, WHISPER),
    _row("xlm_roberta", "encoder", "XLMRoberta", f"{ENCODERS} -CausalLM", ROBERTA, pad=1),
    _row("xmod", "encoder", "Xmod", f"{ENCODERS} -CausalLM", XMOD, pad=1),
)
# fmt: on

ROWS: dict[str, Row] = {row.name: row for row in _rows}

WORKS_FROM = {"XLMRobertaForMultipleChoice": "5.14"}  # built without the pooler that it reads, before that
