"""The laws of every method on one model: what an author proves before anyone trains with an interface."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit import api
from adapterkit.author.attention import Attention
from adapterkit.author.scene import Scene
from adapterkit.composition import Parallel, Setup
from adapterkit.errors import AdapterkitError, Problem
from adapterkit.kit import Kit
from adapterkit.liveness import outputs
from adapterkit.methods.targets import reached
from adapterkit.model.blueprint import Blueprint
from adapterkit.model.branches import branches
from adapterkit.model.cores import apart
from adapterkit.model.resolve import resolve
from adapterkit.spec import registry
from adapterkit.spec.schema import Interface
from adapterkit.spec.vocabulary import SUBLAYERS

CHILDREN = ("first", "second")
CLOSE = 1e-4
"""Merged and unmerged weights round differently."""
ROUNDING = 1e-5
STEP = 0.1


@dataclass(frozen=True)
class Column:
    """A method to be tried, with options that fit a tiny model."""

    config: Mapping[str, Any]
    starts_as_base: bool = False
    """Its first output is the base model's, bit for bit."""
    by_branch: bool = False
    """It takes `locations`."""
    merges: bool = False
    joined: str = ""
    """Two of them under one setup: Fuse or Parallel."""
    hint: str = ""
    """What the interface may lack where the model cannot run with it."""


# smooth activations, so that no unit is dead by chance
_SMOOTH = {"reduction_factor": 4, "non_linearity": "gelu"}
_REFT = {"method": "loreft", "r": 2, "prefix_positions": 2, "suffix_positions": 2, "tied_weights": True}
_ROOM = "an entry that takes ids alone needs 'filler' if more depends on their number than a mask (B, T)"
COLUMNS: dict[str, Column] = {
    "lora": Column({"method": "lora", "targets": "all", "r": 2, "alpha": 4}, True, merges=True),
    "ia3": Column({"method": "ia3"}, True, merges=True),
    "dora": Column({"method": "dora", "targets": "all", "r": 2, "alpha": 4}, True, merges=True),
    "bottleneck": Column({"method": "double_seq_bn", **_SMOOTH}, by_branch=True),
    "compacter": Column({"method": "compacter", **_SMOOTH, "phm_dim": 2}, by_branch=True),
    "prefix_tuning": Column({"method": "prefix_tuning", "prefix_length": 3, "bottleneck_size": 6}),
    "prompt_tuning": Column({"method": "prompt_tuning", "prompt_length": 3}, hint=_ROOM),
    "reft": Column(_REFT),
    "invertible": Column({"method": "invertible", "non_linearity": "gelu"}),
    "fusion": Column({"method": "seq_bn", **_SMOOTH}, by_branch=True, joined="Fuse"),
    "parallel": Column({"method": "lora", "targets": "all", "r": 2, "alpha": 4}, joined="Parallel"),
}

LAWS = {
    "attach": "attaches",
    "start": "starts as the base model, bit for bit",
    "effect": "moves the output after a random step",
    "off": "disabled, the base model is there bit for bit",
    "alive": "every tensor of it moves the output, and no tensor of the base is trained",
    "apart": "gives for each adapter what that one gives alone",
    "file": "saved and loaded again, it gives the same output",
    "merge": "folded into the weights, it gives the same output",
    "detach": "detached, outputs, weights, classes and requires_grad are as before",
}


class Broken(Exception):  # noqa: N818 - a verdict, of which a report is made
    """A law does not hold; the message says how."""

    def __init__(self, law: str, fact: str) -> None:
        super().__init__(f"{LAWS[law]}: {fact}")
        self.law, self.fact = law, fact


class _Refused(Exception):  # noqa: N818 - a verdict as well
    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


@dataclass(frozen=True)
class Verdict:
    """What came out for one method."""

    method: str
    state: str
    """proved, refused (with the reason that attach gives) or broken."""
    laws: tuple[str, ...]
    """Those that were shown to hold."""
    reason: str = ""
    code: str = ""
    hint: str = ""
    """What the interface may lack."""

    def problem(self, file: str = "") -> Problem:
        """A broken law as a problem of the interface's file."""
        return Problem("law-broken", self.reason, self.method, hint=self.hint, file=file)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.method}: {self.state}" + (
            f" ({len(self.laws)} laws)" if not self.reason else f": {self.reason}"
        )


