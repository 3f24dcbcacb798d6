"""The interface language as pydantic models; their descriptions are the language reference."""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    StringConstraints,
    model_validator,
)
from pydantic_core import PydanticCustomError

from adapterkit.errors import listing
from adapterkit.spec.text import Document, Loc, Mark
from adapterkit.spec.vocabulary import ATTENTION_ROLES, MLP_ROLES, RESERVED, SUBLAYERS

Scalar = bool | int | float | str
When = Annotated[
    dict[str, Scalar],
    Field(min_length=1, description="config field: value. Required on the model if all hold, absent if not."),
]
Batch = Literal["first", "second", "none"]
_PATH = re.compile(r"^(\.|[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*)$")
_GLOB = re.compile(r"^[A-Za-z0-9_*]+(\.[A-Za-z0-9_*]+)*$")
_NAME = re.compile(r"^[A-Za-z][A-Za-z0-9_]*$")


def refuse(code: str, message: str) -> PydanticCustomError:
    """An error whose type is the code that users see."""
    return PydanticCustomError(code.replace("-", "_"), "{text}", {"text": message})


def _name(word: str) -> str:
    if not _NAME.match(word):
        raise refuse(
            "bad-name", f"{word!r} is not a name: letters a to z, digits and '_', starting with a letter"
        )
    return word


def _extra_name(word: str) -> str:
    if word in RESERVED:
        raise refuse("reserved-name", f"{word!r} is a word of the language and cannot name an extra module")
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


def _no_bool(value: Any) -> Any:
    # to Python true is 1
    return str(value).lower() if isinstance(value, bool) else value


class Model(BaseModel):
    """Base of all parts of an interface: immutable, unknown words refused, no silent conversion."""

    # only the whole is ever validated, so that the parts need no validators of their own
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, defer_build=True)


def _check_alternatives(options: tuple[Path, ...] | tuple[Sublayer, ...] | None, kind: str) -> None:
    """Two or more, told apart by what exists; what holds for all of them stands beside 'any_of'."""
    if options is None:
        return
    if len(options) < 2:
        raise refuse("one-of", "'any_of' needs at least two alternatives")
    outside = {"path": {"any_of", "optional", "batch", "was"}, "block": {"any_of", "optional"}}[kind]
    words = sorted({word for option in options for word in option.model_fields_set & outside})
    if words:
        raise refuse("one-of", f"an alternative takes no {listing(repr(word) for word in words)}")


class Path(Model):
    """A module, named by its path below the layer (inside a sublayer) or below the stack's root."""

    path: str | None = Field(None, description="dotted path; '.' is the root itself")
    any_of: Annotated[tuple[PathField, ...] | None, FromList] = Field(
        None, description="alternatives; exactly one must exist"
    )
    when: When | None = None
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
            raise refuse("one-of", "a module is named by either 'path' or 'any_of'")
        if self.path is not None and not _PATH.match(self.path):
            raise refuse(
                "bad-path",
                f"{self.path!r} is not a module path: names joined by '.', without code or patterns",
            )
        _check_alternatives(self.any_of, "path")
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


