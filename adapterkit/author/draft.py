"""An interface for a model that nobody wrote one for: from one recorded forward pass of a tiny instance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from adapterkit.author import tiny
from adapterkit.author.check import observe_claims
from adapterkit.author.column import Column
from adapterkit.author.columns import between, columns
from adapterkit.author.describe import Notes, Scene, Words
from adapterkit.author.lacks import by_trial, unsupported
from adapterkit.author.likeness import shortened
from adapterkit.author.observe import observe
from adapterkit.author.scene import Scene as Trial
from adapterkit.author.yamltext import written
from adapterkit.errors import Problem, ResolveError, SpecError, listing
from adapterkit.model.resolve import resolve
from adapterkit.spec import registry
from adapterkit.spec.schema import Interface


@dataclass(frozen=True)
class Draft:
    """A drafted interface, what it leaves open, and the tiny model that it was drafted from."""

    data: Words
    notes: Notes
    model: nn.Module
    inputs: Mapping[str, Any]

    @property
    def text(self) -> str:
        """The file, with comments on what a human should look at."""
        return written(self.data, self.notes, type(self.model).__name__)

    @property
    def interface(self) -> Interface:
        return registry.load(self.data)

    @property
    def is_complete(self) -> bool:
        """Whether everything that was looked for was found."""
        return not self.notes.gaps

    @property
    def summary(self) -> str:
        """What was found, and what was not, for people."""
        lines = [f"drafted from {type(self.model).__name__}: stacks {listing(self.interface.stacks)}"]
        lines += [f"  not found: {'.'.join(loc)}: {text}" for loc, text in self.notes.gaps]
        lines += [f"  look at: {'.'.join(loc)}: {text}" for loc, text in self.notes.remarks]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        def told(notes: list[tuple[tuple[str, ...], str]]) -> list[dict[str, str]]:
            return [{"address": ".".join(loc), "message": text} for loc, text in notes]

        return {
            "interface": self.data,
            "complete": self.is_complete,
            "not_found": told(self.notes.gaps),
            "look_at": told(self.notes.remarks),
            "text": self.text,
        }

    def __str__(self) -> str:
        return self.text


def draft(source: Any, *, inputs: Mapping[str, Any] | None = None, like: bool = True, seed: int = 0) -> Draft:
    """Draft an interface from one forward pass of a tiny instance: no weights, no network.

    Args:
        source: a model, a config, a directory, a model type, or `module:function` that gives any module. Of a
            model with a config a tiny copy is made; any other module is run as it is.
        inputs: arguments of its forward by name; what is not given is found by trying.
        like: compare with the known interfaces, and write only the differences to one that is near.
    Raises: ConfigError: it cannot be built or run. ResolveError: nothing was found to describe.
    """
    return of_model(*tiny.build(source, seed=seed, given=inputs), like=like)


def of_model(model: nn.Module, inputs: Mapping[str, Any], *, like: bool = True) -> Draft:
    """Draft an interface of a model as it is, which runs on these inputs."""
    notes = Notes()
    scene = Scene(model, inputs, observe(model, inputs))
    found = columns(scene, notes)
    if not found:
        cores = listing([event.core.path or "the model" for event in scene.seen.attentions], 3)
        facts = f"a member of a list that is called and adds to what it is given; attention is in {cores}"
        message = f"no column of layers with attention was seen in {type(model).__name__}"
        hint = (
            "write the residual adds of a loop over pairs of modules into the forward of one module a layer"
        )
        raise ResolveError(Problem("nothing-to-draft", message, expected=facts, hint=hint))
    data = _head(model)
    data["stacks"] = {column.name: column.words(found) for column in found}
    for path in _elsewhere(scene, found):
        text = f"attention in {path} is in none of these layers: nothing is said of it"
        notes.remark(("stacks",), text)
    lacking = unsupported(found)
    if "model_type" not in data:
        heads = [path for column in found for path in column.heads(found)]
        data |= {"heads": list(dict.fromkeys(heads))} if heads else {}
    data |= {"unsupported": lacking} if lacking else {}
    _verify(scene, found, data, notes)
    if not notes.gaps:
        _doubt(model, inputs, data, notes)
    # a class of nobody else is told best by itself
    near = shortened(model, data) if like and "model_type" in data and not notes.gaps else None
    if near is not None:
        name, data = near
        known = registry.model_types().get(str(data.get("model_type")))
        notes.remark(
            ("like",), "it is known already" if known == name else f"nearest known interface: {name}"
        )
    return Draft(data, notes, model, inputs)


def _elsewhere(scene: Scene, found: list[Column]) -> list[str]:
    """Modules that compute attention outside the layers of all stacks."""
    layers = [layer.call for column in found for layer in column.facts.layers]
    events = scene.seen.attentions
    outside = (e for e in events if not any(c.start <= e.out < c.end for c in layers))
    return list(dict.fromkeys(event.core.path or "the model" for event in outside))


def _doubt(model: nn.Module, inputs: Mapping[str, Any], data: Words, notes: Notes) -> None:
    """What was found may still not be what the model does, as `check` sees it: that is said, too."""
    for problem in observe_claims(registry.load(data), [Trial("the draft", model, inputs)]).problems:
        words = tuple(word for word in problem.address.split(".") if not word.isdigit())
        notes.remark(words, f"`check` refutes: {problem.message}; {problem.expected}")


def _head(model: nn.Module) -> Words:
    data: Words = {"adapterkit": 1}
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type:
        data["model_type"] = model_type
    module = type(model).__module__
    if module.startswith("transformers."):
        data["source"] = module.replace(".", "/") + ".py"
    return data


def _verify(scene: Scene, found: list[Column], data: Words, notes: Notes) -> None:
    """Everything that the draft names must resolve; what does not is said. What is no head is named."""
    try:
        blueprint = resolve(scene.model, registry.load(data))
    except (SpecError, ResolveError) as error:
        for problem in error.problems:
            words = tuple(problem.address.split(".")) if problem.address else ()
            notes.gap(words, f"[{problem.code}] {problem.message} {problem.expected}".strip())
        return
    tried = by_trial(scene, found, registry.load(data))
    data |= {"unsupported": {**tried, **data.get("unsupported", {})}} if tried else {}
    no_heads = between(scene, found, [head.path for head in blueprint.heads], notes)
    data |= {"between": no_heads} if no_heads and "heads" not in data else {}