def prove_methods(interface: Interface, scene: Scene, methods: tuple[str, ...] = ()) -> tuple[Verdict, ...]:
    """Every method, or those that are named, on copies of the model of a scene."""
    blueprint = resolve(scene.model, interface)
    return tuple(prove_method(name, interface, scene, blueprint) for name in methods or COLUMNS)


def prove_method(name: str, interface: Interface, scene: Scene, blueprint: Blueprint) -> Verdict:
    """The laws of one method on a copy of the model."""
    column = COLUMNS[name]
    shown: list[str] = []
    model = copy.deepcopy(scene.model).eval()
    try:
        for law in _laws(column, interface, scene, model, blueprint):
            shown.append(law)
    except Broken as broken:
        return Verdict(name, "broken", tuple(shown), str(broken))
    except _Refused as refused:
        problem = refused.problem
        return Verdict(name, "refused", (), f"[{problem.code}] {problem.message}", problem.code)
    except Exception as error:  # whatever a model raises when a method gets in its way
        own = {"start": column.starts_as_base, "apart": column.joined == "Parallel", "merge": column.merges}
        law = next(law for law in LAWS if law not in shown and own.get(law, True))
        reason = f"{LAWS[law]}: {type(error).__name__}: {str(error)[:300]}"
        return Verdict(name, "broken", tuple(shown), reason, hint=column.hint)
    return Verdict(name, "proved", tuple(shown))


def _laws(
    column: Column, interface: Interface, scene: Scene, model: nn.Module, blueprint: Blueprint
) -> Iterator[str]:
    before, frozen, state = _run(model, scene), _run_frozen(model, scene), _state(model)
    try:
        kit = _attached(column, interface, model, blueprint)
    except AdapterkitError as error:
        raise _Refused(error.problems[0]) from error
    yield "attach"
    if column.starts_as_base:
        _same("start", frozen, _run(model, scene))
        yield "start"
    name, setup = "proof", kit.active
    randomise(kit)
    after = _run(model, scene)
    if not any(_moved(a, b) for a, b in zip(frozen, after, strict=True)):
        raise Broken("effect", "it is the base model's")
    yield "effect"
    with kit.disabled():
        _same("off", frozen, _run(model, scene))
    _same("off", after, _run(model, scene))
    yield "off"
    _alive(kit, scene)
    yield "alive"
    if column.joined == "Parallel" and not _draws(kit, scene):
        _apart(kit, scene)
        yield "apart"
    _file(kit, setup, interface, scene, model, after)
    yield "file"
    kit = api.of(model)
    if column.merges:
        _merge(kit, name, scene, after)
        yield "merge"
    kit.detach()
    _same("detach", before, _run(model, scene))
    if _state(model) != state:
        raise Broken("detach", "something is left on the model")
    yield "detach"


def _attached(column: Column, interface: Interface, model: nn.Module, blueprint: Blueprint) -> Kit:
    config = dict(column.config)
    if column.by_branch:
        found = branches(blueprint).values()
        words = {one.sublayer for one in found if blueprint.stacks[one.stack].by_default}
        config["locations"] = [word for word in SUBLAYERS if word in words]
    if not column.joined:
        return api.attach(model, config, name="proof", interface=interface, seed=0)
    if column.joined == "Parallel":
        # what is called with something that has no row for each example cannot be asked for several
        usual = [slot for slot in blueprint if blueprint.stacks[slot.stack].by_default]
        rowless = {slot.role for slot in usual if slot.batch != "first" and not apart(blueprint, slot)}
        roles = blueprint.roles(reached(blueprint, None))
        config["targets"] = [role for role in roles if role not in {"fused", *rowless}]
    whole = column.joined != "Parallel"  # some layers lack a role that others have
    for child in CHILDREN:
        kit = api.attach(model, config, name=child, interface=interface, seed=0, strict=whole)
    if column.joined == "Fuse":
        return kit.fuse(*CHILDREN, name="proof")
    kit.activate(Parallel(*CHILDREN))
    return kit


