"""Claims about the layers of a stack: which branches there are, and what each of their modules is."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from adapterkit.author import factors, mlp_claims
from adapterkit.author.graph import Call, Projection
from adapterkit.author.layers import BranchFacts, LayerFacts
from adapterkit.author.seen import Block, BranchSeen, Seen, blocks
from adapterkit.methods.flow import number
from adapterkit.model import linear
from adapterkit.model.blueprint import Slot
from adapterkit.spec.vocabulary import ROLES


def layers(seen: Seen) -> None:
    """Every claim about the layers of a stack."""
    ran = seen.calls()
    loc = (*seen.loc, "layers")
    if not ran:
        text = f"{seen.info.num_layers} layers at {' or '.join(seen.said.layers.names())}"
        if any(call.parent < 0 for call in seen.graph.calls) and seen.entry is not None:
            seen.refute(loc, text, "none of them is called as a module, although the stack runs")
        else:
            seen.unseen(loc, text)
        return
    _order(seen, ran)
    further = 0
    for index, place, calls in seen.layers():
        said = list(blocks(seen, index, place))
        for call in calls:
            further += _layer(seen, said, seen.observation.layer(call))
            _named(seen, said, call)
    if seen.said.aside:
        text = "aside: something else than the sublayers changes the stream"
        seen.judge(bool(further), (*seen.loc, "aside"), text, "nothing does")
    _once(seen)


def _order(seen: Seen, ran: list[Call]) -> None:
    """The stream flows from each layer to the next."""
    loc = (*seen.loc, "layers")
    text = (
        f"the stream runs through the layers at {' or '.join(seen.said.layers.names())}, one after the other"
    )
    missed = [place.path for _, place, calls in seen.layers() if not calls]
    if missed:
        seen.refute(loc, text, f"{missed[0]} is never called as a module")
        return
    facts = [seen.observation.layer(call) for call in ran]
    for before, after in pairwise(facts):
        if before.gives is None or seen.graph.same(after.given) != seen.graph.same(before.gives):
            what = f"{after.call.path} is not called with what {before.call.path} gives"
            # a stage between two layers may change the stream; a second pass begins anew
            if before.gives is None or before.gives not in seen.graph.closure([after.given]):
                seen.refute(loc, text, what)
                return
    seen.judge(True, loc, text, "")
    parallel = [one.is_parallel for one in facts if {b.kind for b in one.branches} >= {"attention", "mlp"}]
    if parallel:
        said = seen.info.parallel
        claim = f"attention and MLP of a layer {'read the same input' if said else 'follow each other'}"
        observed = "the MLP reads what attention was added to" if said else "both read the input of the layer"
        hint = "" if said else "say 'block: parallel'"
        seen.judge(all(one == said for one in parallel), (*seen.loc, "block"), claim, observed, hint)


def _layer(seen: Seen, said: list[Block], facts: LayerFacts) -> int:
    """Each sublayer that is said is one branch, and each branch is said.

    Returns: how many further branches there are.
    """
    left = list(facts.branches)
    for block in said:
        own = block.path("own_adapter")
        if own is not None:
            inside = _of_own_adapter(block, facts)
            left = [b for b in left if b not in inside]
            text = f"own_adapter: {own.rpartition('.')[2]} adds to the stream behind the residual add"
            seen.judge(bool(inside), block.at("own_adapter"), text, "it adds nothing to the stream")
            _nothing_else(seen, block, own)
    for block in said:
        if "branch" in block.lacks:
            continue  # it is no summand of the stream by itself
        if "core" in block.lacks and block.path("out") is not None:
            left = _mixer(seen, block, facts, left)
            continue
        ends = {block.path("o"), block.path("down"), block.path("out")} - {None}
        # mixers that compute no attention have no core
        mixes = block.word == "attention" and "core" not in block.places
        found = [b for b in left if b.kind == block.word or (mixes and _ends(b) & ends)]
        right = [b for b in found if _ends(b) & ends] or found
        if right:
            left.remove(right[0])
            seen.judge(True, block.loc, f"{block.word} is a branch that is added to the stream", "")
            _judge(BranchSeen(seen, block, right[0], facts.call))
            continue
        text = f"{block.word} is a branch that is added to the stream"
        if block.word == "cross_attention" and not _is_given_states(seen, facts.call):
            seen.unseen(block.loc, text)
            continue
        kinds = ", ".join(branch.kind for branch in facts.branches) or "none"
        seen.refute(block.loc, text, f"branches in {facts.call.path}: {kinds}")
    for block in said:
        if "branch" in block.lacks:
            left = _no_summand(seen, block, facts, left)
    named = {s.path for block in said for name, s in block.slots.items() if name not in (*ROLES, "fused")}
    for branch in left:
        end = branch.projection
        is_aside = seen.said.aside is not None and branch.kind == "mlp"
        if is_aside or (end is not None and (end.path in named or _convolves(seen, end.path))):
            continue  # its linear maps are named under `extra`, for others there is no word
        what = (
            branch.projection.path
            if branch.projection
            else (branch.outs[-1].path if branch.outs else "a sum")
        )
        text = "every branch that is added to the stream is described"
        observed = f"in {facts.call.path} what {what} gives is added too ({branch.kind})"
        seen.refute(
            (*seen.loc, branch.kind) if branch.kind not in [b.word for b in said] else seen.loc,
            text,
            observed,
        )
    return len(left)


def _of_own_adapter(block: Block, facts: LayerFacts) -> list[BranchFacts]:
    """The branches that the model's own adapter adds."""
    own = block.path("own_adapter")
    found = (b for b in facts.branches if b.first) if own is not None else ()
    return [b for b in found if all(_is_below(one.path, str(own)) for one in b.first)]


