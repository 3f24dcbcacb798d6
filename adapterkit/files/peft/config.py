"""`adapter_config.json` of PEFT: fields that change numbers, fields that do not, fields that are refused."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from adapterkit.errors import FileFormatError, Problem, listing

CONFIG = "adapter_config.json"
Names = tuple[str, ...]
T = TypeVar("T")


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _map(value: Any) -> Any:
    return {} if value is None else value


Matcher = Annotated[Names | str | None, BeforeValidator(_tuple)]
Numbers = Annotated[tuple[int, ...] | int | None, BeforeValidator(_tuple)]


class PeftFile(BaseModel):
    """Fields that all types share; further ones are kept in `model_extra` and judged by `_refused`."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    peft_type: str
    target_modules: Matcher = None
    exclude_modules: Matcher = None
    modules_to_save: Annotated[Names | None, BeforeValidator(_tuple)] = None
    layers_to_transform: Numbers = None
    layers_pattern: Matcher = None

    def matches(self, path: str) -> bool:
        """Whether PEFT adapts the module at `path`.

        A string is a regular expression for the whole path, a name in a list may also be its end; the first
        number in the path is that of the layer.
        Source: peft 0.21 tuners/tuners_utils.py, check_target_module_exists.
        """
        if _named(self.exclude_modules, path) or _kept(self.modules_to_save, path):
            return False
        if isinstance(self.target_modules, str):
            return self.target_modules.lower() == "all-linear" or _named(self.target_modules, path)
        return _named(self.target_modules, path) and (
            path in (self.target_modules or ()) or self._in_layers(path)
        )

    def _in_layers(self, path: str) -> bool:
        wanted = self.layers_to_transform
        if wanted is None or wanted == ():
            return True
        patterns = self.layers_pattern or ()
        patterns = (patterns,) if isinstance(patterns, str) else patterns
        rules = [rf"(?:^|.*?\.){p}\.(?P<layer>\d+)\." for p in patterns] or [r".*?\.[^.]*\.(?P<layer>\d+)\."]
        found = next((match for match in (re.match(rule, path) for rule in rules) if match), None)
        return found is not None and int(found["layer"]) in ((wanted,) if isinstance(wanted, int) else wanted)


class LoRAFile(PeftFile):
    """Fields of LoRA and DoRA."""

    r: int = Field(8, ge=1)
    lora_alpha: int | float = 8
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: Annotated[dict[str, int], BeforeValidator(_map)] = Field(default_factory=dict)
    alpha_pattern: Annotated[dict[str, int | float], BeforeValidator(_map)] = Field(default_factory=dict)

    def rank(self, path: str) -> int:
        return pattern_value(self.rank_pattern, path, self.r)

    def alpha(self, path: str) -> float:
        return float(pattern_value(self.alpha_pattern, path, self.lora_alpha))


class IA3File(PeftFile):
    """Fields of (IA)^3."""

    feedforward_modules: Matcher = None

    def is_feedforward(self, path: str) -> bool:
        """Whether the input is scaled.

        Source: peft 0.21 tuners/ia3/model.py, _check_target_module_feedforward.
        """
        said = self.feedforward_modules or ()
        if isinstance(said, str):
            return re.fullmatch(said, path) is not None
        return any(path.endswith(name) for name in said)


class VeRAFile(PeftFile):
    """Fields of VeRA."""

    r: int = Field(256, ge=1)
    vera_dropout: float = Field(0.0, ge=0, lt=1)
    d_initial: float = 0.1


class PromptFile(PeftFile):
    """Fields of prompt tuning."""

    task_type: str | None = None
    num_virtual_tokens: int = Field(ge=1)
    num_transformer_submodules: int | None = None


TYPES: dict[str, type[PeftFile]] = {
    "LORA": LoRAFile,
    "IA3": IA3File,
    "VERA": VeRAFile,
    "PROMPT_TUNING": PromptFile,
}

# how the file came to be, or what only other fields make use of
IDLE = frozenset(
    "task_type auto_mapping peft_version base_model_name_or_path revision inference_mode fan_in_fan_out "
    "runtime_config megatron_core qalora_group_size loftq_config eva_config corda_config lora_ga_config "
    "init_ia3_weights init_weights projection_prng_key save_projection token_dim num_attention_heads "
    "num_layers prompt_tuning_init prompt_tuning_init_text tokenizer_name_or_path tokenizer_kwargs".split()
)
_EMPTY: tuple[Any, ...] = (None, False, [], {}, "")


@dataclass(frozen=True)
class _Rule:
    """A field that may only have plain values."""

    code: str
    why: str
    plain: tuple[Any, ...]


