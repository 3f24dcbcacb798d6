"""The kinds of values that the models of the language are made of."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints
from pydantic_core import PydanticCustomError

from adapterkit.spec.vocabulary import RESERVED

Scalar = bool | int | float | str
When = Annotated[
    dict[str, Scalar],
    Field(min_length=1, description="config field: value. Required on the model if all hold, absent if not."),
]
Batch = Literal["first", "second", "none"]
Lacking = Literal["q", "k", "v", "o", "gate", "up", "down", "branch", "core"]
NO_ROLE = "_"
"""What stands for rows of no role in the order of a fused matrix."""
PATH = re.compile(r"^(\.|[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*)$")
GLOB = re.compile(r"^[A-Za-z0-9_*]+(\.[A-Za-z0-9_*]+)*$")
_NAME = re.compile(r"^[A-Za-z][A-Za-z0-9_]*$")


def complaint(code: str, message: str) -> PydanticCustomError:
    """An error whose type is the code that users see."""
    return PydanticCustomError(code.replace("-", "_"), "{text}", {"text": message})


def _name(word: str) -> str:
    if not _NAME.match(word):
        raise complaint(
            "bad-name", f"{word!r} is not a name: letters a to z, digits and '_', starting with a letter"
        )
    return word


def _extra_name(word: str) -> str:
    if word in RESERVED:
        raise complaint(
            "reserved-name", f"{word!r} is a word of the language and cannot name an extra module"
        )
    return _name(word)


Name = Annotated[
    str, StringConstraints(strict=True), BeforeValidator(lambda w: _name(w) if isinstance(w, str) else w)
]
ExtraName = Annotated[str, BeforeValidator(lambda w: _extra_name(w) if isinstance(w, str) else w)]
Reason = Annotated[str, Field(min_length=3, description="a sentence for people")]


def _sequence(value: Any) -> Any:
    """YAML gives lists; the models hold tuples, so that they can be hashed."""
    return tuple(value) if isinstance(value, list) else value


FromList = BeforeValidator(_sequence)
Strings = Annotated[tuple[str, ...], BeforeValidator(_sequence, json_schema_input_type=list[str])]
OneOrMore = Annotated[
    tuple[str, ...],
    BeforeValidator(
        lambda v: (v,) if isinstance(v, str) else _sequence(v), json_schema_input_type=str | list[str]
    ),
]


OneOrMoreWhen = Annotated[
    tuple[When, ...],
    BeforeValidator(
        lambda v: (v,) if isinstance(v, dict) else _sequence(v),
        json_schema_input_type=dict[str, Scalar] | list[dict[str, Scalar]],
    ),
]


def no_bool(value: Any) -> Any:
    # to Python true is 1
    return str(value).lower() if isinstance(value, bool) else value


def hash_of(model: BaseModel) -> int:
    """Hash of a frozen model, some of whose fields may be maps."""
    values = (
        frozenset(value.items()) if isinstance(value, dict) else value for value in model.__dict__.values()
    )
    return hash((type(model), *values))


class Model(BaseModel):
    """Base of all parts of an interface: immutable, unknown words refused, no silent conversion."""

    # only the whole is ever validated, so that the parts need no validators of their own
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, defer_build=True)

    def __hash__(self) -> int:
        return hash_of(self)