def _path(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


PathField = Annotated[Path, BeforeValidator(_path, json_schema_input_type=str | Path)]
Extras = Annotated[
    dict[ExtraName, PathField], Field(description="further modules that may be adapted, by name")
]


Path.model_rebuild()
Paths = Annotated[tuple[PathField, ...], FromList]


class Norm(Model):
    """Where the norms of a sublayer stand, seen from its branch and its residual add."""

    before: PathField | None = Field(None, description="normalises the input of the branch (pre-norm)")
    after: PathField | None = Field(
        None, description="normalises the branch before the residual add (sandwich norm)"
    )
    after_residual: PathField | None = Field(
        None, description="normalises the sum of branch and residual (post-norm)"
    )


class Fused(Model):
    """One matrix that holds several roles, and how its rows lie."""

    path: PathField = Field(description="the module that holds the matrix")
    layout: Literal["blocks", "per_head", "per_group"] = Field(
        description="blocks: all rows of one role, then the next; per_head: roles alternate head by head; "
        "per_group: for each key/value head its query heads, then its key, then its value"
    )
    order: Strings = Field(description="roles in the order of their rows")

    @model_validator(mode="after")
    def _order(self) -> Self:
        known = (*ATTENTION_ROLES[:3], *MLP_ROLES[:2])
        if (
            len(set(self.order)) != len(self.order)
            or len(self.order) < 2
            or not set(self.order) <= set(known)
        ):
            raise refuse("bad-order", f"'order' lists two or more different roles of {', '.join(known)}")
        if set(self.order) & set(MLP_ROLES) and (
            set(self.order) & set(ATTENTION_ROLES) or self.layout != "blocks"
        ):
            raise refuse("bad-order", "gate and up lie in blocks and do not mix with q, k, v")
        return self


class Kernel(Model):
    """The method that computes attention from q, k and v, where it is not the shared attention function."""

    method: str = Field(description="method of the core module")
    args: Annotated[tuple[Literal["q", "k", "v", "mask", "_"], ...], FromList] = Field(
        min_length=1, description="what its positional arguments are; '_' is anything else"
    )


class Sizes(Model):
    """Sizes that nothing in the model shows: a config field, an attribute of the core, or a number."""

    heads: int | str | None = Field(None, description="number of query heads")
    kv_heads: int | str | None = Field(None, description="number of key and value heads")
    head_dim: int | str | None = Field(None, description="width of one head")


class Sublayer(Model):
    """A branch of a layer that is added to the residual stream."""

    any_of: Annotated[tuple[Self, ...] | None, FromList] = Field(
        None, description="whole alternatives; exactly one resolves completely"
    )
    when: When | None = None
    optional: Reason | None = Field(
        None, description="why the sublayer may be missing, on all layers or on none"
    )
    norm: Norm | None = None
    fused: Fused | None = None
    out: PathField | None = Field(
        None, description="module whose (first) output is the branch, where it is not o or down"
    )
    tail: PathField | None = Field(
        None, description="last module before the residual add: dropout, drop path"
    )
    own_adapter: PathField | None = Field(
        None, description="module of the model's own between the residual add and what follows"
    )
    extra: Extras = Field(default_factory=dict)

    @model_validator(mode="after")
    def _alternatives(self) -> Self:
        if self.any_of is not None and self.model_fields_set - {"any_of", "when", "optional"}:
            raise refuse("one-of", "next to 'any_of' only 'when' and 'optional' may stand")
        _check_alternatives(self.any_of, "block")
        return self

    @cached_property
    def points(self) -> tuple[tuple[str, Path], ...]:
        """Named places that are no linear maps."""
        named = [(word, getattr(self, word, None)) for word in ("core", "out", "tail", "own_adapter")]
        places = ("before", "after", "after_residual")
        named += [(f"norm.{place}", getattr(self.norm, place)) for place in places] if self.norm else []
        return tuple((name, path) for name, path in named if path is not None)

    @cached_property
    def first(self) -> str | None:
        """A path that shows whether the sublayer is there."""
        for word in ("core", "q", "up", "down", "out"):
            path = getattr(self, word, None)
            if path is not None:
                return str(path.names()[0])
        return None


class Attention(Sublayer):
    """Self- or cross-attention of a layer."""

    core: PathField | None = Field(None, description="module that computes attention from q, k and v")
    kernel: Kernel | None = None
    eager: str | None = Field(
        None, description="name of the eager attention function in the source, if not the usual"
    )
    q: PathField | None = Field(None, description="projection of the queries")
    k: PathField | None = Field(None, description="projection of the keys")
    v: PathField | None = Field(None, description="projection of the values")
    o: PathField | None = Field(None, description="output projection")
    sizes: Sizes | None = None
    position_bias: PathField | None = Field(
        None, description="module that gives a bias of fixed positions to the scores, (1, H, T, T)"
    )

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.any_of is not None:
            return self
        if self.core is None:
            raise refuse(
                "missing-word", "an attention block needs 'core', the module that computes attention"
            )
        _check_fused(self.fused, {role: getattr(self, role) for role in ATTENTION_ROLES})
        if self.out is None and self.o is None:
            raise refuse(
                "missing-word", "an attention block needs 'o' (or 'out', where it has no output projection)"
            )
        return self


class Mlp(Sublayer):
    """Feed-forward part of a layer."""

    gate: PathField | None = Field(None, description="the half of a gated MLP that the activation acts on")
    up: PathField | None = Field(None, description="first matrix; in a gated MLP the half without activation")
    down: PathField | None = Field(None, description="last matrix")
    experts: None = Field(None, description="reserved for banks of experts")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.any_of is not None:
            return self
        _check_fused(self.fused, {role: getattr(self, role) for role in MLP_ROLES})
        if self.out is None and self.down is None:
            raise refuse(
                "missing-word", "an MLP needs 'down' (or 'out', where its last matrix is not one module)"
            )
        return self


def _check_fused(fused: Fused | None, named: dict[str, Path | None]) -> None:
    foreign = [role for role in (fused.order if fused else ()) if role not in named]
    if foreign:
        raise refuse("bad-order", f"no roles of this sublayer: {listing(foreign)}")
    twice = [role for role in (fused.order if fused else ()) if named.get(role) is not None]
    if twice:
        raise refuse("named-twice", f"named on their own and in 'fused.order': {', '.join(twice)}")


class Embeddings(Model):
    """Where the stream begins."""

    table: PathField | None = Field(None, description="module called with ids")
    out: PathField | None = Field(
        None, description="last module before the stream enters the stack; its width counts"
    )


class Inputs(Model):
    """Names of the arguments of the entry."""

    ids: str | None = Field("input_ids", description="argument of token ids; null: there is none")
    embeds: str | None = Field(
        "inputs_embeds", description="argument of embedded tokens; null: there is none"
    )
    mask: str | None = Field(
        "attention_mask", description="argument of the attention mask; null: there is none"
    )
    positions: str | None = Field("position_ids", description="argument of positions; null: there is none")
    aligned: Strings = Field((), description="further arguments with one value per token")
    batch: dict[str, Batch] = Field(
        default_factory=dict, description="axis of the batch, where it is not the first"
    )


class Reads(Model):
    """The other stack whose states this one attends to."""

    stack: str = Field(description="a stack of this file; for a part, another part")
    states: str = Field("encoder_hidden_states", description="argument of the entry that holds the states")
    mask: str | None = Field(
        "encoder_attention_mask", description="argument of the entry that holds their mask"
    )


class Unembed(Model):
    """The way from the last states to the vocabulary. Paths start at the model itself, not at its base."""

    path: PathField | None = Field(
        None, description="the output embeddings, where the model does not tell them"
    )
    through: Paths = Field((), description="modules with weights between the last states and `path`")


UnembedField = Annotated[
    Unembed,
    BeforeValidator(lambda v: {"path": v} if isinstance(v, str) else v, json_schema_input_type=str | Unembed),
]


class Layer(Model):
    """What one layer of a stack is made of."""

    attention: Attention | None = Field(None, description=SUBLAYERS["attention"])
    cross_attention: Attention | None = Field(None, description=SUBLAYERS["cross_attention"])
    mlp: Mlp | None = Field(None, description=SUBLAYERS["mlp"])


class Kinds(Model):
    """Layers of different kinds in one stack."""

    by: str = Field(description="config field: a list with the kind of each layer")
    of: dict[str, Layer] = Field(
        min_length=1, description="kind: what its layers have on top of the stack's own words"
    )


class Layers(Model):
    """Where the layers of a stack lie: the path of a list, or a pattern with '*' over nested lists."""

    path: str | None = Field(
        None, description="path of the list of layers, or a pattern with '*' over nested lists"
    )
    any_of: Annotated[tuple[str, ...] | None, FromList] = Field(
        None, description="alternatives; exactly one must exist"
    )
    was: Strings = Field((), description="paths of the list in files made elsewhere or by older versions")

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.path is None) == (self.any_of is None):
            raise refuse("one-of", "layers are named by either 'path' or 'any_of'")
        if self.any_of is not None and len(self.any_of) < 2:
            raise refuse("one-of", "'any_of' needs at least two alternatives")
        for name in self.names():
            if not _GLOB.match(name):
                raise refuse("bad-path", f"{name!r} is not the path of a list of layers")
        return self

    def names(self) -> tuple[str, ...]:
        """Every path that may be meant, in order."""
        return (self.path,) if self.path is not None else self.any_of or ()