def _only(code: str, why: str, *plain: Any) -> _Rule:
    return _Rule(code, why, plain or _EMPTY)


_UNKNOWN = _only("peft-field", "a field that this adapterkit does not know")
_VARIANT = _only("peft-variant", "a variant of LoRA that adapterkit has not got")
_CHANGED = (
    "the weights of the base model were changed at the start; PEFT can save the difference to the plain "
    "model with path_initial_model_for_weight_conversion"
)
REFUSED: dict[str, _Rule] = {
    "bias": _only("peft-bias", "biases of the base model were trained too", "none"),
    "lora_bias": _only("peft-bias", "the updates have biases"),
    "init_lora_weights": _only("peft-init", _CHANGED, True, False, None, "gaussian", "eva", "orthogonal"),
    "layer_replication": _only("peft-layers", "layers of the base model were repeated"),
    "trainable_token_indices": _only("peft-tokens", "single rows of the embeddings were trained"),
    "ensure_weight_tying": _only("peft-tokens", "updates are tied to those of the embeddings"),
    "target_parameters": _only("peft-parameters", "parameters were adapted that are no modules"),
    "megatron_config": _only("peft-megatron", "the layers are Megatron's"),
    "alora_invocation_tokens": _only("peft-alora", "the updates act only after certain tokens"),
    "use_qalora": _VARIANT,
    "use_bdlora": _VARIANT,
    "arrow_config": _VARIANT,
    "kasa_config": _VARIANT,
    "velora_config": _VARIANT,
    "monteclora_config": _VARIANT,
}


PREFIX_MOVES = "PEFT's prefix is a cache, which moves the positions of all tokens by its length"


def parse(data: Mapping[str, Any], file: str) -> PeftFile:
    """The config of a type that is known, with nothing in it that would change the numbers unnoticed.

    Raises: FileFormatError: another type, wrong values, fields that cannot be honoured; all of them at once.
    """
    kind = data.get("peft_type")
    if kind == "PREFIX_TUNING":
        raise FileFormatError(Problem("peft-prompt", PREFIX_MOVES, "peft_type", file=file))
    if not isinstance(kind, str) or kind not in TYPES:
        message = f"holds an adapter of type {str(kind)!r}"
        raise FileFormatError(
            Problem("peft-type", message, "peft_type", f"one of {listing(TYPES)}", file=file)
        )
    try:
        said = TYPES[str(kind)].model_validate(dict(data))
    except ValidationError as error:
        raise FileFormatError(
            Problem(
                "bad-file", f"{item['input']!r} does not fit", str(item["loc"][0]), item["msg"], file=file
            )
            for item in error.errors(include_url=False)
        ) from None
    problems = [
        problem for field, value in (said.model_extra or {}).items() for problem in _judge(field, value, file)
    ]
    for field, pattern in _patterns(said):
        try:
            re.compile(pattern)
        except re.error as error:
            message = f"{pattern!r} is no regular expression: {error}"
            problems.append(Problem("bad-file", message, field, file=file))
    if problems:
        raise FileFormatError(problems)
    return said


def _judge(field: str, value: Any, file: str) -> Iterable[Problem]:
    rule = REFUSED.get(field, _UNKNOWN)
    # 0 == False and 1 == True, but they are other values
    plain = any(type(value) is type(same) and value == same for same in rule.plain)
    if field not in IDLE and not plain:
        yield Problem(rule.code, f"{f'{field} is {value!r}'[:120]}: {rule.why}", field, file=file)


def _patterns(said: PeftFile) -> Iterable[tuple[str, str]]:
    """(field, pattern) for everything that is used as a regular expression."""
    for field in ("target_modules", "exclude_modules", "feedforward_modules", "layers_pattern"):
        value = getattr(said, field, None)
        if isinstance(value, str):
            yield field, value
    for field in ("layers_pattern", "modules_to_save", "rank_pattern", "alpha_pattern"):
        value = getattr(said, field, None)
        yield from ((field, pattern) for pattern in value or () if not isinstance(value, str))


def pattern_value(patterns: Mapping[str, T], path: str, default: T) -> T:
    """The value of the first pattern that is the end of the path.

    Source: peft 0.21 utils/other.py, get_pattern_key.
    """
    return next((v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), default)


def _named(said: Names | str | None, path: str) -> bool:
    if isinstance(said, str):
        return bool(said) and re.fullmatch(said, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in said or ())


def _kept(names: Names | None, path: str) -> bool:
    """Whether a module lies in one of modules_to_save, where PEFT adapts nothing."""
    return any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in names or ())
