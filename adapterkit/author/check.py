"""`ak.check`: what an interface claims, looked for in models that run; then every method, with its laws."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapterkit.author import input_claims, layer_claims, model_claims, size_claims, stack_claims
from adapterkit.author.cast import cast
from adapterkit.author.claims import Book, Claim
from adapterkit.author.prove import Verdict, prove_methods
from adapterkit.author.scene import Scene
from adapterkit.author.seen import Seen
from adapterkit.errors import Problem, ResolveError
from adapterkit.model.blueprint import Blueprint
from adapterkit.model.resolve import resolve
from adapterkit.spec import registry
from adapterkit.spec.schema import Interface


@dataclass(frozen=True)
class Report:
    """What was observed of an interface: a verdict for every claim and for every method."""

    interface: str
    claims: tuple[Claim, ...]
    methods: tuple[Verdict, ...]
    problems: tuple[Problem, ...]
    """What does not resolve, what was refuted, which laws are broken: sorted by place."""
    scenes: tuple[str, ...]
    """The models that were looked at."""

    @property
    def ok(self) -> bool:
        """Nothing was refuted and no law is broken. What could not be seen is in `unseen`."""
        return not self.problems

    @property
    def unseen(self) -> tuple[Claim, ...]:
        """Claims that no model showed, and none refuted."""
        return tuple(claim for claim in self.claims if claim.verdict == "unseen")

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data."""
        return {
            "ok": self.ok,
            "interface": self.interface,
            "models": list(self.scenes),
            "claims": [claim.to_dict() for claim in self.claims],
            "methods": [verdict.to_dict() for verdict in self.methods],
            "problems": [problem.to_dict() for problem in self.problems],
        }

    def __str__(self) -> str:
        lines = [f"{self.interface} on {', '.join(self.scenes)}"]
        lines += [f"  {claim.verdict:<8} {claim.text}" for claim in self.claims]
        lines += [f"  {verdict}" for verdict in self.methods]
        return "\n".join([*lines, *map(str, self.problems), self.summary()])

    def summary(self) -> str:
        """One line: how many claims hold, what was proved, what is refused."""
        held = sum(claim.verdict == "holds" for claim in self.claims)
        proved = sum(verdict.state == "proved" for verdict in self.methods)
        refused = [verdict.method for verdict in self.methods if verdict.state == "refused"]
        parts = [f"{held} claims hold"]
        parts += [f"{len(self.problems)} problems"] if self.problems else []
        parts += [f"{len(self.unseen)} not seen in these models"] if self.unseen else []
        parts += [f"{proved} of {len(self.methods)} methods proved"] if self.methods else []
        parts += [f"refused: {', '.join(refused)}"] if refused else []
        return f"{self.interface}: {', '.join(parts)}"


def check(
    spec: str | Path | dict[str, Any] | Interface,
    model: Any = None,
    *,
    inputs: Mapping[str, Any] | None = None,
    methods: Iterable[str] | None = None,
) -> Report:
    """Prove an interface: run tiny models, look for every claim, attach every method and try its laws.

    Args:
        spec: a path, a name or model type, a dict or an Interface.
        model: None for tiny models of the interface's types; a module with `inputs`; a function that gives
            (module, inputs); a model type, config, directory or "module:function"; a list of these. Nothing
            is changed on it; methods are tried on copies.
        inputs: keyword arguments for a module that is given.
        methods: names of the columns to try, () for none; default: all.
    Raises: SpecError: the interface itself has problems. ConfigError: there is no such model.
    """
    interface = registry.load(spec)
    scenes = cast(interface, model, inputs)
    found = observe_claims(interface, scenes)
    if model is None:
        found = replace(found, claims=(*_unbuilt(interface, scenes), *found.claims))
    wanted = None if methods is None else tuple(methods)
    if found.problems or wanted == ():
        return found
    verdicts = prove_methods(interface, scenes[0], wanted or ())
    mark = interface.mark(())
    broken = [v.problem(mark.file if mark else "") for v in verdicts if v.state == "broken"]
    return replace(found, methods=verdicts, problems=tuple(broken))


def _unbuilt(interface: Interface, scenes: Sequence[Scene]) -> Iterator[Claim]:
    """Model types that no tiny model could be built of."""
    built = {getattr(getattr(scene.model, "config", None), "model_type", None) for scene in scenes}
    for kind in interface.model_type or ():
        if kind not in built:
            yield Claim("unseen", "model_type", f"model_type: {kind}, of which no tiny model could be built")


def look(blueprint: Blueprint, scene: Scene, book: Book) -> Iterator[Book]:
    """Look for every claim in one scene, those first that need no further forward pass."""
    observation = scene.observation
    model_claims.types(blueprint, book)
    model_claims.described(blueprint, observation, book)
    model_claims.heads(blueprint, observation, book)
    stacks = [Seen(blueprint, info, observation, book) for info in blueprint.stacks.values()]
    for seen in stacks:
        layer_claims.layers(seen)
        stack_claims.stack(seen)
    model_claims.defaults(stacks)
    yield book
    for seen in stacks:
        size_claims.numbers(seen, scene)
        yield book
        input_claims.inputs(seen, scene)
        model_claims.kernels(seen, scene)
        yield book


def observe_claims(interface: Interface, scenes: Sequence[Scene]) -> Report:
    """Look for every claim in every scene."""
    book = Book()
    problems: list[Problem] = []
    for scene in scenes:
        try:
            blueprint = resolve(scene.model, interface)
        except ResolveError as error:
            problems += error.problems
            continue
        for _ in look(blueprint, scene, book):
            pass
    claims = tuple(book)
    problems += [claim.problem() for claim in claims if claim.verdict == "refuted"]
    found = tuple(sorted(set(problems), key=Problem.sort_key))
    mark = interface.mark(())
    name = registry.name_of(interface) or (mark.file if mark else "the interface")
    return Report(name, claims, (), found, tuple(scene.name for scene in scenes))