def _run(model: nn.Module, scene: Scene) -> list[Tensor]:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # some models draw numbers in every forward pass
        return [out.clone() for out in outputs(model(**copy.deepcopy(dict(scene.inputs))))]


def _run_frozen(model: nn.Module, scene: Scene) -> list[Tensor]:
    """As the model runs while an adapter is on it: torch takes other kernels where no weight is trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        return _run(model, scene)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _state(model: nn.Module) -> Any:
    """What detaching must give back, apart from outputs."""
    kinds = [(path, type(module)) for path, module in model.named_modules()]
    trained = [(name, p.requires_grad) for name, p in model.named_parameters()]
    sums = {name: tensor.double().sum().item() for name, tensor in model.state_dict().items()}
    own = [sorted(module.__dict__) for module in model.modules()]
    return kinds, trained, sums, own


def _same(law: str, before: list[Tensor], after: list[Tensor]) -> None:
    if len(before) != len(after):
        raise Broken(law, f"{len(after)} outputs in place of {len(before)}")
    for a, b in zip(before, after, strict=True):
        if a.shape != b.shape:
            raise Broken(law, f"shape {tuple(b.shape)} in place of {tuple(a.shape)}")
        # a kernel may round by where in memory a tensor lies; what a file gives lies elsewhere
        near = law in ("file", "merge") and torch.allclose(a, b, rtol=0, atol=float(a.abs().max()) * ROUNDING)
        if not torch.equal(a, b) and not near:
            raise Broken(law, f"outputs differ by {float((a - b).abs().max()):.2g}")


def _near(a: Tensor, b: Tensor) -> bool:
    """Equal up to rounding, which grows with the largest numbers that are added up."""
    largest = max(1.0, float(a.abs().max())) if a.numel() else 1.0
    return torch.allclose(a, b, rtol=CLOSE, atol=CLOSE * largest)


def _moved(before: Tensor, after: Tensor) -> bool:
    if before.shape != after.shape:
        return True
    return bool((before - after).abs().max() > 1e-4 * before.abs().max())


@torch.no_grad()
def randomise(kit: Kit) -> None:
    """Move every trained tensor of every adapter away from its start."""
    generator = torch.Generator().manual_seed(7)
    for name in kit:
        for key, tensor in kit[name].named_parameters():
            if not key.startswith("head."):
                tensor.add_((STEP * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype))


def _fields(model: nn.Module, scene: Scene, seed: int = 0) -> dict[str, list[Tensor]]:
    """What a model gives, by the name of the field; under '' if it gives no map."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        out = model(**copy.deepcopy(dict(scene.inputs)))
    named = out.items() if isinstance(out, Mapping) else (("", out),)
    return {name: list(outputs(value)) for name, value in named}


def _alike(both: dict[str, list[Tensor]], *alone: dict[str, list[Tensor]]) -> Iterator[tuple[Tensor, ...]]:
    """Tensors that belong together; a list with one for each image is as long as the batch, and left out."""
    for name, found in both.items():
        if all(len(one.get(name, ())) == len(found) for one in alone):
            yield from zip(found, *(one[name] for one in alone), strict=True)


def _draws(kit: Kit, scene: Scene) -> bool:
    """Whether the model draws numbers in every forward pass, other ones for another batch."""
    once, again = (_fields(kit.model, scene, seed) for seed in (0, 1))
    return any(not torch.equal(a, b) for name in once for a, b in zip(once[name], again[name], strict=True))