def _nothing_else(seen: Seen, block: Block, own: str) -> None:
    """What is silent with the model's own adapter is nothing that the sublayer names."""
    named = {**block.slots, **block.places}
    inside = [word for word, one in named.items() if word != "own_adapter" and _is_below(one.path, own)]
    text = f"own_adapter: {own.rpartition('.')[2]} holds nothing else of the sublayer"
    observed = f"{' and '.join(inside)} of it" if inside else ""
    seen.judge(not inside, block.at("own_adapter"), text, observed, aspect="whole")


def _convolves(seen: Seen, path: str) -> bool:
    """Whether a module with weights is no linear map."""
    return linear.shape(seen.blueprint.model.get_submodule(path)) is None


def _ends(branch: BranchFacts) -> set[str]:
    """Paths of the modules that may be said to give a branch its output."""
    found = {call.path for call in branch.outs}
    return found | ({branch.projection.path} if branch.projection is not None else set())


def _named(seen: Seen, said: list[Block], layer: Call) -> None:
    """Every linear map that a layer calls has a name, unless it belongs to a block that has one.

    What only decides which numbers are taken, as a choice of keys, is reached by no gradient and needs none.
    """
    graph = seen.graph
    behind = graph.closure(layer.outputs, lambda value: not graph.nodes[value].floating)
    known = {graph.paths.get(slot.path, slot.path) for block in said for slot in block.slots.values()}
    mixers = [block for block in said if "core" in block.lacks]  # their matrices have names
    whole = [block.path("out") for block in said if block not in mixers]
    whole += [block.path("own_adapter") for block in said]
    known |= _left_out(seen, said, layer)
    text = "every linear map of a layer is named, as a role or under 'extra'"
    for call in graph.calls[layer.index + 1 :]:
        if call.start >= layer.end:
            break
        if call.path in known or any(path and _is_below(call.path, path) for path in whole):
            continue
        if call.gives is not None and call.gives not in behind:
            continue
        if call.is_leaf and call.weights and linear.shape(seen.module(call.path)) is not None:
            name = call.path.removeprefix(layer.path).strip(".")
            seen.refute((*seen.loc, "layers"), text, f"{name} is called in {layer.path}", aspect="named")
            return
    seen.judge(True, (*seen.loc, "layers"), text, "", aspect="named")


def _left_out(seen: Seen, said: list[Block], layer: Call) -> set[str]:
    """What makes queries, keys and values that a sublayer is said to do without, as some versions do."""
    lacking = {role for block in said for role in "qkv" if role in block.lacks}
    return {
        one.path
        for branch in seen.observation.layer(layer).branches
        for event in branch.events
        for role in lacking
        for one in getattr(event, role)
    }


def _once(seen: Seen) -> None:
    """No module has two roles."""
    slots = [slot for slot in seen.blueprint.slots.values() if slot.stack == seen.info.address]
    found: dict[str, str] = {}
    for slot in slots:
        if slot.rows is not None:
            continue
        path = seen.graph.paths.get(slot.path, slot.path)
        other = found.setdefault(path, slot.address)
        # a layer that is used at several depths stands at each of them
        if other != slot.address and other.rpartition(".")[2] != slot.role:
            text = f"{slot.role}: the module has one role"
            loc = (*seen.loc, *slot.address.split(".")[2:]) if slot.layer is not None else seen.loc
            seen.refute(loc, text, f"{slot.path} is {other} already", aspect=f"once {slot.role}")


