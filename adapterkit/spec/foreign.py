"""What an interface tells of the files of other libraries: their names, numbers and quirks, as data."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from adapterkit.spec.terms import Model, Reason, Strings, When


class AdapterHub(Model):
    """How files of AdapterHub's `adapters` name and number what this interface names."""

    prefix: Strings = Field(
        (), description="prefixes of the base model in keys saved from classes with a head"
    )
    numbering: Literal["continuous", "separate"] = Field(
        "continuous", description="layers over several stacks"
    )
    intermediate: str = Field("mlp.up", description="slot that their `intermediate` means")
    output: str = Field("mlp.down", description="slot that their `output` means")
    ignored: Strings = Field((), description="slots that they accept and leave unadapted")
    adapters: dict[str, str] = Field(
        default_factory=dict,
        description="below a layer, what keeps the bottlenecks of a sublayer ('mlp', 'decoder.mlp')",
    )
    locations: dict[str, str] = Field(
        default_factory=dict,
        description="sublayers that their config counts as another: mostly, cross-attention",
    )
    hooked: bool = Field(
        False, description="bottlenecks act at the output projection, before the norm and the residual add"
    )
    residual: dict[str, Literal["input", "chained", "none"]] = Field(
        default_factory=dict,
        description="what bottlenecks of a sublayer take for the residual, where it is not the stream",
    )
    swapped: Strings = Field((), description="sublayers whose bottlenecks get branch and residual swapped")
    other_norm: Strings = Field(
        (), description="sublayers whose `original_ln_before` means the norm of another layer"
    )
    invertible: str | None = Field(None, description="stack with invertible adapters behind its embeddings")
    inverse: bool = Field(False, description="classes with a vocabulary undo invertible adapters before it")
    prefixes: dict[str, str] = Field(
        default_factory=dict,
        description="their word for the prefixes of a sublayer ('attention', 'text.attention')",
    )
    no_prefix: Reason | None = Field(None, description="why their prefix tuning cannot be reproduced")
    no_prompt: Reason | None = Field(None, description="why their prompt tuning cannot be reproduced")
    unnormed: Strings = Field(
        (), description="sublayers whose bottlenecks get no norm, whatever follows the residual add"
    )
    own_adapters: Literal["kept", "removed"] = Field(
        "kept", description="whether their library takes adapters of the model's own out of it"
    )
    parallel: bool | Literal["branches"] = Field(
        False,
        description="their library has Parallel on this family; branches: not of what changes q, k or v",
    )
    when: When | None = Field(None, description="config fields under which their numbers can be had")
    refused: Reason | None = Field(None, description="why their numbers cannot be reproduced on this family")


class Peft(Model):
    """How files of PEFT name what this interface names: by the module paths of the spec and their `was`."""

    keys: Literal["module_paths"] = Field("module_paths", description="what their keys are made of")
