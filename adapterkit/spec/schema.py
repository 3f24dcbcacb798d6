"""The interface language as pydantic models; their descriptions are the language reference."""

from __future__ import annotations

from collections.abc import Container
from functools import cached_property
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PrivateAttr, model_validator

from adapterkit.errors import listing
from adapterkit.spec.foreign import AdapterHub, Peft
from adapterkit.spec.making import Tiny
from adapterkit.spec.paths import Extras, Path, PathField, Paths, as_path, check_alternatives
from adapterkit.spec.terms import (
    GLOB,
    NO_ROLE,
    Batch,
    FromList,
    Lacking,
    Model,
    Name,
    OneOrMore,
    OneOrMoreWhen,
    Reason,
    Strings,
    When,
    complaint,
    no_bool,
)
from adapterkit.spec.text import Document, Loc, Mark
from adapterkit.spec.vocabulary import ATTENTION_ROLES, MLP_ROLES, SUBLAYERS


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
    order: Strings = Field(description="roles in the order of their rows; '_': rows of no role")
    groups: int | None = Field(
        None,
        ge=1,
        description="number of equal groups of rows that each hold all roles, if not that of heads",
    )
    widths: dict[str, int | str] = Field(
        default_factory=dict,
        description="rows of one head of each role, where they differ: a config field, an attribute of the "
        "core, or a number",
    )

    @model_validator(mode="after")
    def _order(self) -> Self:
        known = (*ATTENTION_ROLES[:3], *MLP_ROLES[:2])
        if (
            len(set(self.order)) != len(self.order)
            or len(self.order) < 2
            or not set(self.order) <= {*known, NO_ROLE}
        ):
            raise complaint("bad-order", f"'order' lists two or more different roles of {', '.join(known)}")
        if set(self.order) & set(MLP_ROLES) and (
            set(self.order) & set(ATTENTION_ROLES) or self.layout != "blocks"
        ):
            raise complaint("bad-order", "gate and up lie in blocks and do not mix with q, k, v")
        if self.widths and (set(self.widths) != set(self.order) or set(self.order) & set(MLP_ROLES)):
            raise complaint("bad-order", "'widths' are those of heads: one for each role in 'order'")
        return self

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that lie in the matrix."""
        return tuple(role for role in self.order if role != NO_ROLE)


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
    value_dim: int | str | None = Field(None, description="width of one head of the values, if another")


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
    start: PathField | None = Field(
        None,
        description="module that is called with the stream, where neither the norm before the branch nor its "
        "first projection is; '.' is the layer",
    )
    out: PathField | None = Field(
        None,
        description="module whose (first) output is the branch, where it is not o or down; with neither a "
        "norm nor a projection before it, its input is what the branch reads",
    )
    tail: PathField | None = Field(
        None, description="last module before the residual add: dropout, drop path"
    )
    scale: float | str | None = Field(
        None,
        description="factor of the branch at the residual add, behind its last module: a config field, an "
        "attribute of the layer, or a number",
    )
    own_adapter: PathField | None = Field(
        None, description="module of the model's own between the residual add and what follows"
    )
    extra: Extras = Field(default_factory=dict)
    without: dict[Lacking, Reason] = Field(
        default_factory=dict,
        description="role: why the sublayer has none; also branch (its output is no summand of the stream) "
        "and core (it is no attention). It fits only where no alternative with the role does",
    )

    @model_validator(mode="after")
    def _alternatives(self) -> Self:
        if self.any_of is not None and self.model_fields_set - {"any_of", "when", "optional"}:
            raise complaint("one-of", "next to 'any_of' only 'when' and 'optional' may stand")
        check_alternatives(self.any_of, "block")
        return self

    @cached_property
    def points(self) -> tuple[tuple[str, Path], ...]:
        """Named places that are no linear maps."""
        named = [
            (word, getattr(self, word, None)) for word in ("core", "start", "out", "tail", "own_adapter")
        ]
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
    bias: str | None = Field(
        None, description="method of the core that makes a bias of relative positions, (queries, keys, ...)"
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
        if self.core is None and "core" not in self.without:
            raise complaint(
                "missing-word", "an attention block needs 'core', the module that computes attention"
            )
        _check_roles(self, {role: getattr(self, role) for role in (*ATTENTION_ROLES, "core")})
        if self.out is None and self.o is None and "branch" not in self.without:
            raise complaint(
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
        _check_roles(self, {role: getattr(self, role) for role in MLP_ROLES})
        if self.out is None and self.down is None and "branch" not in self.without:
            raise complaint(
                "missing-word", "an MLP needs 'down' (or 'out', where its last matrix is not one module)"
            )
        return self


def _check_roles(said: Attention | Mlp, named: dict[str, Path | None]) -> None:
    fused = said.fused
    foreign = [role for role in (fused.roles if fused else ()) if role not in named]
    if foreign:
        raise complaint("bad-order", f"no roles of this sublayer: {listing(foreign)}")
    twice = [role for role in (fused.roles if fused else ()) if named.get(role) is not None]
    if twice:
        raise complaint("named-twice", f"named on their own and in 'fused.order': {', '.join(twice)}")
    both = [role for role in said.without if named.get(role) or role in (fused.order if fused else ())]
    if both:
        raise complaint("named-twice", f"named, and said to be lacking in 'without': {', '.join(both)}")


class Embeddings(Model):
    """Where the stream begins."""

    table: PathField | None = Field(None, description="module called with ids")
    out: PathField | None = Field(
        None, description="last module before the stream enters the stack; its width counts"
    )


def _table_and_out(value: Any) -> Any:
    return {"table": value, "out": value} if isinstance(value, str) else value


EmbeddingsField = Annotated[
    Embeddings,
    BeforeValidator(_table_and_out, json_schema_input_type=str | Embeddings),
    Field(description="where the stream begins; a path alone is both the table and the last module"),
]


def _check_mask(mask: str | None, hides: bool) -> None:
    if hides and mask is None:
        raise complaint("missing-word", "'mask_hides' needs 'mask', the argument whose ones hide")


class Inputs(Model):
    """Names of the arguments of the entry."""

    ids: str | None = Field("input_ids", description="argument of token ids; null: there is none")
    embeds: str | None = Field(
        "inputs_embeds", description="argument of embedded tokens; null: there is none"
    )
    mask: str | None = Field(
        "attention_mask", description="argument of the attention mask; null: there is none"
    )
    mask_hides: bool = Field(
        False, description="ones of the mask hide tokens, as in torch.nn.Transformer; else they show them"
    )
    layer_mask: str | None = Field(
        None,
        description="argument of the layers that hides positions, where the entry's is of something else",
    )
    positions: str | None = Field("position_ids", description="argument of positions; null: there is none")
    filler: int | None = Field(
        None,
        ge=0,
        description="an ordinary token id that makes room for prompts, where no embedded tokens are taken",
    )
    aligned: Strings = Field((), description="further arguments with a value, or several, per token")
    batch: dict[str, Batch] = Field(
        default_factory=dict,
        description="axis of the batch, where it is not the first; also of what attention is called with",
    )
    was: dict[Literal["ids", "embeds", "mask", "positions"], str] = Field(
        default_factory=dict, description="word: name of the argument where another version has not this one"
    )

    @model_validator(mode="after")
    def _masked(self) -> Self:
        _check_mask(self.mask, self.mask_hides)
        return self

    def of(self, takes: Container[str]) -> Inputs:
        """With the names of an entry that takes these arguments."""
        other = {word: name for word, name in self.was.items() if getattr(self, word) not in takes}
        changed: dict[str, Any] = {word: name for word, name in other.items() if name in takes}
        return self.model_copy(update=changed) if changed else self


class Reads(Model):
    """The other stack whose states this one attends to."""

    stack: str = Field(description="a stack of this file; for a part, another part")
    states: str | None = Field(
        "encoder_hidden_states",
        description="argument of the entry that holds the states; null: they are made in the same call",
    )
    mask: str | None = Field(
        "encoder_attention_mask", description="argument of the entry that holds their mask"
    )
    mask_hides: bool = Field(False, description="ones of that mask hide states; else they show them")

    @model_validator(mode="after")
    def _masked(self) -> Self:
        _check_mask(self.mask, self.mask_hides)
        return self


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
            raise complaint("one-of", "layers are named by either 'path' or 'any_of'")
        if self.any_of is not None and len(self.any_of) < 2:
            raise complaint("one-of", "'any_of' needs at least two alternatives")
        for name in self.names():
            if not GLOB.match(name):
                raise complaint("bad-path", f"{name!r} is not the path of a list of layers")
        return self

    def names(self) -> tuple[str, ...]:
        """Every path that may be meant, in order."""
        return (self.path,) if self.path is not None else self.any_of or ()


LayersField = Annotated[Layers, BeforeValidator(as_path, json_schema_input_type=str | Layers)]


class Stack(Layer):
    """A column of layers with one residual stream."""

    block: Literal["sequential", "parallel"] | None = Field(
        None, description="parallel: attention and MLP read the same input and are added together"
    )
    parallel_when: OneOrMoreWhen = Field(
        (),
        description="config fields that decide on `block: parallel`, or several such maps of which one "
        "holds; else the block is sequential",
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
    by_default: bool = Field(True, description="false: roles reach this stack only when it is addressed")
    when: When | None = None
    batch: Batch | None = Field(None, description="axis of the batch in the stream (default first)")
    aside: Reason | None = Field(
        None, description="what else than its sublayers changes the stream in a layer: no method acts there"
    )
    embeddings: EmbeddingsField | None = None
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
            raise complaint("missing-word", "'shared_norm' needs 'block: parallel'")
        if self.parallel_when and self.block != "parallel":
            raise complaint("missing-word", "'parallel_when' needs 'block: parallel'")
        if self.attention is None and self.mlp is None and self.kinds is None:
            raise complaint("missing-word", "a stack needs 'attention', 'mlp' or 'kinds'")
        return self


class Part(Model):
    """A model inside the model, described by the interface of its own model type."""

    at: PathField = Field(description="the module of the part, below the base model")
    config: str = Field(description="sub-config of the part; its model type chooses the interface")
    interface: str | None = Field(
        None, description="name of the interface, where some versions give the part no model type of its own"
    )
    reads: Reads | None = Field(None, description="the other part whose states this one attends to")
    optional: Reason | None = Field(
        None, description="why the part may be of a type that has no interface; it is left as it is then"
    )
    by_default: bool = Field(True, description="false: roles reach this part only when it is addressed")


class Interface(Model):
    """One model family, described for every adapter method."""

    adapterkit: Annotated[Literal[1], BeforeValidator(no_bool)] = Field(description="version of the language")
    model_type: OneOrMore | None = Field(
        None, description="`config.model_type` of the models described: one or a list"
    )
    source: OneOrMore | None = Field(
        None, description="file in transformers that was read to write this one: one or a list"
    )
    like: str | None = Field(None, description="an interface that this one copies, changes on top")
    only: Strings | None = Field(None, description="stacks of `like` that are kept")
    base: PathField | None = Field(
        None, description="the base model, below the model itself, where its usual prefix leads elsewhere"
    )
    stacks: dict[Name, Stack] = Field(default_factory=dict, description="columns of layers, by name")
    parts: dict[Name, Part] = Field(default_factory=dict, description="models inside the model, by name")
    heads: Paths = Field(
        (), description="task heads below the model itself, where a stack's root is the model"
    )
    between: Paths = Field(
        (), description="modules below the base model that belong to no stack or part: they are no task heads"
    )
    unsupported: dict[str, Reason] = Field(
        default_factory=dict, description="method: why this family cannot have it"
    )
    tiny: dict[str, Tiny] = Field(
        default_factory=dict,
        description="model type: how a tiny model of it is made, for checking and drafting alone",
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

    def __eq__(self, other: object) -> bool:
        """Whether both say the same, whatever files they came from."""
        return isinstance(other, Interface) and self.__dict__ == other.__dict__

    __hash__ = Model.__hash__

    def mark(self, loc: Loc) -> Mark | None:
        """Where `loc` stands in the file that this interface was read from."""
        return self._document.mark(loc) if self._document else None

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not self.stacks and not self.parts:
            raise complaint("missing-word", "an interface needs 'stacks' or 'parts'")
        usual = [s.by_default for s in self.stacks.values()] + [p.by_default for p in self.parts.values()]
        if not any(usual):
            raise complaint("one-of", "roles reach no stack: one at least has no 'by_default: false'")
        if self.only is not None and self.like is None:
            raise complaint("missing-word", "'only' needs 'like', the interface whose stacks it keeps")
        return self