def _is_below(path: str, above: str) -> bool:
    return path == above or path.startswith(f"{above}.")


def _is_given_states(seen: Seen, layer: Call) -> bool:
    """Whether a layer was called with states of another stack."""
    stream = layer.given
    return any(
        seen.graph.nodes[value].floating and value != stream and len(seen.graph.nodes[value].shape) == 3
        for name, value in layer.arguments
        if "states" in name
    )


def _no_summand(seen: Seen, block: Block, facts: LayerFacts, left: list[BranchFacts]) -> list[BranchFacts]:
    """A sublayer that is no summand by itself, but with others or in another shape. Returns the rest."""
    graph = seen.graph
    ends = {block.path("o"), block.path("down"), block.path("out")} - {None}
    gives = {
        call.gives for end in ends for call in graph.calls_of(str(end), facts.call) if call.gives is not None
    }
    own = [b for b in left if gives & (_inside(seen, b) | {call.gives for call in b.outs})]
    if not own:
        return left
    for branch in own:
        shapes = {graph.nodes[value].shape for value in gives}
        together = any(other.add == branch.add for other in left if other not in own)
        alone = bool(_ends(branch) & ends) and not together
        text = f"without.branch: what {block.word} gives is no summand of the stream by itself"
        observed = f"what {branch.outs[-1].path if branch.outs else 'it gives'} gives is added as it is"
        other_shape = graph.nodes[branch.stream].shape not in shapes
        multiplied = graph.nodes[branch.stream].op in ("mul", "div")
        gated = factors.varies(seen.observation, branch, branch.end)
        right = not alone or other_shape or multiplied or gated
        seen.judge(right, (*block.loc, "without", "branch"), text, observed)
        if gated:  # what it is made of is that of any branch
            claim = f"{block.word} is a branch that is added to the stream"
            if seen.judge(branch.kind == block.word, block.loc, claim, f"it is {branch.kind}"):
                _inner(BranchSeen(seen, block, branch, facts.call))
    return [branch for branch in left if branch not in own]


def _inside(seen: Seen, branch: BranchFacts) -> frozenset[int]:
    """What a branch was made of, as far back as the stream."""
    ends = {branch.stream, branch.source, *branch.entered}
    return seen.graph.closure([branch.end], lambda value: value in ends)


def _mixer(seen: Seen, block: Block, facts: LayerFacts, left: list[BranchFacts]) -> list[BranchFacts]:
    """A sublayer without attention in the place of one: its output is added. Returns the other branches."""
    end = str(block.path("out"))
    found = [b for b in left if b.projection is not None and _is_below(b.projection.path, end)]
    text = f"{block.word}: what {end.rpartition('.')[2]} gives is added to the stream"
    if seen.judge(bool(found), block.loc, text, f"nothing of it is added in {facts.call.path}"):
        branch = BranchSeen(seen, block, found[0], facts.call)
        _norm_before(branch)
        _way_to_the_add(branch)
        _called(branch)
    return [branch for branch in left if branch not in found[:1]]


def _judge(branch: BranchSeen) -> None:
    """Every claim about one sublayer."""
    _norm_before(branch)
    _inner(branch)
    _factor(branch)
    _residual(branch)
    _called(branch)


def _inner(branch: BranchSeen) -> None:
    """What stands between the norm before a branch and the add."""
    if branch.block.word == "mlp":
        mlp_claims.judge(branch)
    else:
        _attention(branch)
    _end(branch)
    _way_to_the_add(branch)


def _attention(branch: BranchSeen) -> None:
    block, facts = branch.block, branch.facts
    if not facts.events:
        return
    event = facts.events[-1]
    core = block.path("core")
    text = f"core: attention is computed in {branch.rel(core)}"
    branch.judge(event.core.path == core, "core", text, f"it is computed in {branch.rel(event.core.path)}")
    whats = {"q": "queries", "k": "keys", "v": "values"}
    for role, found in zip("qkv", (event.q, event.k, event.v), strict=True):
        slot = block.slots.get(role)
        fused = slot is not None and slot.rows is not None
        word = "fused.path" if fused else role
        made = tuple(one for one in found if one.call is not None)
        if slot is None and role in block.lacks:
            _lacking(branch, role, whats[role], found)
            continue
        if slot is None:
            named = {s.path for s in block.slots.values()}
            unsaid = [one for one in made if one.path not in named and _is_linear(branch.seen, one.path)]
            if unsaid or (made and _is_linear(branch.seen, made[0].path)):
                text = f"{role}: what makes the {whats[role]} is named"
                branch.judge(False, role, text, f"{branch.rels(made)} makes them, and is not named {role!r}")
            continue
        text = f"{word}: {branch.rel(slot.path)} makes the {whats[role]}"
        right = slot.path in {one.path for one in made}
        branch.judge(right, word, text, f"{branch.rels(found)} makes them", aspect=role if fused else "")