LayersField = Annotated[Layers, BeforeValidator(_path, json_schema_input_type=str | Layers)]


class Stack(Layer):
    """A column of layers with one residual stream."""

    block: Literal["sequential", "parallel"] | None = Field(
        None, description="parallel: attention and MLP read the same input and are added together"
    )
    shared_norm: PathField | None = Field(
        None, description="the one norm before both branches of a parallel block"
    )
    at: PathField | None = Field(
        None, description="root of the stack below the base model (default: the base model)"
    )
    config: str | None = Field(
        None,
        description="sub-config of this stack, dotted if it lies in another; a tower that stands alone uses"
        " its own config",
    )
    like: str | None = Field(
        None, description="another stack of this file that this one copies, changes on top"
    )
    present_in: Strings | None = Field(None, description="classes that have this stack, where not all do")
    when: When | None = None
    batch: Batch | None = Field(None, description="axis of the batch in the stream (default first)")
    embeddings: Embeddings | None = None
    entry: PathField | None = Field(None, description="module whose call runs the stack (default: its root)")
    exit: PathField | None = Field(
        None, description="last module before pooling (default: final_norm, else last layer)"
    )
    inputs: Inputs = Field(default_factory=Inputs)
    reads: Reads | None = None
    layers: LayersField = Field(description="the list of layers, below the stack's root")
    kinds: Kinds | None = None
    final_norm: PathField | None = Field(None, description="norm after the last layer")
    pooler: PathField | None = Field(
        None, description="pooling with weights inside the base: frozen, saved with heads"
    )
    unembed: UnembedField | None = None
    position_bias: PathField | None = Field(
        None, description="as in an attention block, where all layers share one"
    )
    extra: Extras = Field(default_factory=dict)

    @model_validator(mode="after")
    def _stack(self) -> Self:
        if self.shared_norm is not None and self.block != "parallel":
            raise refuse("missing-word", "'shared_norm' needs 'block: parallel'")
        if self.attention is None and self.mlp is None and self.kinds is None:
            raise refuse("missing-word", "a stack needs 'attention', 'mlp' or 'kinds'")
        return self


