"""One table of tiny models, built from configs without any download: one row for every shipped interface.

    model = build("bert", "BertForSequenceClassification", seed=1)
    outputs = output(model(**inputs("bert", "BertForSequenceClassification", labels=True)))

The table itself is in rows.py, what a class is fed with in inputs.py.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig

from tests.models import inputs as draws
from tests.models.custom import TinyClassifier
from tests.models.rows import CLIP_TEXT, CLIP_VISION, HIDDEN, PROJECTION, ROWS, WORKS_FROM, Row

# ------------------------------------------------------------------------------------------------- models


def model_class(row: str, cls: str | None = None) -> type[nn.Module]:
    """A class of the row, the bare base model unless named."""
    name = cls or ROWS[row].classes[0]
    if name not in ROWS[row].classes:
        raise KeyError(f"row {row} has no class {name}")
    return TinyClassifier if row == "custom" else _imported(name)


def _imported(name: str) -> Any:
    """A class of transformers, None if this version has none of that name."""
    with warnings.catch_warnings():
        # said while DeBERTa of the oldest supported version is imported
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
        return getattr(transformers, name, None)


def classes(row: str) -> tuple[str, ...]:
    """The classes of the row that this version of transformers has, and has in working order."""
    here = Version(transformers.__version__)
    working = (cls for cls in ROWS[row].classes if here >= Version(WORKS_FROM.get(cls, "0")))
    return tuple(cls for cls in working if row == "custom" or _imported(cls) is not None)


def can_generate(row: str, cls: str) -> bool:
    """Whether `generate` works with what `inputs` gives: classes with a head for language modeling."""
    unfit = (
        "GPT2DoubleHeadsModel",
        "WhisperForCausalLM",
    )  # 3-D texts; not always the right cache
    return cls in classes(row) and cls not in unfit and issubclass(model_class(row, cls), GenerationMixin)


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
