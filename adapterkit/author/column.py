"""One observed column of layers as a stack of an interface: its root, its ends, what its layers share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from adapterkit.author import masks
from adapterkit.author.beside import beside
from adapterkit.author.describe import Describer, Notes, Scene, Words, arguments
from adapterkit.author.graph import Call
from adapterkit.author.kinds import kinds_of, share_norm
from adapterkit.author.layers import LayerFacts
from adapterkit.author.sizes import missing_sizes
from adapterkit.author.stacks import StackFacts, light_ahead, looked_up_with
from adapterkit.spec.schema import Inputs

_ALIGNED = ("token_type_ids", "bbox")
"""Arguments with one value per token."""
_INPUTS = {
    "ids": "input_ids",
    "embeds": "inputs_embeds",
    "mask": "attention_mask",
    "positions": "position_ids",
}


@dataclass
class Column:
    """A stack while it is described."""

    scene: Scene
    facts: StackFacts
    name: str
    root: str
    """Path of the module below which everything is named."""
    notes: Notes
    by_default: bool = True
    """Whether roles reach it without an address."""
    out: str = ""
    """The last module before the stream, below the root."""
    is_exact: bool = True
    """Whether what that module gives is the stream, so that nothing is added behind it."""
    reads: bool = False
    given: dict[str, int] = field(default_factory=dict)
    """What the entry was called with."""
    inputs: Words = field(default_factory=dict)
    """Names of the arguments of the entry that are not the usual ones; null: there is none."""

    @property
    def takes_embeddings(self) -> bool:
        """Whether the entry, or the module of the embeddings, takes embedded tokens in place of ids."""
        if self.inputs.get("ids", "") is None:
            return False
        out = self.out and self.scene.modules[f"{self.root}.{self.out}".strip(".")]
        return self.inputs.get("embeds", "") is not None or bool(out and "inputs_embeds" in arguments(out))

    @property
    def batch(self) -> str:
        """The axis of the examples in the stream; none: the tokens of all of them lie in one."""
        shape, examples = self.scene.graph.nodes[self.facts.entering].shape, self.scene.batch
        if len(shape) < 3 or shape[0] == 1 < examples:
            return "none"
        is_second = shape[0] % examples and shape[1] == examples
        return "second" if is_second else "first"

    @property
    def loc(self) -> tuple[str, ...]:
        return ("stacks", self.name)

    def below(self, path: str) -> str | None:
        return self.scene.below(path, self.root)

    def words(self, others: Iterable[Column]) -> Words:
        """Everything about the stack, in the order of the forward pass."""
        said: Words = {} if self.by_default else {"by_default": False}
        if self.batch != "first":
            said["batch"] = self.batch
        base = base_path(self.scene.model)
        if self.root != base:
            said["at"] = self.scene.below(self.root, base) or self.root
        config = self._config_name()
        if config is not None:
            said["config"] = config
        embeddings, entry = self._embeddings(), self._entry()
        reads = self._reads(others)
        self.out, self.reads = embeddings.get("embeddings", {}).get("out", ""), bool(reads)
        self.inputs = entry.get("inputs", {})
        filler = self._filler(embeddings.get("embeddings", {}).get("table"), others)
        if filler is not None:
            entry["inputs"] = self.inputs = self.inputs | {"filler": filler}
        said |= embeddings | entry | reads
        said["layers"] = self.below(self._list_path()) if "*" not in self.facts.path else self._glob()
        said |= self._layers()
        batch = beside(self.scene, self.facts, said)
        if batch:  # in the order of the file
            at = list(said).index("layers")
            before, behind = list(said.items())[:at], list(said.items())[at:]
            said = {**dict(before), "inputs": said.get("inputs", {}) | {"batch": batch}, **dict(behind)}
        said |= self._far_end()
        return said

    # ---------------------------------------------------------------------------------------- the root

    def _list_path(self) -> str:
        return self.facts.path

    def _glob(self) -> str:
        path = self.facts.path
        path = path[len(self.root) + 1 :] if self.root else path
        return f"{path}.*" if path.endswith("*") else path  # lists in a list

    @property
    def config(self) -> Any:
        """The config that speaks of this stack."""
        whole = getattr(self.scene.modules[base_path(self.scene.model)], "config", None)
        own = getattr(self.scene.modules[self.root], "config", None)
        return own if own is not None and self._config_name() is not None else whole

    def _config_name(self) -> str | None:
        """Name of the sub-config that belongs to the stack's root; dotted, if it is further in."""
        whole = getattr(self.scene.modules[base_path(self.scene.model)], "config", None)
        own = getattr(self.scene.modules[self.root], "config", None)
        if own is None or own is whole or whole is None:
            return None
        return _path_of(whole, own)

    # ----------------------------------------------------------------------------------- the near end

    def _embeddings(self) -> Words:
        tables = [one for one in self.facts.tables if one.call is not None]
        table = self.below(tables[0].path) if tables else None
        if len(tables) > 1:
            more = ", ".join(one.path for one in tables[1:])
            self.notes.remark((*self.loc, "embeddings"), f"looked up too: {more}")
        arriving = [c for c in self.facts.arriving if c.path != self.root and self._once(c)]
        arriving = [c for c in arriving if self.below(c.path) not in (None, ".")]
        projection = self._projection(arriving) if table else None
        before = projection.given if projection is not None else None
        exact = self._giving(arriving, before)
        if before is not None and not exact:  # embeddings of another width come out of no module
            projection = before = None
            exact = self._giving(arriving, None)
        leaves = [c for c in exact if c.is_leaf]
        # what passes on unchanged is the last of those that give the same numbers
        last = max(leaves or exact, key=lambda c: (c.end, c.index), default=None)
        plain = table if tables and self._has_tokens(tables[0].node) else None
        self.is_exact = last is not None
        if last is None and plain is None:  # positions are added that come out of no module
            last = max(filter(self._reaches, arriving), key=lambda c: (c.gives, c.end), default=None)
        out = self.below(last.path) if last is not None else plain
        found: Words = {"table": table} if table else {}
        if out is None:
            text = "the stream comes out of no module before the first layer, so there is nothing to name"
            self.notes.remark((*self.loc, "layers"), text)
            return {"embeddings": found} if found else {}
        said: Words = {"embeddings": found | {"out": out}}
        if projection is not None:
            said["extra"] = {"embedding_projection": self.below(projection.path)}
        return said

    def _giving(self, arriving: list[Call], before: int | None) -> list[Call]:
        """Calls that give what the projection reads, or the stream where there is none."""
        graph = self.scene.graph
        wanted = graph.same(self.facts.entering if before is None else before)
        exact = [c for c in arriving if c.gives is not None and graph.same(c.gives) == wanted]
        return [c for c in exact if self._is_stream(c.gives, before)]

    def _is_stream(self, value: int | None, before: int | None) -> bool:
        """Whether a value has as many axes as the stream, and as many numbers for each token."""
        nodes = self.scene.graph.nodes
        stream = nodes[self.facts.entering if before is None else before].shape
        shape = () if value is None else nodes[value].shape
        return len(shape) == len(stream) and shape[-1] == stream[-1]

    def _has_tokens(self, value: int | None) -> bool:
        """Whether a value is as long as the stream, too."""
        nodes = self.scene.graph.nodes
        stream, shape = nodes[self.facts.entering].shape, () if value is None else nodes[value].shape
        return self._is_stream(value, None) and shape[-3:-1] == stream[-3:-1]

    def _reaches(self, call: Call) -> bool:
        """Whether a module gives what the stream is made of, and no linear map stands for it."""
        linears = ("linear", "addmm")
        made = call.gives is not None and self.scene.graph.nodes[call.gives].op not in linears
        return made and self._has_tokens(call.gives)

    def _projection(self, arriving: list[Call]) -> Call | None:
        """The linear module between embeddings of another width and the stream."""
        graph = self.scene.graph
        wide = graph.nodes[self.facts.entering].shape[-1]
        for call in reversed(arriving):
            if call.given is None or call.gives is None or not self.scene.is_linear(call.path):
                continue
            is_made = {table.node for table in self.facts.tables} & graph.closure([call.given])
            if is_made and graph.nodes[call.gives].shape[-1] == wide != graph.nodes[call.given].shape[-1]:
                return call
        return None

    def _once(self, call: Call) -> bool:
        return len(self.scene.graph.calls_of(call.path)) == 1

    def _entry(self) -> Words:
        """The module whose call runs the stack, and the names of its arguments."""
        called = self.scene.graph.calls_of(self.root)
        found: Words = {}
        module = self.scene.modules[self.root]
        if not any(call.start <= self.facts.layers[0].call.start < call.end for call in called):
            below = self.below(self.facts.entry.path)
            if below not in (None, "."):
                found["entry"] = below
                module = self.scene.modules[self.facts.entry.path]
        self.given = self._arguments(module)
        inputs = self._inputs(module, found.get("entry"))
        return found | ({"inputs": inputs} if inputs else {})

    def _ids(self, entry: str | None) -> str | None:
        """The argument of the entry that the table is looked up with."""
        graph, first = self.scene.graph, self.facts.layers[0].call.start
        ids = {looked_up_with(graph, table.node) for table in self.facts.tables}
        calls = graph.calls_of(self.facts.entry.path if entry else self.root)
        inside = [call for call in calls if call.start <= first < call.end]
        return next(
            (name for call in inside for name, value in call.arguments if graph.same(value) in ids), None
        )

    def _inputs(self, module: nn.Module, entry: str | None) -> Words:
        """Arguments that are called otherwise than usual, or that are missing."""
        taken = arguments(module)
        usual = {word: Inputs.model_fields[word].default for word in _INPUTS}
        found: Words = {word: None for word, name in usual.items() if name not in taken}
        ids = self._ids(entry) if "ids" in found else None
        if ids is not None:
            found["ids"] = ids
        if "mask" in found:
            found |= self._mask(module, ids or str(usual["ids"]))
        elif ids is None and "ids" in found:
            path = self.facts.layers[0].call.path
            own = masks.of_layers(self.scene.model, self.scene.inputs, module, str(usual["mask"]), path)
            found |= {"mask": None, "layer_mask": own} if own else {}
        if "positions" in found:
            found["positions"] = self._positions(module, {str(v) for v in found.values()})
        # what is called as usual may be there for other models of the type
        aligned = [] if ids is not None else [name for name in _ALIGNED if name in taken]
        known = {str(found.get(word, name)) for word, name in usual.items()}
        aligned += [
            name
            for name in self._beside_ids(module, str(found.get("ids", usual["ids"])))
            if name not in {*known, *aligned}
        ]
        return found | ({"aligned": aligned} if aligned else {})

    def _positions(self, module: nn.Module, known: set[str]) -> str | None:
        """The argument whose numbers (B, T) count the tokens of each row, and change what the layers make."""
        path = self.facts.layers[0].call.path
        tokens = self.scene.graph.nodes[self.facts.entering].shape[:2]
        for name, value in self._given(module).items():
            if name in known or value.is_floating_point() or tuple(value.shape) != tokens or tokens[1] < 3:
                continue
            if float((value.diff(dim=1) == 1).double().mean()) <= 0.5:
                continue  # packed texts begin anew
            before, after = (
                masks.made(self.scene.model, self.scene.inputs, module, {name: numbers}, path)
                for numbers in (value, value.flip(1))
            )
            if before is not None and after is not None and not torch.equal(before, after):
                return name
        return None

    def _filler(self, table: str | None, others: Iterable[Column]) -> int | None:
        """An id that makes room for prompts, where more depends on the number of ids than a mask (B, T)."""
        graph, layer = self.scene.graph, self.facts.layers[0]
        ids = self.given.get(str(self.inputs.get("ids", Inputs.model_fields["ids"].default)))
        if table is None or ids is None or self.takes_embeddings:
            return None
        rows, length = graph.nodes[ids].shape
        more = (graph.nodes[value].shape for _, value in layer.call.arguments if value != layer.given)
        in_layers = any(length in shape and math.prod(shape) != rows * length for shape in more)
        if not in_layers and not any(o.root == self.root and o._source(others) is self for o in others):
            return None  # the mask is widened for the layers alone
        padding = getattr(self.scene.modules[f"{self.root}.{table}".strip(".")], "padding_idx", None)
        found = 1 if padding != 1 else 2
        text = f"prompts are put in place of this id: {found} here, which the model should treat as any other"
        self.notes.remark((*self.loc, "inputs", "filler"), text)
        return found

    def _beside_ids(self, module: nn.Module, ids: str) -> list[str]:
        """Arguments with a whole number for every token that change what enters the layers, by trial."""
        given, path = self._given(module), self.facts.layers[0].call.path
        tokens = given.get(ids)
        if tokens is None or tokens.ndim != 2:
            return []

        def entering(name: str, number: int) -> torch.Tensor | None:
            arguments = {name: torch.full_like(given[name], number, dtype=torch.long)}
            return masks.made(self.scene.model, self.scene.inputs, module, arguments, path, "given")

        found = []
        for name, value in given.items():
            if name != ids and value.shape[:2] == tokens.shape and not value.is_floating_point():
                before, after = entering(name, 0), entering(name, 1)
                if before is not None and after is not None and not torch.equal(before, after):
                    found.append(name)
        return found

    def _mask(self, module: nn.Module, ids: str) -> Words:
        """The argument that hides tokens, by trial."""
        tokens = self._given(module).get(ids)
        other = masks.edited(tokens) if tokens is not None and tokens.ndim == 2 else None
        if tokens is not None and other is not None:
            shape = (int(tokens.shape[0]), int(tokens.shape[1]))
            return self._hiding(module, shape, ({ids: tokens}, {ids: other}), masks.beside)
        stream = self.scene.graph.nodes[self.facts.entering].shape
        if tokens is not None or len(stream) != 3:
            return {}
        # patches and frames are no ids: their states differ where they enter the layers
        return self._hiding(module, (stream[0], stream[1]), None, masks.beside)

    def _read_mask(self, module: nn.Module, states: str) -> Words:
        """The argument that hides states of the other stack, by trial."""
        read = self._given(module).get(states)
        if read is None or read.ndim != 3:
            return {}
        shape = (int(read.shape[0]), int(read.shape[1]))
        return self._hiding(module, shape, ({states: read}, {states: masks.moved(read)}), lambda made: made)

    def _hiding(
        self,
        module: nn.Module,
        shape: tuple[int, int],
        edits: tuple[Words, Words] | None,
        part: masks.Part,
    ) -> Words:
        """Of the arguments with one value per token, and of those that were not given, the one that hides.

        Args: edits: arguments that differ at position T // 2; None: the stream itself is made to differ.
        """
        given = self._given(module)
        known = edits[0] if edits is not None else ()
        one_each = (name for name, value in given.items() if masks.form(value, shape) == value.shape)
        names = [name for name in one_each if name not in known]
        names += [name for name in masks.optional(module) if name not in given]
        path = self.facts.layers[0].call.path

        def run(mask: Mapping[str, Any], other: bool) -> torch.Tensor | None:
            arguments = mask if edits is None else {**edits[other], **mask}
            stirred = other and edits is None
            made = masks.made(self.scene.model, self.scene.inputs, module, arguments, path, other=stirred)
            return None if made is None else part(made)

        for name in names:
            found = given.get(name)
            value = masks.visible(run, name, masks.form(found, shape), masks.kinds_of(found))
            if value is not None:
                return {"mask": name} | ({} if value else {"mask_hides": True})
        return {}

    def _given(self, module: nn.Module) -> dict[str, torch.Tensor]:
        """The tensors that the entry was called with, by argument."""
        return {name: self.scene.seen.tensors[value] for name, value in self._arguments(module).items()}

    def _arguments(self, module: nn.Module) -> dict[str, int]:
        """The values that a module around the layers was called with, by argument."""
        graph, first = self.scene.graph, self.facts.layers[0].call.start
        calls = [c for path in self.scene.names[id(module)] for c in graph.calls_of(path)]
        return {name: v for call in calls if call.start <= first < call.end for name, v in call.arguments}

    def _reads(self, others: Iterable[Column]) -> Words:
        """The other stack whose states the cross-attention attends to."""
        graph, behind = self.scene.graph, self._read_from()
        if not behind:
            return {}
        read = self._source(others)
        if read is None:
            inside = behind & frozenset(layer.given for other in others for layer in other.facts.layers)
            if inside:
                self.notes.gap(
                    (*self.loc, "reads"), "the states that cross-attention reads come from no stack"
                )
            else:
                text = "cross-attention reads what the model is called with, which no stack of it makes"
                self.notes.remark((*self.loc, "cross_attention"), text)
            return {}
        found: Words = {"stack": read.name}
        calls = [c for c in graph.calls_of(self.root) if c.start <= self.facts.layers[0].call.start < c.end]
        given = [name for c in calls for name, value in c.arguments if _made_of(self, value, read)]
        usual = "encoder_hidden_states"
        root = self.scene.modules[self.root]
        if usual not in given and (given or usual not in arguments(root)):
            found["states"] = given[0] if given else None
        if "encoder_attention_mask" not in arguments(root):
            found |= {"mask": None} | self._read_mask(root, given[0] if given else usual)
        return {"reads": found}

    def _read_from(self) -> frozenset[int]:
        """Values of which the first cross-attention makes its keys."""
        cross = [b for layer in self.facts.layers for b in layer.branches if b.kind == "cross_attention"]
        return frozenset(self.scene.graph.closure([cross[0].events[-1].key])) if cross else frozenset()

    def _source(self, others: Iterable[Column]) -> Column | None:
        """The stack whose states the cross-attention attends to."""
        behind = self._read_from()
        return next((o for o in others if o is not self and o.facts.leaving in behind), None)

    # ------------------------------------------------------------------------------------------ layers

    def _layers(self) -> Words:
        once = {facts.call.path: facts for facts in reversed(self.facts.layers)}
        layers = sorted(once.values(), key=lambda facts: facts.call.index)
        parallel = [
            one.is_parallel for one in layers if {b.kind for b in one.branches} >= {"attention", "mlp"}
        ]
        describer = Describer(self.scene, self.loc, self.notes, bool(parallel) and all(parallel), self.batch)
        by_path = {facts.call.path: describer.layer(facts) for facts in layers}
        told = self._with_idle(by_path)
        said: Words = {}
        if describer.parallel:
            said["block"] = "parallel"
            said |= share_norm(list(by_path.values()))
        elif any(parallel):
            self.notes.gap((*self.loc, "block"), "some layers are parallel and some are not")
        self._sizes(describer, layers, by_path)
        for word in ("attention", "mlp"):
            if not any(word in one for one in told):
                self.notes.gap((*self.loc, word), f"no layer has a branch of the kind {word}")
        return said | kinds_of(self.config, told)

    def _with_idle(self, told: dict[str, Words]) -> list[Words]:
        """What was told of each layer of the list; nothing of those that the inputs do not reach."""
        if "*" in self.facts.path:
            return list(told.values())
        paths = [
            f"{self.facts.path}.{name}" for name, _ in self.scene.modules[self.facts.path].named_children()
        ]
        idle = [path for path in paths if path not in told and not self.scene.graph.calls_of(path)]
        for path in idle:
            text = f"{path} did not run with the inputs that were tried: nothing was seen of it"
            self.notes.remark((*self.loc, "layers"), text)
        return [told.get(path, {}) for path in paths if path in told or path in idle]

    def _sizes(self, describer: Describer, layers: list[LayerFacts], told: dict[str, Words]) -> None:
        """Head counts, where neither the config's usual fields nor the core show what was observed."""
        for facts in layers:
            words = told[facts.call.path]
            for branch in facts.branches:
                own = words.get(branch.kind)
                if own is not None and branch.events and branch.events[-1].kind != "whole":
                    found = missing_sizes(self, describer, facts, branch, own)
                    if found:
                        own["sizes"] = found

    # ------------------------------------------------------------------------------------- the far end

    def _far_end(self) -> Words:
        graph, facts = self.scene.graph, self.facts
        found: Words = {}
        following = self._following()
        # stages may have widened the stream
        width = graph.nodes[facts.entering if facts.leaving is None else facts.leaving].shape
        norms = [c for c in following if graph.is_norm(c) or _is_norm_elsewhere(c)]
        norms = [c for c in norms if graph.nodes[c.given or 0].shape == width]
        last = facts.layers[-1].call
        if norms:
            found["final_norm"] = self.below(norms[0].path)
        elif len(graph.calls_of(last.path)) > 1 and facts.leaving is not None:
            outer = [c for c in graph.returned(facts.leaving) if c.index < last.index and c.path != self.root]
            exits = [self.below(c.path) for c in outer if self.below(c.path) not in (None, ".")]
            if exits:
                found["exit"] = exits[0]
        poolers = [c for c in following if c not in norms and self._pools(c)]
        if poolers and self.config is not None:
            why = "classes with a head may be built without it"
            found["pooler"] = {"path": self.below(poolers[0].path), "optional": why}
        return found

    def _following(self, *, anywhere: bool = False) -> list[Call]:
        """Modules with weights behind the last layer that read its states, in order, outer ones first.

        Args: anywhere: not below the root alone.
        """
        graph, leaving = self.scene.graph, self.facts.leaving
        if leaving is None:
            return []
        near = set(light_ahead(graph, leaving))
        found = []
        for call in graph.calls[self.facts.layers[-1].call.index + 1 :]:
            if call.start < self.facts.layers[-1].call.end or call.given not in near:
                continue
            below = call.path if anywhere else self.below(call.path)
            weights = next(self.scene.modules[call.path].parameters(), None) is not None
            if below not in (None, ".") and (weights or _is_norm_elsewhere(call)):
                found.append(call)
                if call.gives is not None and graph.is_norm(call):
                    near |= light_ahead(graph, call.gives)
        return found

    def heads(self, others: Iterable[Column]) -> list[str]:
        """In a model that no config describes: what reads the states behind the stack, and is no norm.

        Args: others: stacks of the model; what reads the states within them is no head.
        """
        roots = tuple(
            f"{path}."
            for other in others
            for path in ("" if other is self else other.root, *(one.call.path for one in other.facts.layers))
            if path
        )
        following = self._following(anywhere=True)
        found = [c.path for c in following if not self.scene.graph.is_norm(c) and not _is_norm_elsewhere(c)]
        found = [path for path in dict.fromkeys(found) if not f"{path}.".startswith(roots)]
        return [path for path in found if not any(path.startswith(f"{o}.") for o in found)]

    def _pools(self, call: Call) -> bool:
        """Whether a module takes or makes one vector of all states."""
        graph = self.scene.graph
        axes = len(graph.nodes[self.facts.entering].shape)
        return call.gives is not None and len(graph.nodes[call.gives].shape) == axes - 1


def base_path(model: nn.Module) -> str:
    """Where paths of an interface start: the model without its head."""
    prefix = getattr(model, "base_model_prefix", None)
    return prefix if isinstance(prefix, str) and prefix and prefix in model._modules else ""


def _is_norm_elsewhere(call: Call) -> bool:
    """What is an identity in this config, and by its name a norm in others."""
    return call.kind == "Identity" and "norm" in call.path.rpartition(".")[2].lower()


def _path_of(config: Any, wanted: Any) -> str | None:
    """Where a config lies in another."""
    inner: dict[str, Any] = {
        name: value for name, value in vars(config).items() if hasattr(value, "model_type")
    }
    for name, value in inner.items():
        if value is wanted:
            return str(name)
    for name, value in inner.items():
        found = _path_of(value, wanted)
        if found is not None:
            return f"{name}.{found}"
    return None


def _made_of(column: Column, value: int, read: Column) -> bool:
    leaving = read.facts.leaving
    return leaving is not None and leaving in column.scene.graph.closure([value])
