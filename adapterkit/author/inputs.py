"""Dummy inputs of any model: what each argument of its forward may be, from its name and the config.

An argument may have several forms (an image, a list of patches, frames of a film); the one that runs is
found by trying. Nothing is downloaded, the seed decides every number.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

BATCH, SEQ, DECODER_SEQ, FRAMES = 2, 7, 5, 2
FIRST_WORD, LAST_WORD = 5, 60
TRIES, ASKED = 60, 3

MEDIA = frozenset({"pixel_values", "input_features", "input_values", "audio_values"})

_SUB = "model_type"
Inputs = dict[str, Any]


class NotRunning(Exception):  # noqa: N818 - a fact for the caller, who makes an error of it
    """No inputs were found with which the model runs; `reasons` are the errors of what was tried."""

    def __init__(self, reasons: list[str]) -> None:
        super().__init__(reasons[0] if reasons else "nothing to try")
        self.reasons = reasons


def draw(model: nn.Module, seed: int = 0, given: Mapping[str, Any] | None = None) -> Inputs:
    """Inputs with which the model's forward runs.

    Args: given: what is known of some arguments; the rest is found.
    Raises: NotRunning.
    """
    reasons: list[str] = []
    drawer = Drawer(model, seed)
    for inputs in itertools.islice(drawer.candidates(), TRIES):
        found = _running(drawer, inputs | dict(given or {}), reasons)
        if found is not None:
            return found
    raise NotRunning(reasons)


def is_blind(model: nn.Module, inputs: Inputs) -> bool:
    """Whether a model takes images or sound beside its tokens, and these inputs hold none."""
    names = Drawer(model).names
    return "input_ids" in names and bool(MEDIA & set(names)) and not MEDIA & inputs.keys()


def _running(drawer: Drawer, inputs: Inputs, reasons: list[str]) -> Inputs | None:
    """The inputs, with what the model asks for by name, if it runs on them."""
    for _ in range(ASKED):
        try:
            run(drawer.model, inputs)
        except Exception as error:  # models raise anything on inputs that do not fit
            reason = f"{type(error).__name__}: {error}"
            reasons += [reason] if reason not in reasons else []
            asked = [n for n in drawer.names if n not in inputs and re.search(rf"\b{n}\b", reason)]
            more = {name: drawer.named(name, inputs) for name in asked}
            more = {name: value for name, value in more.items() if value is not None}
            if not more:
                return None
            inputs = inputs | more
        else:
            return inputs
    return None


@torch.no_grad()
def run(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """One forward in eval mode."""
    return model.eval()(**inputs)


class Drawer:
    """The forms that each argument of a model may have."""

    def __init__(self, model: nn.Module, seed: int = 0) -> None:
        self.model = model
        self.seed = seed
        self.config = getattr(model, "config", None)
        self.configs = list(_tree(self.config)) if self.config is not None else []
        parameters = inspect.signature(model.forward).parameters
        self.names = [
            name for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        ]
        self.required = {name for name in self.names if parameters[name].default is inspect.Parameter.empty}
        self.generator = torch.Generator()

    def candidates(self) -> Iterator[Inputs]:
        """Sets of inputs, the likeliest first."""
        main = getattr(self.model, "main_input_name", None)
        media = [list(group) for group in self._media()]
        text = self._text()
        for kind in media:
            for form in kind:
                self.generator.manual_seed(self.seed)
                inputs = form()
                if not inputs:
                    continue
                with_text = "input_ids" in self.names
                if with_text:
                    yield inputs | self._prompted(inputs)
                yield inputs | self._needed(inputs)
        if main is None or main in self.names or "input_ids" in self.names or text:
            yield text | self._needed(text)
        every = [next((f for f in map(lambda form: form(), kind) if f), {}) for kind in media]
        if len(every) > 1:
            joined = {k: v for one in every for k, v in one.items()}
            yield joined | self._prompted(joined) | self._needed(joined)
        for shape in ((BATCH, SEQ), (BATCH, SEQ, self._width()), (BATCH, 3, 32, 32)):
            for draw in (*self._words(), self._floats):
                self.generator.manual_seed(self.seed)
                yield {name: draw(*shape) for name in self.required or set(self.names[:1])}

    # -------------------------------------------------------------------------------------------- numbers

    def _floats(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def _ids(self, *shape: int, below: int = LAST_WORD) -> Tensor:
        last = min(below, self.find("vocab_size") or below)
        first = min(FIRST_WORD, last - 1)
        return torch.randint(first, last, shape, generator=self.generator)

    def _words(self) -> Iterator[Callable[..., Tensor]]:
        """Ways to draw ids: as usual, then below the size of each smaller table that is called with some."""
        sizes = {table.num_embeddings for table in self.model.modules() if isinstance(table, nn.Embedding)}
        for below in (LAST_WORD, *sorted((size for size in sizes if 0 < size < LAST_WORD), reverse=True)):
            yield partial(self._ids, below=below)

    def find(self, *patterns: str, kind: type = int) -> Any:
        """The first field of a config whose name matches, in the order of the patterns."""
        for pattern in patterns:
            for config in self.configs:
                for name, value in vars(config).items():
                    if (
                        re.fullmatch(pattern, name)
                        and isinstance(value, kind)
                        and not isinstance(value, bool)
                    ):
                        return value
        return None

    def _width(self) -> int:
        return self.find("hidden_size", "d_model", "embed_dim", "n_embd", "dim") or 32

    # ----------------------------------------------------------------------------------------------- text

    def _text(self) -> Inputs:
        self.generator.manual_seed(self.seed)
        inputs: Inputs = {}
        if "input_ids" in self.names:
            inputs["input_ids"] = self._ids(BATCH, SEQ)
        if "attention_mask" in self.names and inputs:
            inputs["attention_mask"] = torch.ones(BATCH, SEQ, dtype=torch.long)
        return inputs

    def _needed(self, inputs: Inputs) -> Inputs:
        """What the forward takes besides: the decoder's side, and what has no default."""
        more: Inputs = {}
        if "decoder_input_ids" in self.names:
            more["decoder_input_ids"] = self._ids(BATCH, DECODER_SEQ)
        for name in self.names:
            if name in inputs or name in more or name not in self.required:
                continue
            made = self.named(name, inputs)
            if made is not None:
                more[name] = made
        return more

    def named(self, name: str, inputs: Inputs) -> Any:
        """An argument that the model asks for, by its name; None if the name says nothing."""
        pixels = inputs.get("pixel_values")
        texts = inputs.get("input_ids", inputs.get("inputs_embeds"))
        length = texts.shape[1] if texts is not None else SEQ
        if name in ("pixel_values", "input_features", "input_values"):
            return None  # these have forms
        if name == "pixel_mask" and pixels is not None:
            return torch.ones(pixels.shape[0], *pixels.shape[-2:], dtype=torch.long)
        if name.endswith("mask") and name.startswith(("input_feat", "feature")):
            sound = inputs.get("input_features")
            return None if sound is None else torch.ones(sound.shape[0], sound.shape[-1], dtype=torch.long)
        if name.endswith("mask"):
            return torch.ones(BATCH, length, dtype=torch.long)
        if name == "bbox":
            numbers = 4 if not self.find("dim_bbox") else self.find("dim_bbox")
            return torch.zeros(BATCH, length, numbers, dtype=torch.long if numbers == 4 else torch.float)
        if name == "image_sizes":
            return torch.tensor([list(self._side())] * BATCH)
        if name.startswith("visual_"):
            size = 4 if name.endswith("pos") else self.find("visual_feat_dim", "visual_embedding_dim")
            return None if size is None else self._floats(BATCH, FRAMES, size)
        if name == "spatial_shapes":
            return torch.tensor([[2, 2]] * BATCH)
        if name.endswith("ids"):
            return self._ids(BATCH, length)
        if name.endswith(("embeds", "states", "features", "embeddings")):
            other = (
                self.find("encoder_hidden_size", "cross_attention_hidden_size") if "encoder" in name else None
            )
            return self._floats(BATCH, length, other or self._width())
        return None

    def _prompted(self, media: Inputs) -> Inputs:
        """A text with a placeholder for every feature that the media give."""
        token, count = self._placeholder(media), self._features(media)
        ids = self._ids(BATCH, SEQ)
        if token is not None and count:
            each = -(-count // BATCH)
            holes = torch.full((BATCH, each), token)
            ids = torch.cat([ids[:, :2], holes, ids[:, 2:]], 1)
        inputs = {"input_ids": ids}
        if "attention_mask" in self.names:
            inputs["attention_mask"] = torch.ones_like(ids)
        if "mm_token_type_ids" in self.names and token is not None:
            inputs["mm_token_type_ids"] = (ids == token).long()
        if "token_type_ids" in self.names and token is not None:
            inputs["token_type_ids"] = (ids == token).long()
        return inputs | {k: v for k, v in self._needed(inputs | media).items() if k not in inputs}

    def _placeholder(self, media: Inputs) -> int | None:
        kind = (
            "video"
            if any("video" in name for name in media)
            else (
                "audio"
                if any(name.startswith(("input_feat", "input_val", "audio")) for name in media)
                else "image"
            )
        )
        found: int | None = self.find(
            rf"{kind}_token_id", rf"{kind}_token_index", rf"{kind}_token_idx", rf".*{kind}.*token_(id|index)"
        )
        return found

    def _features(self, media: Inputs) -> int:
        """How many features the model makes of the media, as its own method for it shows."""
        for method in ("get_image_features", "get_video_features", "get_audio_features"):
            getter = getattr(self.model, method, None)
            if getter is None:
                continue
            names = inspect.signature(getter).parameters
            own = {name: value for name, value in media.items() if name in names}
            if not own:
                continue
            with suppress(Exception), torch.no_grad():
                return _rows(getter(**own))
        return 0

    # ---------------------------------------------------------------------------------------------- media

    def _media(self) -> Iterator[list[Callable[[], Inputs]]]:
        """For each kind of media that the forward takes, the forms it may have."""
        if "pixel_values" in self.names:
            rows = [partial(self._patches, frames, flat) for frames in (0, 1, 2) for flat in (True, False)]
            yield [*rows, self._packed, self._image, self._film, self._tiles, self._flat_image]
        elif "pixel_values_videos" in self.names:
            yield [self._video]
        for name in ("input_features", "input_values", "audio_values", "audio_input_features", "audio_mel"):
            if name in self.names:
                yield [*self._sounds(name)]
        if "grid_thw" in self.names and "hidden_states" in self.names:
            yield [partial(self._patches, frames, True) for frames in (0, 1, 2)]
        for name in ("query_embeds", "flattened_patches", "past_values", "inputs_embeds", "hidden_states"):
            if name in self.required:
                yield [lambda name=name: {name: self._floats(BATCH, SEQ, self._width())}]  # type: ignore[misc]

    def _video(self) -> Inputs:
        frames = self.find("num_frames", "frames") or FRAMES
        shape = (BATCH, min(frames, 4 * FRAMES), self._channels(), *self._side())
        return {"pixel_values_videos": self._floats(*shape)}

    def _packed(self) -> Inputs:
        """Patches of each image in a row of its own, with their grid."""
        if "spatial_shapes" not in self.names:
            return {}
        patch, count = self.find("patch_size") or 16, 4
        return {
            "pixel_values": self._floats(BATCH, count, self._channels() * patch * patch),
            "pixel_attention_mask": torch.ones(BATCH, count, dtype=torch.long),
            "spatial_shapes": torch.tensor([[2, 2]] * BATCH),
        }

    def _channels(self) -> int:
        vision = self.find("num_channels", "in_channels", "in_chans", "channels", "num_image_channels")
        return vision if isinstance(vision, int) and vision <= 16 else 3

    def _side(self) -> tuple[int, int]:
        size = self.find("image_size", "img_size", "input_size", "input_image_size", kind=(int, list, tuple))  # type: ignore[arg-type]
        if isinstance(size, list | tuple) and len(size) >= 2:
            return int(size[0]), int(size[1])
        if isinstance(size, list | tuple) and size:
            return int(size[0]), int(size[0])
        return (size, size) if isinstance(size, int) else (64, 64)

    def _image(self) -> Inputs:
        return {"pixel_values": self._floats(BATCH, self._channels(), *self._side())}

    def _film(self) -> Inputs:
        frames = self.find("num_frames", "frames") or FRAMES
        return {"pixel_values": self._floats(BATCH, frames, self._channels(), *self._side())}

    def _tiles(self) -> Inputs:
        inputs = {"pixel_values": self._floats(BATCH, 1, self._channels(), *self._side())}
        if "image_sizes" in self.names:
            inputs["image_sizes"] = torch.tensor([list(self._side())] * BATCH)
        return inputs

    def _flat_image(self) -> Inputs:
        inputs = {"pixel_values": self._floats(BATCH, self._channels(), *self._side())}
        if "image_sizes" in self.names:
            inputs["image_sizes"] = torch.tensor([list(self._side())] * BATCH)
        return inputs

    def _patches(self, frames: int = 0, flat: bool = True) -> Inputs:
        """Patches of all images in one row, with the grid that each image has.

        Args: frames: in one patch, 0: as the config says. flat: a patch is a row of numbers.
        """
        if "image_grid_thw" not in self.names and "grid_thw" not in self.names:
            return {}
        name = "pixel_values" if "pixel_values" in self.names else "hidden_states"
        said = "image_grid_thw" if "image_grid_thw" in self.names else "grid_thw"
        patch = self.find("patch_size") or 14
        merge = self.find("spatial_merge_size", "merge_size") or 2
        frames = frames or self.find("temporal_patch_size") or 1
        side = merge * 2 if isinstance(merge, int) else 4
        shape = (self._channels(), patch, patch)
        size = (self._channels() * frames * patch * patch,) if flat else shape
        inputs: Inputs = {name: self._floats(BATCH * side * side, *size)}
        inputs[said] = torch.tensor([[1, side, side]] * BATCH)
        if "merge_sizes" in self.names:
            inputs["merge_sizes"] = torch.full((BATCH,), merge)
        return inputs

    def _sounds(self, name: str) -> Iterator[Callable[[], Inputs]]:
        bins = (
            self.find("num_mel_bins", "feature_size", "input_feat_per_channel", "n_mels", "input_dim") or 80
        )
        long = 2 * (self.find("max_source_positions") or 64)
        most = self.find("max_length", "spec_size") or 256
        for shape in (
            (BATCH, most, bins),
            (BATCH, 1, most, bins),
            (BATCH, bins, long),
            (BATCH, long, bins),
            (BATCH, 100, bins),
            (BATCH, bins, 128),
            (BATCH, 4000),
            (BATCH, 1, 4000),
            (BATCH, 1, 1024, bins),
            (BATCH, SEQ, self._width()),
        ):
            yield lambda shape=shape: {name: self._floats(*shape)}  # type: ignore[misc]


def _tree(config: Any) -> Iterator[Any]:
    yield config
    for value in vars(config).values():
        if hasattr(value, _SUB):
            yield from _tree(value)


def _rows(found: Any) -> int:
    """Number of feature vectors in what a model makes of an image."""
    pooled = getattr(found, "pooler_output", None)
    if pooled is None and isinstance(found, Mapping):
        pooled = next(iter(found.values()))
    value = found if pooled is None else pooled
    if isinstance(value, Tensor):
        return value.numel() // value.shape[-1]
    if isinstance(value, list | tuple):
        return sum(_rows(one) for one in value)
    return 0
