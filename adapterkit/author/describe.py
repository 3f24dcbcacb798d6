"""What was observed of one stack, in the words of the interface language."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from adapterkit.author import factors
from adapterkit.author.attention import Attention
from adapterkit.author.axes import examples
from adapterkit.author.fusedrows import Rows
from adapterkit.author.gated import feeding, halves
from adapterkit.author.graph import Call, Graph, Projection
from adapterkit.author.layers import BranchFacts, LayerFacts
from adapterkit.author.observe import Observation
from adapterkit.model import linear
from adapterkit.spec.vocabulary import RESERVED, SUBLAYERS

Words = dict[str, Any]


@dataclass
class Scene:
    """A model, what it was called with, and what it did."""

    model: nn.Module
    inputs: Mapping[str, Any]
    seen: Observation
    names: dict[int, list[str]] = field(init=False)
    """Every path of a module; tied ones have several."""
    modules: dict[str, nn.Module] = field(init=False)

    def __post_init__(self) -> None:
        self.modules = dict(self.model.named_modules(remove_duplicate=False))
        self.names = {}
        for path, module in self.modules.items():
            self.names.setdefault(id(module), []).append(path)

    @property
    def graph(self) -> Graph:
        return self.seen.graph

    @property
    def config(self) -> Any:
        """The config of the whole model, None if it has none."""
        return getattr(self.model, "config", None)

    @property
    def batch(self) -> int:
        """B, as most inputs have it."""
        return examples(value for value in self.inputs.values() if isinstance(value, torch.Tensor))

    @property
    def rows(self) -> Rows:
        return Rows(self.model, self.inputs, self.seen)

    def below(self, path: str, root: str) -> str | None:
        """A path as seen from a module above it, through any of its names; None if it is not there."""
        for name in self.names[id(self.modules[path])]:
            if name == root:
                return "."
            if not root or name.startswith(f"{root}."):
                return name[len(root) + 1 :] if root else name
        return None

    def is_linear(self, path: str) -> bool:
        return linear.shape(self.modules[path]) is not None


@dataclass
class Notes:
    """What a human should look at, and what is missing; each with the words that it concerns."""

    remarks: list[tuple[tuple[str, ...], str]] = field(default_factory=list)
    gaps: list[tuple[tuple[str, ...], str]] = field(default_factory=list)

    def remark(self, loc: tuple[str, ...], text: str) -> None:
        if (loc, text) not in self.remarks:
            self.remarks.append((loc, text))

    def gap(self, loc: tuple[str, ...], text: str) -> None:
        if (loc, text) not in self.gaps:
            self.gaps.append((loc, text))


@dataclass
class Describer:
    """Writes the layers of one stack."""

    scene: Scene
    loc: tuple[str, ...]
    notes: Notes
    parallel: bool = False
    axis: str = "first"
    """Axis of the examples in the stream."""
    _layouts: dict[tuple[str, ...], Any] = field(default_factory=dict)

    def layer(self, facts: LayerFacts) -> Words:
        """Sublayers of one layer by name."""
        found: Words = {}
        chosen = self._chosen(facts)
        for word, branch in chosen.items():
            found[word] = self._branch(facts.call, branch, word)
        self._extras(facts, chosen, found)
        return {word: found[word] for word in ("attention", "cross_attention", "mlp") if word in found}

    def _chosen(self, facts: LayerFacts) -> dict[str, BranchFacts]:
        """One branch of each kind; of several MLPs the first behind attention that is no convolution."""
        found: dict[str, BranchFacts] = {}
        attending = [i for i, branch in enumerate(facts.branches) if branch.kind != "mlp"]
        for kind in SUBLAYERS:
            own = [(i, branch) for i, branch in enumerate(facts.branches) if branch.kind == kind]
            if not own:
                continue
            behind = [one for one in own if not attending or one[0] > attending[0]]
            fitting = [one for one in behind if not self._convolves(one[1])]
            if kind == "mlp" and not attending and len(own) > 1:
                # a layer without attention mixes first, by something else in its place
                found["attention"] = own[0][1]
                own = own[1:]
            mixer = found.get("attention")
            fitting, behind = ([one for one in some if one[1] is not mixer] for some in (fitting, behind))
            found[kind] = (fitting or behind or own)[-1 if kind == "mlp" and not attending else 0][1]
            for _, other in own:
                if other is not found[kind]:
                    what = (
                        self.scene.below(other.projection.path, facts.call.path) if other.projection else "?"
                    )
                    text = f"a further branch, which ends in {what}, can be adapted as `extra` only"
                    self.notes.remark((*self.loc, kind), text)
        return found

    def _branch(self, layer: Call, facts: BranchFacts, word: str) -> Words:
        words: Words = {}
        loc, graph = (*self.loc, word), self.scene.graph
        if facts.before is not None:
            self._put(words, layer, ("norm", "before"), facts.before.path, loc)
        if word == "mlp":
            self._mlp(words, layer, facts, loc)
        elif facts.events:
            self._attention(words, layer, facts, loc)
        start = self._start(layer, facts) if facts.before is None and facts.events else None
        if start is not None:
            words["start"] = start
        end = self._end(words, layer, facts, word)
        for step in facts.steps:
            if end is not None and graph.is_inside(step.call, end):
                continue  # it stands before what the branch gives
            # what is an identity here is a dropout under another config
            place = ("norm", "after") if step.is_norm else ("tail",)
            self._put(words, layer, place, step.call.path, loc)
        if facts.after_residual is not None:
            self._put(words, layer, ("norm", "after_residual"), facts.after_residual.path, loc)
        if word != "mlp" and not facts.events:
            what = end.kind if end is not None else "the branch"
            words["without"] = dict.fromkeys(("core", "q", "k", "v", "o"), f"{what} computes no attention")
        self._factor(words, layer, facts, loc)
        return words

    def _factor(self, words: Words, layer: Call, facts: BranchFacts, loc: tuple[str, ...]) -> None:
        """What multiplies the branch behind its last module: a field, a number, or a gate."""
        steps = [step.call.gives for step in facts.steps if step.call.kind != "Identity"]
        value = steps[-1] if steps and steps[-1] is not None else facts.end
        by = factors.factor(self.scene.seen, facts, value)
        if by is None:
            if factors.varies(self.scene.seen, facts, value):
                why = "what it gives is multiplied by what is made of the inputs"
                words["without"] = {**words.get("without", {}), "branch": why}
        elif not isinstance(by, float) or abs(by - 1) > factors.CLOSE:
            name = factors.named(self.scene.modules[layer.path], self.scene.config, by)
            if name is not None:
                words["scale"] = name
            else:
                self.notes.gap((*loc, "scale"), "each channel of the branch is multiplied, by no field seen")

    def _start(self, layer: Call, facts: BranchFacts) -> str | None:
        """The module that is called with the stream, if the first projections read it turned."""
        graph = self.scene.graph
        stream = graph.nodes[facts.source].shape
        first = [graph.calls[one.call] for one in facts.first if one.call is not None]
        if not first or any(
            graph.nodes[c.given].shape[:2] == stream[:2] for c in first if c.given is not None
        ):
            return None
        around = [call for call in graph.around(first[0].parent) if call.given == facts.source]
        inside = [call for call in around if graph.is_inside(call, layer)]
        return self.scene.below(inside[0].path, layer.path) if inside else None

    def _put(
        self, words: Words, layer: Call, place: tuple[str, ...], path: str, loc: tuple[str, ...]
    ) -> None:
        """Name a module below the layer."""
        below = self.scene.below(path, layer.path)
        if below is None:
            self.notes.gap(loc, f"{'.'.join(place)} is {path}, which lies outside the layer")
            return
        for word in place[:-1]:
            words = words.setdefault(word, {})
        words[place[-1]] = below

    # ------------------------------------------------------------------------------------------ attention

    def _attention(self, words: Words, layer: Call, facts: BranchFacts, loc: tuple[str, ...]) -> None:
        event = facts.events[-1]
        self._put(words, layer, ("core",), event.core.path, loc)
        if event.kind == "whole":
            self.notes.gap(loc, f"{event.core.path} uses its weights without calling modules: no q, k, v, o")
            return
        bias = self._position_bias(layer, event)
        if bias is not None:
            self._put(words, layer, ("position_bias",), bias, loc)
        made: dict[str, str] = {}
        for role, found in zip("qkv", (event.q, event.k, event.v), strict=True):
            path = self._maker(role, found, layer, loc)
            if path is not None:
                made[role] = path
        hosts: dict[str, list[str]] = {}
        for role, path in made.items():
            hosts.setdefault(path, []).append(role)
        for path, roles in hosts.items():
            if len(roles) == 1:
                self._put(words, layer, (roles[0],), path, loc)
                words[roles[0]] = self._named(path, words[roles[0]])
            else:
                self._fused(words, layer, event, path, roles, loc)

    def _position_bias(self, layer: Call, event: Attention) -> str | None:
        """A module in the core that makes a bias of fixed positions, (1, H, T, T) or (H, T, T)."""
        graph = self.scene.graph
        if event.mask is None:
            return None
        query = graph.nodes[event.query].shape
        if len(query) < 3:
            return None
        heads, long = query[-3:-1]
        behind = graph.closure([event.mask], lambda v: v == layer.given)
        for call in graph.calls[event.core.index + 1 :]:
            if call.start >= event.core.end:
                break
            shape = graph.nodes[call.gives].shape if call.gives in behind and call.gives is not None else ()
            if (
                shape[-3:] == (heads, long, long)
                and next(self.scene.modules[call.path].parameters(), None) is not None
            ):
                return call.path
        return None

    def _maker(
        self, role: str, found: tuple[Projection, ...], layer: Call, loc: tuple[str, ...]
    ) -> str | None:
        """The module that makes the queries, keys or values."""
        called = [one for one in found if one.call is not None and self.scene.is_linear(one.path)]
        inside = [one for one in called if self.scene.below(one.path, layer.path) is not None]
        if not inside:
            what = ", ".join(one.path for one in found) or "nothing"
            self.notes.gap(loc, f"{role}: no linear module in the layer makes it, but {what}")
            return None
        widest = max(inside, key=lambda one: self.scene.graph.nodes[one.node].shape[-1])
        others = {one.path for one in inside} - {widest.path}
        if others:
            self.notes.remark((*loc, role), f"also made of {', '.join(sorted(others))}")
        return widest.path

    def _named(self, path: str, below: str) -> Any:
        """A module with the axis of the batch in what it is called with, if that is not the first."""
        graph = self.scene.graph
        given = {graph.nodes[call.given].shape for call in graph.calls_of(path) if call.given is not None}
        axes = {_axis(shape, self.batch) for shape in given}
        if self.axis == "none" or axes <= {self.axis}:
            return below
        return {"path": below, "batch": axes.pop() if len(axes) == 1 else "none"}

    def heads(self, event: Attention, k: str | None) -> tuple[int, int]:
        """(query heads, key/value heads) of one computation."""
        graph = self.scene.graph
        query, key = graph.nodes[event.query].shape, graph.nodes[event.key].shape
        batch = self.batch
        heads = query[1] if len(query) > 3 else max(query[0] // batch, 1)
        kv_heads = key[1] if len(key) > 3 else max(key[0] // batch, 1)
        if event.kind == "products" and event.scores is not None and len(query) > 3:
            heads = event.scores[0]  # the axes of a product may stand in any order
            kv_heads = heads if heads in key[1:-1] else kv_heads
        wide = query[-1]
        if k is not None:
            size = linear.shape(self.scene.modules[k])
            if size is not None and size[0] % wide == 0 and size[0] // wide < kv_heads:
                kv_heads = size[0] // wide
        return heads, kv_heads

    @property
    def batch(self) -> int:
        return self.scene.batch

    def _fused(
        self,
        words: Words,
        layer: Call,
        event: Attention,
        path: str,
        roles: list[str],
        loc: tuple[str, ...],
    ) -> None:
        below = self.scene.below(path, layer.path)
        graph = self.scene.graph
        if self._is_latent(words, event, path, str(below), roles):
            return
        key = (str(below), *roles)
        if key not in self._layouts:
            heads, kv_heads = self.heads(event, None)
            rows = linear.shape(self.scene.modules[path])
            wide = graph.nodes[event.query].shape[-1]
            if rows is not None and set(roles) == {"q", "k", "v"} and rows[0] % wide == 0:
                kv_heads = min(max((rows[0] // wide - heads) // 2, 1), heads)
            elif rows is not None and set(roles) == {"k", "v"} and rows[0] % (2 * wide) == 0:
                kv_heads = min(rows[0] // (2 * wide), kv_heads)  # they were repeated for the queries
            found = self.scene.rows.attention(self.scene.modules[path], event, roles, heads, kv_heads)
            self._layouts[key] = found
        found = self._layouts[key]
        if found is None:
            text = f"{path} makes {', '.join(roles)}, but their rows lie in no layout of the language"
            self.notes.gap((*loc, "fused"), text)
            words.setdefault("extra", {})[_name(str(below), {})] = below
            return
        words["fused"] = {"path": below, "layout": found[0], "order": list(found[1])}

    def _is_latent(self, words: Words, event: Attention, path: str, below: str, roles: list[str]) -> bool:
        """Whether a matrix holds the values and a part of the keys of all heads; it is named then."""
        if set(roles) != {"k", "v"}:
            return False
        key = (below, "latent")
        if key not in self._layouts:
            self._layouts[key] = self.scene.rows.latent(self.scene.modules[path], event)
        widths = self._layouts[key]
        if widths is None:
            return False
        words["fused"] = {
            "path": below,
            "layout": "per_head",
            "order": ["_", "v"],
            "widths": dict(zip(("_", "v"), widths, strict=True)),
        }
        words["without"] = {"k": f"keys are put together from rows of {below} and something beside them"}
        return True

    # ----------------------------------------------------------------------------------------------- mlp

    def _mlp(self, words: Words, layer: Call, facts: BranchFacts, loc: tuple[str, ...]) -> None:
        graph = self.scene.graph
        if not self._is_plain(facts):
            return
        split = halves(graph, facts)
        if split is None:
            made = [path for path in feeding(graph, facts) if self._is_role(path, layer)]
            if len(made) == 1:
                self._put(words, layer, ("up",), made[0], loc)
            elif made:
                self.notes.remark(
                    loc, f"several modules feed the last matrix, none is named: {', '.join(made)}"
                )
            return
        gates, ups = ([p for p in side if self._is_role(p, layer)] for side in (split.gates, split.ups))
        if len(gates) != 1 or len(ups) != 1:
            several = ", ".join((*gates, *ups)) or "none"
            self.notes.remark(loc, f"gate and up are not one module each, none is named: {several}")
        elif gates[0] != ups[0]:
            self._put(words, layer, ("gate",), gates[0], loc)
            self._put(words, layer, ("up",), ups[0], loc)
        else:
            path = gates[0]
            below = str(self.scene.below(path, layer.path))
            if (below,) not in self._layouts:
                size = linear.shape(self.scene.modules[path])
                host = self.scene.modules[path]
                self._layouts[below,] = self.scene.rows.gated(host, split, size[0] if size else 0)
            order = self._layouts[below,]
            if order is None:
                self.notes.gap((*loc, "fused"), f"{path} holds gate and up, but not in two blocks")
                words.setdefault("extra", {})[_name(below, {})] = below
            else:
                words["fused"] = {"path": below, "layout": "blocks", "order": list(order)}

    def _convolves(self, facts: BranchFacts) -> bool:
        """Whether the branch ends in a called module that is no linear map."""
        made = facts.projection
        return made is not None and made.call is not None and not self.scene.is_linear(made.path)

    def _is_plain(self, facts: BranchFacts) -> bool:
        """Whether the branch ends in one called matrix, and not in a bank of experts."""
        made = facts.projection
        return made is not None and made.call is not None and self.scene.is_linear(made.path)

    def _is_role(self, path: str, layer: Call) -> bool:
        return self.scene.is_linear(path) and self.scene.below(path, layer.path) is not None

    # ------------------------------------------------------------------------------------------- the end

    def _end(self, words: Words, layer: Call, facts: BranchFacts, word: str) -> Call | None:
        """Name the module that gives the branch its output; its call, if it is named as `out`."""
        role, loc = "down" if word == "mlp" else "o", (*self.loc, word)
        mixes = word != "mlp" and not facts.events
        if not mixes and self._is_plain(facts) and facts.projection is not None:
            if self.scene.below(facts.projection.path, layer.path) is not None:
                self._put(words, layer, (role,), facts.projection.path, loc)
                words[role] = self._named(facts.projection.path, words[role])
                if not isinstance(words[role], dict) or words[role]["batch"] != "second":
                    return None
        outs = [call for call in facts.outs if self.scene.below(call.path, layer.path) not in (None, ".")]
        if outs:
            # the outermost: what is inside is more likely to be written in another way
            self._put(words, layer, ("out",), outs[-1].path, loc)
            return outs[-1]
        self.notes.gap(loc, f"{role}: no module gives the branch its output in {layer.path}")
        return None

    def _extras(self, facts: LayerFacts, chosen: Mapping[str, BranchFacts], found: Words) -> None:
        """Linear modules that were called and have no role: they may be adapted by name."""
        named = {path for words in found.values() for path in _paths(words)}
        chosen_ids = {id(branch) for branch in chosen.values()}
        branches = [*chosen.items(), *((b.kind, b) for b in facts.branches if id(b) not in chosen_ids)]
        for word, branch in branches:
            words = found.get(word if word in found else "mlp")
            if words is None:
                continue
            for call in self._inside(facts, branch):
                below = self.scene.below(call.path, facts.call.path)
                if below is None or below in named or self._is_of_bank(facts.call.path, below):
                    continue
                taken = words.setdefault("extra", {})
                name = _name(below, taken)
                taken[name] = self._named(call.path, below)
                named.add(below)

    def _is_of_bank(self, layer: str, below: str) -> bool:
        """Whether a module is one of several alike in a list, as an expert is; a sequence has none."""
        parts = below.split(".")
        above = (".".join((layer, *parts[:at])) for at, part in enumerate(parts) if part.isdigit())
        return any(not isinstance(self.scene.modules[path], nn.Sequential) for path in above)

    def _inside(self, facts: LayerFacts, branch: BranchFacts) -> list[Call]:
        """Calls of linear modules whose outputs the branch is made of."""
        graph = self.scene.graph
        entered = {facts.given, branch.stream, branch.source}
        # what only decides which numbers are taken, as a choice of keys, is reached by no gradient
        behind = graph.closure([branch.operand], lambda v: v in entered or not graph.nodes[v].floating)
        inside = (call for call in graph.calls[facts.call.index + 1 :] if call.start < facts.call.end)
        linears = [c for c in inside if c.is_leaf and c.gives in behind and self.scene.is_linear(c.path)]
        linears = [c for c in linears if len(c.outputs) == 1]  # a router that gives more is no linear map
        # a gate with one output cannot have an update of low rank
        return [c for c in linears if min(linear.shape(self.scene.modules[c.path]) or (0,)) > 1]


def _axis(shape: tuple[int, ...], examples: int) -> str:
    """Which axis the examples are in; several rows of each may follow one another in the first."""
    if shape[0] == examples or len(shape) < 3 or shape[1] != examples:
        return "first" if shape[0] % examples == 0 else "none"
    return "second"


def _name(below: str, taken: Mapping[str, Any]) -> str:
    """A name for an extra module: the last words of its path that are not taken."""
    parts = below.split(".")
    for count in range(len(parts) if parts[-1].isdigit() else 1, len(parts) + 1):
        name = "_".join(parts[-count:])
        if name not in RESERVED and name not in taken and name[0].isalpha():
            return name
    return f"further_{'_'.join(parts)}"


def _paths(words: Mapping[str, Any]) -> list[str]:
    """Every module that a sublayer names."""
    found: list[str] = []
    for key, value in words.items():
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, Mapping) and key != "sizes":
            found += _paths(value)
    return found


def arguments(module: nn.Module) -> list[str]:
    """Names of what a module's forward takes."""
    return list(inspect.signature(type(module).forward).parameters)[1:]