def _lacking(branch: BranchSeen, role: str, what: str, found: tuple[Projection, ...]) -> None:
    """What an alternative does without is not there: else a word that misses in the others would be silent.

    A block on its own may also leave out what some versions make in another way.
    """
    block, paths = branch.block, {one.path for one in found}
    if "any_of" not in block.loc or len(paths) != 1:
        return
    own = [path for path in paths if _is_below(path, branch.layer.path) and _is_linear(branch.seen, path)]
    named = {slot.path for slot in block.slots.values()}
    text = f"without.{role}: no module of the layer makes the {what}"
    right = not own or own[0] in named
    branch.judge(right, f"without.{role}", text, f"{branch.rels(found)} makes them")


def _is_linear(seen: Seen, path: str) -> bool:
    """Whether a module could be named as a role."""
    return linear.shape(seen.blueprint.model.get_submodule(path)) is not None


def _end(branch: BranchSeen) -> None:
    """The module that gives the branch its output: o, down or out."""
    block, facts, seen = branch.block, branch.facts, branch.seen
    role = "down" if block.word == "mlp" else "o"
    made = facts.projection if facts.projection is not None and facts.projection.call is not None else None
    said, out = block.path(role), block.path("out")
    if said is not None:
        text = f"{role}: {branch.rel(said)} gives the branch its output"
        found = made.path if made is not None else facts.outs[-1].path if facts.outs else None
        branch.judge(made is not None and made.path == said, role, text, f"{branch.rel(found)} gives it")
    elif made is not None and _is_linear(seen, made.path):
        branch.judge(False, role, f"{role}: the last projection is named", f"it is {branch.rel(made.path)}")
    if out is not None:
        named = [call.path for call in facts.outs]
        text = f"out: what {branch.rel(out)} gives is the branch"
        seen_as = ", ".join(map(branch.rel, named)) or "no module gives it"
        branch.judge(out in named, "out", text, seen_as)


def _norm_before(branch: BranchSeen) -> None:
    block, facts = branch.block, branch.facts
    shared = branch.seen.blueprint.places.get(f"{_layer_address(branch)}.norm.before")
    said = block.path("norm.before") or (shared.path if shared else None)
    found = facts.before.path if facts.before is not None else None
    word = "norm.before"
    if said is None:
        if facts.before is not None and facts.before.kind != "Identity":
            text = "there is no norm before the branch"
            branch.judge(False, word, text, f"it begins with {branch.rel(found)}")
        return
    text = f"{'shared_norm' if shared else word}: {branch.rel(said)} normalises what the branch reads"
    observed = f"{branch.rel(found)} does" if found else "the branch reads the stream itself"
    if shared is not None:
        branch.seen.judge(found == said, (*branch.seen.loc, "shared_norm"), text, observed)
    else:
        branch.judge(found == said, word, text, observed)


def _layer_address(branch: BranchSeen) -> str:
    some: Slot = next(iter((*branch.block.places.values(), *branch.block.slots.values())))
    return f"{some.stack}.{some.layer}"


def _way_to_the_add(branch: BranchSeen) -> None:
    """Tail, norm after the branch, norm after the sum."""
    block, facts = branch.block, branch.facts
    steps = [
        step for step in facts.steps if step.call.kind != "Identity" or step.call.path == block.path("tail")
    ]
    tails = [step.call.path for step in steps if not step.is_norm]
    norms = [step.call.path for step in steps if step.is_norm]
    _last(branch, "tail", "is the last module before the residual add", tails)
    _last(branch, "norm.after", "normalises the branch before the residual add", norms)
    said, found = block.path("norm.after_residual"), facts.after_residual
    text = f"norm.after_residual: {branch.rel(said)} normalises the sum of branch and residual"
    if said is not None:
        observed = f"{branch.rel(found.path)} does" if found else "the sum goes on as it is"
        branch.judge(found is not None and found.path == said, "norm.after_residual", text, observed)
    elif found is not None and _goes_on_behind(branch, found):
        text = "no norm stands behind the residual add"
        branch.judge(False, "norm.after_residual", text, f"{branch.rel(found.path)} normalises the sum")


