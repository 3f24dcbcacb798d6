"""How many wrong interfaces are refuted: every mutant of every shipped one, in all scenes of its row.

python -m tests.authoring.mutation [ROW ...]     rows of the table, all by default
python -m tests.authoring.mutation [FILE ...]    other interfaces, in tiny models of all their types

A mutant that means the same is counted apart. That it does is shown, not judged by hand: in every scene it
resolves to the same blueprint, which is all that methods see of an interface; or to places whose modules
give, and are given, the very same values in the forward pass.
"""

from __future__ import annotations

import inspect
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

import adapterkit as ak
from adapterkit.author.cast import cast
from adapterkit.author.check import look, observe_claims
from adapterkit.author.claims import Book
from adapterkit.author.prove import COLUMNS, prove_methods
from adapterkit.author.scene import Scene
from adapterkit.errors import ResolveError, SpecError
from adapterkit.methods.flow import base_forward, entry_place, number
from adapterkit.model.blueprint import Blueprint
from adapterkit.model.cores import cores
from adapterkit.model.resolve import resolve
from adapterkit.spec import registry
from tests.authoring.mutants import Mutant, mutants
from tests.authoring.scenes import interface, scenes
from tests.models import tiny

ROLES = ("q", "k", "v", "o", "gate", "up", "down", "fused")
WORDS = ("ids", "embeds", "mask", "positions")


@dataclass
class Outcome:
    """Mutants of one row by what became of them."""

    refuted: Counter[str] = field(default_factory=Counter)
    """By what refuted them: the schema, resolving, or observing."""
    same: list[Mutant] = field(default_factory=list)
    elsewhere: list[Mutant] = field(default_factory=list)
    """Of alternatives for other versions of transformers, which no scene of this one has."""
    survivors: list[tuple[Mutant, str]] = field(default_factory=list)

    @property
    def wrong(self) -> int:
        return sum(self.refuted.values()) + len(self.survivors)

    @property
    def rate(self) -> float:
        return sum(self.refuted.values()) / self.wrong if self.wrong else 1.0


def run(row: str, limit: int | None = None) -> Outcome:
    """Every mutant of a row's interface, or a few spread over all of them."""
    return of(*_subject(row), limit)


