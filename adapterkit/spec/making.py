"""How a tiny model of a type is made, where the names of its config's fields do not show it."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from adapterkit.spec.terms import FromList, Model, complaint


class Drawn(Model):
    """One argument of a tiny model's forward: numbers drawn anew, or as they stand."""

    shape: Annotated[tuple[int, ...] | None, FromList] = Field(
        None, description="shape of random numbers: normal, or whole ones with `below`"
    )
    below: int | None = Field(None, description="whole numbers from 0 to below this one")
    values: Any = Field(None, description="the numbers themselves, as lists of lists")

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.shape is None) == (self.values is None):
            raise complaint("one-of", "an input is given by either 'shape' or 'values'")
        return self


class Tiny(Model):
    """What a tiny model of a type needs besides small sizes, which the names of config fields show."""

    config: dict[str, Any] = Field(
        default_factory=dict, description="fields of its config, nested for a sub-config"
    )
    inputs: dict[str, Drawn | None] = Field(
        default_factory=dict, description="arguments of its forward, by name; null: it is not given"
    )