def _goes_on_behind(branch: BranchSeen, norm: Call) -> bool:
    """Whether a norm of the sum is that of the sublayer: one that is called again behind the model's own
    adapter, or there is none; else it is what that adapter reads.
    """
    facts = branch.seen.observation.layer(branch.layer)
    own = _of_own_adapter(branch.block, facts)
    again = [b.after_residual.path for b in own if b.after_residual is not None]
    return branch.block.path("own_adapter") is None or norm.path in again


def _last(branch: BranchSeen, word: str, what: str, found: list[str]) -> None:
    said = branch.block.path(word)
    if said is not None:
        observed = (
            f"{branch.rel(found[-1])} is it" if found else "no module of that kind is called in between"
        )
        branch.judge(bool(found) and found[-1] == said, word, f"{word}: {branch.rel(said)} {what}", observed)
    elif found:
        text = f"{word}: no module {what.removeprefix('is ')}".replace("the last module", "is called")
        branch.judge(False, word, text, f"{branch.rel(found[-1])} is called there", f"say {word!r}")


def _factor(branch: BranchSeen) -> None:
    """What is added is the branch, times the factor that is said."""
    seen, facts = branch.seen, branch.facts
    value = _given_last(branch)
    if value is None:
        return
    found = factors.factor(seen.observation, facts, value)
    said = number(seen.blueprint.scales.get(f"{_layer_address(branch)}.{branch.block.word}", 1.0))
    text = f"scale: the branch is added {'as it is' if _is_one(said) else f'times {_word(branch)}'}"
    if found is not None:
        wanted = torch.as_tensor(said).detach().double().flatten()
        right = bool(torch.isclose(torch.as_tensor(found).double(), wanted, rtol=1e-3, atol=1e-6).all())
        what = f"times {found:.4g}" if isinstance(found, float) else "times a number for each channel"
        branch.judge(right, "scale", text, f"it is added {what}", "say 'scale'")
    elif factors.varies(seen.observation, facts, value):
        observed = "it is multiplied by what is made of the inputs"
        branch.judge(False, "scale", text, observed, "say 'without: {branch: ...}'")


def _word(branch: BranchSeen) -> str:
    return str(branch.block.said.scale) if branch.block.said is not None else ""


def _is_one(said: Any) -> bool:
    return not isinstance(said, torch.Tensor) and said == 1


def _given_last(branch: BranchSeen) -> int | None:
    """What the last module of the branch that is named gives, on the way to the add."""
    block, graph = branch.block, branch.seen.graph
    role = "down" if block.word == "mlp" else "o"
    path = next((p for word in ("norm.after", "tail", "out", role) if (p := block.path(word))), None)
    if path is None:
        return None
    behind = graph.closure([branch.facts.term], lambda value: value == branch.facts.stream)
    calls = graph.calls_of(path, branch.layer)
    return next((call.gives for call in reversed(calls) if call.gives in behind), None)


def _residual(branch: BranchSeen) -> None:
    """What the branch was made of is what it is added to."""
    facts, graph = branch.facts, branch.seen.graph
    same = graph.same(facts.source) == graph.same(facts.stream)
    if branch.seen.info.parallel:
        layer = branch.seen.observation.layer(branch.layer)
        same = same or graph.same(facts.source) == graph.same(layer.given)
    text = f"{branch.block.word} is added to what it was made of"
    observed = "it is made of another value of the stream than it is added to"
    branch.seen.judge(same, branch.block.loc, text, observed, aspect="residual")


def _called(branch: BranchSeen) -> None:
    """Modules that may be adapted are called, and called with the batch where it is said to be."""
    for name, slot in branch.block.slots.items():
        if name in ("q", "k", "v", "o", "gate", "up", "down") and slot.rows is None:
            continue
        if slot.rows is not None or name == "fused":
            continue
        calls = branch.seen.graph.calls_of(slot.path, branch.layer)
        text = f"extra.{name}: {branch.rel(slot.path)} is called in the layer"
        if calls:
            branch.judge(True, f"extra.{name}", text, "")
        else:  # there may be inputs for which it is
            branch.seen.unseen(branch.block.at(f"extra.{name}"), text)