class Part(Model):
    """A model inside the model, described by the interface of its own model type."""

    at: PathField = Field(description="the module of the part, below the base model")
    config: str = Field(description="sub-config of the part; its model type chooses the interface")
    reads: Reads | None = Field(None, description="the other part whose states this one attends to")
    by_default: bool = Field(True, description="false: roles reach this part only when it is addressed")


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
    when: When | None = Field(None, description="config fields under which their numbers can be had")
    refused: Reason | None = Field(None, description="why their numbers cannot be reproduced on this family")


class Peft(Model):
    """How files of PEFT name what this interface names: by the module paths of the spec and their `was`."""

    keys: Literal["module_paths"] = Field("module_paths", description="what their keys are made of")


class Interface(Model):
    """One model family, described for every adapter method."""

    adapterkit: Annotated[Literal[1], BeforeValidator(_no_bool)] = Field(
        description="version of the language"
    )
    model_type: OneOrMore | None = Field(
        None, description="`config.model_type` of the models described: one or a list"
    )
    source: str | None = Field(None, description="file in transformers that was read to write this one")
    like: str | None = Field(None, description="an interface that this one copies, changes on top")
    only: Strings | None = Field(None, description="stacks of `like` that are kept")
    stacks: dict[Name, Stack] = Field(default_factory=dict, description="columns of layers, by name")
    parts: dict[Name, Part] = Field(default_factory=dict, description="models inside the model, by name")
    heads: Paths = Field(
        (), description="task heads below the model itself, where a stack's root is the model"
    )
    unsupported: dict[str, Reason] = Field(
        default_factory=dict, description="method: why this family cannot have it"
    )
    adapterhub: AdapterHub | None = None
    peft: Peft | None = None
    _document: Document | None = PrivateAttr(None)
    _digest: str | None = PrivateAttr(None)

    @classmethod
    def load(cls, source: str | FilePath | dict[str, Any] | Interface) -> Interface:
        """An interface from a path, a name or model type, a dict, or as it is.

        Raises: SpecError: with every problem of the file.
        """
        from adapterkit.spec import registry  # which reads files into this class

        return registry.load(source)

    def mark(self, loc: Loc) -> Mark | None:
        """Where `loc` stands in the file that this interface was read from."""
        return self._document.mark(loc) if self._document else None

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not self.stacks and not self.parts:
            raise refuse("missing-word", "an interface needs 'stacks' or 'parts'")
        if self.only is not None and self.like is None:
            raise refuse("missing-word", "'only' needs 'like', the interface whose stacks it keeps")
        return self