def _apart(kit: Kit, scene: Scene) -> None:
    """All examples for the first, then all for the second; what compares examples is left out."""
    alone = []
    for child in CHILDREN:
        with kit.using(child):
            alone.append(_fields(kit.model, scene))
    compared = 0
    for both, *each in _alike(_fields(kit.model, scene), *alone):
        wanted = torch.cat(each) if each[0].ndim else both
        if wanted.shape == both.shape and each[0].ndim:
            compared += 1
            if not _near(wanted, both):
                raise Broken("apart", f"outputs differ by {float((wanted - both).abs().max()):.2g}")
    if not compared:
        raise Broken("apart", "no output holds the examples of both")


def _idle(scene: Scene, blueprint: Blueprint) -> Iterator[str]:
    """Queries and keys of attention to one single key, whatever they are: its weight is 1."""
    events = scene.observation.attentions
    for address, slot in blueprint.slots.items():
        if slot.role in ("q", "k"):
            own = [e for e in events if any(slot.path == one.path for one in (*e.q, *e.k))]
            if own and all(_keys(scene, event) == 1 for event in own):
                yield address


def _keys(scene: Scene, event: Attention) -> int | None:
    """Number of keys that each query attends to, None if it is not known."""
    if event.scores is not None:
        return event.scores[2]
    return scene.observation.graph.nodes[event.key].shape[-2] if event.kind == "function" else None


def _alive(kit: Kit, scene: Scene) -> None:
    own = {id(tensor) for adapter in kit.values() for tensor in adapter.parameters()}
    extra = [n for n, p in kit.model.named_parameters() if p.requires_grad and id(p) not in own]
    if extra:
        raise Broken("alive", f"{extra[0]} of the base is trained")
    found = kit.verify(**scene.inputs)
    quiet = tuple(_quiet(kit, scene))
    dead = [n for n in found.dead if not any(f"{place}." in n for place in quiet)]
    dead = [n for n in dead if not n.rpartition(":")[2].startswith("head.")]
    idle = tuple(f"{address}." for address in _idle(scene, kit.blueprint))
    dead = [n for n in dead if not n.rpartition(":")[2].startswith(idle)]
    if dead:
        raise Broken(
            "alive", f"{dead[0]} does not" + (f", nor do {len(dead) - 1} others" if dead[1:] else "")
        )


def _quiet(kit: Kit, scene: Scene) -> Iterator[str]:
    """What the inputs do not reach, and what the model's output is not made of."""
    graph = scene.observation.graph
    used = graph.closure([value for _, value in graph.results])
    for address, place in {**kit.blueprint.slots, **kit.blueprint.places}.items():
        calls = graph.calls_of(place.path)
        if not calls:
            yield address.rpartition(".")[0]
            if place.sublayer is not None:
                yield f"locations.{place.stack}_{place.sublayer}".replace("/", "_")  # of prefixes
        elif not any(used & set(call.outputs) for call in calls):
            yield address


def _file(
    kit: Kit, setup: Setup | None, interface: Interface, scene: Scene, model: nn.Module, after: list[Tensor]
) -> None:
    """Save, detach, load into what is left. The interface comes with the file, unless it is shipped."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "proof"
        kit.save(target, None if not isinstance(setup, str) else setup, **_whole(setup))
        kit.detach()
        known = registry.name_of(interface)
        api.load(model, target, interface=interface if known and not registry.is_shipped(known) else None)
    _same("file", after, _run(model, scene))


def _whole(setup: Setup | None) -> dict[str, Any]:
    return {} if isinstance(setup, str) else {"setup": setup}


def _merge(kit: Kit, name: str, scene: Scene, after: list[Tensor]) -> None:
    weights = {path: p.detach().clone() for path, p in kit.model.named_parameters()}
    try:
        kit.merge(name)
    except AdapterkitError as error:
        raise Broken("merge", error.problems[0].message) from error
    merged = _run(kit.model, scene)
    kit.unmerge()
    for path, parameter in kit.model.named_parameters():
        if not torch.equal(parameter, weights[path]):
            raise Broken("merge", f"{path} is another one when it is unfolded")
    for a, b in zip(after, merged, strict=True):
        if not _near(a, b):
            raise Broken("merge", f"outputs differ by {float((a - b).abs().max()):.2g}")
    _same("merge", after, _run(kit.model, scene))
