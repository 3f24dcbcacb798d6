"""How an interface names a module: by a path, or by alternatives of which one exists."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from adapterkit.errors import listing
from adapterkit.spec.terms import PATH, Batch, ExtraName, FromList, Model, Reason, Strings, When, complaint


def check_alternatives(options: Sequence[Model] | None, kind: str) -> None:
    """Two or more, told apart by what exists; what holds for all of them stands beside 'any_of'."""
    if options is None:
        return
    if len(options) < 2:
        raise complaint("one-of", "'any_of' needs at least two alternatives")
    alone = {"path": {"any_of", "optional", "otherwise", "batch", "was"}, "block": {"any_of", "optional"}}
    outside = alone[kind]
    words = sorted({word for option in options for word in option.model_fields_set & outside})
    if words:
        raise complaint("one-of", f"an alternative takes no {listing(repr(word) for word in words)}")


class Path(Model):
    """A module, named by its path below the layer (inside a sublayer) or below the stack's root."""

    path: str | None = Field(None, description="dotted path; '.' is the root itself")
    any_of: Annotated[tuple[PathField, ...] | None, FromList] = Field(
        None, description="alternatives; exactly one must exist"
    )
    when: When | None = None
    otherwise: Reason | None = Field(
        None, description="what the module is where `when` does not hold, if it exists all the same"
    )
    optional: Reason | None = Field(
        None,
        description="why the module may be missing, where no config field decides; on all layers or on none",
    )
    batch: Batch | None = Field(
        None, description="axis of the batch in what this module is called with (default first)"
    )
    was: Strings = Field((), description="paths of this module in files made elsewhere or by older versions")

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.path is None) == (self.any_of is None):
            raise complaint("one-of", "a module is named by either 'path' or 'any_of'")
        if self.path is not None and not PATH.match(self.path):
            raise complaint(
                "bad-path",
                f"{self.path!r} is not a module path: names joined by '.', without code or patterns",
            )
        if self.otherwise is not None and self.when is None:
            raise complaint("missing-word", "'otherwise' needs 'when', the config under which this holds")
        check_alternatives(self.any_of, "path")
        return self

    @cached_property
    def plain(self) -> str | None:
        """The path, if nothing else is said."""
        return None if self.any_of or self.when or self.optional else self.path

    def names(self) -> tuple[str, ...]:
        """Every path that may be meant, in order."""
        if self.path is not None:
            return (self.path,)
        return tuple(name for option in self.any_of or () for name in option.names())


def as_path(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


PathField = Annotated[Path, BeforeValidator(as_path, json_schema_input_type=str | Path)]
Extras = Annotated[
    dict[ExtraName, PathField], Field(description="further modules that may be adapted, by name")
]


Path.model_rebuild()
Paths = Annotated[tuple[PathField, ...], FromList]