def of(seen: list[Scene], whole: ak.Interface, limit: int | None = None) -> Outcome:
    """Every mutant of an interface in these scenes, or a few spread over all of them."""
    assert observe_claims(whole, seen).ok, "an interface that is wrong itself says nothing"
    data = registry.dump(whole)
    original = [meaning(resolve(scene.model, whole), scene) for scene in seen]
    found = list(mutants(data, seen[0].model, _roots(whole, seen)))
    if limit is not None:
        found = found[:: max(len(found) // limit, 1)]
    outcome = Outcome()
    idle = _idle(data, seen, original)
    for mutant in found:
        if any(mutant.loc[: len(loc)] == loc for loc in idle):
            outcome.elsewhere.append(mutant)
            continue
        by = judged(mutant, seen, whole)
        if by is not None:
            outcome.refuted[by] += 1
            continue
        changed = ak.Interface.load(mutant.data)
        new = [meaning(resolve(scene.model, changed), scene) for scene in seen]
        if new == original or _is_offered(mutant, changed, seen):
            outcome.same.append(mutant)
        else:
            outcome.survivors.append((mutant, _difference(original, new)))
    return outcome


def _subject(name: str) -> tuple[list[Scene], ak.Interface]:
    """A row of the table, else a file of the shipped interfaces."""
    if name in tiny.ROWS:
        return list(scenes(name)), interface(name)
    whole = registry.by_name(name)
    return cast(whole), whole


def _idle(data: Any, seen: list[Scene], original: list[Any]) -> list[tuple[str | int, ...]]:
    """Alternatives without which nothing changes on this version."""
    found = []
    for mutant in mutants(data, seen[0].model, {}):
        if mutant.kind == "drop" and mutant.what.startswith("alternative"):
            try:
                changed = ak.Interface.load(mutant.data)
                new = [meaning(resolve(scene.model, changed), scene) for scene in seen]
            except (ResolveError, SpecError):
                continue
            if new == original:
                found.append(mutant.loc)
    return found


def judged(mutant: Mutant, seen: list[Scene], original: ak.Interface) -> str | None:
    """What refutes a mutant, None if nothing does."""
    try:
        changed = ak.Interface.load(mutant.data)
    except SpecError:
        return "read"
    blueprints = []
    for scene in seen:
        try:
            blueprints.append((resolve(scene.model, changed), scene))
        except (ResolveError, SpecError):
            return "resolved"
    for blueprint, scene in blueprints:
        book = Book()
        if any(found.refutes for found in look(blueprint, scene, book)):
            return "observed"
    tried: set[str] = set()
    if mutant.loc[:1] == ("unsupported",) and mutant.kind == "drop":
        tried = set(original.unsupported) - set(changed.unsupported)
    if mutant.loc[-1:] == ("batch",):
        tried = {"parallel"}
    if mutant.loc[-1:] == ("filler",):
        tried = {"prompt_tuning"}
    verdicts = prove_methods(changed, seen[0], tuple(tried & set(COLUMNS))) if tried else ()
    return "observed" if any(verdict.state == "broken" for verdict in verdicts) else None


def _is_offered(mutant: Mutant, changed: ak.Interface, seen: list[Scene]) -> bool:
    """Whether a mutant is true, too: of an axis that is said to hold no examples it says that it does, and
    each lane of Parallel then gives what its adapter gives alone.
    """
    if mutant.loc[-1:] != ("batch",):
        return False
    return all(prove_methods(changed, scene, ("parallel",))[0].state == "proved" for scene in seen)


def _roots(whole: ak.Interface, seen: list[Scene]) -> dict[str, Any]:
    found = {}
    for scene in seen:
        blueprint = resolve(scene.model, whole)
        for address, info in blueprint.stacks.items():
            if "/" not in address:
                found.setdefault(address, (info.root, info.layers[0]))
    return found


def meaning(blueprint: Blueprint, scene: Scene) -> Any:
    """What methods see of an interface in one scene; places by the values that go in and out there."""
    graph = scene.observation.graph

    def values(path: str) -> Any:
        calls = graph.calls_of(path)
        return tuple((call.given, call.gives) for call in calls) or path

    # stacks and extra modules may have any names: they go by their paths
    own = {
        address: f"<{info.path}:{info.num_layers}:{blueprint.places[f'{address}.0.layer'].path}>"
        for address, info in blueprint.stacks.items()
    }

    def label(address: str, stack: str, role: str, path: str) -> str:
        rest = address.removeprefix(stack)
        free = role not in ROLES and address in blueprint.slots
        return own[stack] + (rest.removesuffix(role) + path if free else rest)

    slots = {
        label(a, s.stack, s.role, s.path): (graph.paths.get(s.path), s.shape, s.rows, s.transposed, s.batch)
        for a, s in blueprint.slots.items()
    }
    places = {}
    for a, s in blueprint.places.items():
        by_weights = a.endswith((".pooler", ".core", ".layer", ".entry", ".table"))
        output_only = a.endswith((".out", ".tail", ".exit", ".final_norm", ".after", ".after_residual"))
        seen = values(s.path)
        if output_only and isinstance(seen, tuple):
            seen = tuple(gives for _, gives in seen)
        places[label(a, s.stack, s.role, s.path)] = (graph.paths.get(s.path) if by_weights else seen, s.batch)
    stacks = {}
    for address, info in blueprint.stacks.items():
        entry = entry_place(blueprint, address).module
        takes = inspect.signature(base_forward(entry)).parameters
        given = info.inputs.model_dump()
        # an argument that the entry does not take is never given; whether there are ids is asked
        given |= {w: None for w in WORDS[1:] if given[w] not in takes}
        reads = info.reads.model_dump() if info.reads else None
        if reads is not None:
            reads["mask"] = reads["mask"] if reads["mask"] in takes else None
            reads["stack"] = own.get(reads["stack"], reads["stack"])
        address = own[address]
        stacks[address] = (info.path, info.num_layers, given, info.parallel, reads, info.by_default)
        stacks[address] += tuple(
            {key.replace(info.address, "", 1): value for key, value in found.items()}
            for found in (info.kernels, info.eager)
        )
    dims = {
        label(a, core.stack, core.role, core.path): (core.kv_heads, core.key_dim, core.value_dim)
        for a, core in cores(blueprint).items()
    }
    scales = {
        own.get(a.partition(".")[0], "") + a.partition(".")[2]: [round(float(n), 6) for n in _numbers(scale)]
        for a, scale in blueprint.scales.items()
    }
    lacks = {
        own.get(a.partition(".")[0], "") + a.partition(".")[2]
        for a, said in blueprint.without.items()
        if "branch" in said
    }
    scales = {a: factor for a, factor in scales.items() if factor != [1.0] and a not in lacks}
    heads = sorted(head.path for head in blueprint.heads)
    poolers = sorted(head.path for head in blueprint.poolers)
    return slots, places, stacks, dims, scales, heads, poolers, sorted(blueprint.unsupported)


def _numbers(scale: Any) -> Any:
    return torch.as_tensor(number(scale)).detach().flatten().tolist()


def _difference(original: list[Any], new: list[Any]) -> str:
    for before, after in zip(original, new, strict=True):
        for a, b in zip(before, after, strict=True):
            if a != b and isinstance(a, dict):
                keys = [key for key in {**a, **b} if a.get(key) != b.get(key)]
                return f"{keys[0]}: {a.get(keys[0])} became {b.get(keys[0])}"[:300]
            if a != b:
                return f"{a} became {b}"[:300]
    return "nothing"


def lines(row: str, outcome: Outcome, seconds: float) -> Iterator[str]:
    by = outcome.refuted
    yield (
        f"{row:<16} {outcome.wrong:>6} {by['read']:>6} {by['resolved']:>9} {by['observed']:>9}"
        f" {len(outcome.survivors):>9} {outcome.rate:>8.2%} {len(outcome.same):>6}"
        f" {len(outcome.elsewhere):>9} {seconds:>7.1f}"
    )
    yield from (f"    survives: {mutant} [{why}]" for mutant, why in outcome.survivors)


def main(rows: list[str]) -> int:
    warnings.simplefilter("ignore")
    verbose = "-v" in rows
    rows = [row for row in rows if not row.startswith("-")] or list(tiny.ROWS)
    print(f"transformers {transformers.__version__}")
    print(
        f"{'interface':<16} {'wrong':>6} {'read':>6} {'resolved':>9} {'observed':>9} {'survivors':>9}"
        f" {'refuted':>8} {'same':>6} {'elsewhere':>9} {'seconds':>7}"
    )
    whole = Outcome()
    for row in rows:
        start = time.perf_counter()
        outcome = run(row)
        for line in lines(row, outcome, time.perf_counter() - start):
            print(line, flush=True)
        for mutant in outcome.same if verbose else ():
            print(f"    the same: {mutant}")
        whole.refuted += outcome.refuted
        whole.same += outcome.same
        whole.elsewhere += outcome.elsewhere
        whole.survivors += outcome.survivors
    print(
        f"{sum(whole.refuted.values())} of {whole.wrong} mutants that change the meaning are refuted:"
        f" {whole.rate:.2%}; {len(whole.same)} mean the same,"
        f" {len(whole.elsewhere)} are about other versions"
    )
    return int(whole.rate < 0.99)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
