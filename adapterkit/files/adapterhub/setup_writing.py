"""Writing a directory with a setup for AdapterHub's `adapters`, which reads it by `load_adapter_setup`.

What is written would be read with the options that say what their library does with adapters in a setup; it
is refused where these are not the options that the adapters have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from adapterkit.adapter import Adapter
from adapterkit.composition import (
    Average,
    BatchSplit,
    Block,
    Fuse,
    MultiTask,
    Parallel,
    Setup,
    Split,
    Stack,
    blocks,
    first,
    names,
)
from adapterkit.errors import Problem, listing
from adapterkit.files.adapterhub import fusion, reader, writing
from adapterkit.files.adapterhub.places import MATRICES, hub_of
from adapterkit.files.adapterhub.setup import CONFIG, setup_in, together
from adapterkit.files.adapterhub.setup_refusals import methods_of, mixed
from adapterkit.files.adapterhub.spelling import unsaid
from adapterkit.files.content import Bundle, Content
from adapterkit.files.disk import read_json, replaced, to_json
from adapterkit.methods.base import MethodConfig
from adapterkit.methods.bottleneck import BottleneckConfig
from adapterkit.methods.fusion import FusionConfig
from adapterkit.methods.ia3 import IA3Config
from adapterkit.methods.lora import LoRAConfig
from adapterkit.methods.prefix import PrefixTuningConfig
from adapterkit.methods.union import UnionConfig
from adapterkit.methods.vera import VeRAConfig
from adapterkit.model.blueprint import Blueprint

_NESTED: dict[type[Block], tuple[type[Block], ...]] = {
    Stack: (Fuse, Split, Parallel, BatchSplit, Average, MultiTask),
    Fuse: (Stack,),
    Split: (Split, Stack, BatchSplit, Average),
    Parallel: (Stack, BatchSplit, Average),
    MultiTask: (Stack, Average, Fuse),
    BatchSplit: (Stack, Split, BatchSplit, Average),
    Average: (Stack, Split, BatchSplit),
}
"""Block of theirs -> blocks that it may hold (adapters 1.3.0, composition.py, ALLOWED_NESTINGS)."""
_ACTING: dict[str, tuple[type[MethodConfig], ...]] = {
    "bottlenecks": (BottleneckConfig,),
    "changes of weights": (LoRAConfig, IA3Config, VeRAConfig),
    "prefixes": (PrefixTuningConfig,),
}
"""What theirs composes module by module."""
_FILES = {reader.CONFIG, fusion.CONFIG, *reader.WEIGHTS, *fusion.WEIGHTS}


def write(
    directory: Path,
    bundle: Bundle,
    adapters: Mapping[str, Adapter],
    shares: Sequence[Sequence[str]],
    blueprint: Blueprint,
    head: bool | str,
) -> Path:
    """Write a setup with everything that it names. What stood there as a setup is replaced as a whole.

    Args: bundle: the setup and what it skips. shares: groups of adapters with tensors in common.
    Raises: FileFormatError: their format, or their library on this model, cannot have it; nothing is written.
    """
    assert bundle.setup is not None
    setup = bundle.setup if isinstance(bundle.setup, Block) else Stack(bundle.setup)
    reader.refuse([*_unsaid(bundle, shares), *_not_run(setup, adapters, blueprint)])
    contents = {}
    with replaced(directory, CONFIG, _named, _FILES) as work:
        for name in names(setup):
            adapter = adapters[name]
            if isinstance(adapter.config, FusionConfig):
                theirs = fusion.name_of(adapter.config.children, name)
                fusion.write(work / theirs, adapter, adapters, blueprint)
                read: MethodConfig = adapter.config
            else:
                alone = _alone(adapter.config)
                read = writing.write(work / name, adapter, blueprint, head, alone)
            contents[name] = Content(name, read, {})
        for name, content in together(setup, contents, blueprint).items():
            _compare(name, adapters[name].config, content.config, name == first(setup))
        data = {"adapter_setup": _spelled(setup), "head_setup": None, "version": writing.VERSION}
        (work / CONFIG).write_text(to_json(data), encoding="utf-8")
    return directory


def _named(file: Path) -> list[str]:
    """The directories beside the file of a setup of theirs."""
    setup = setup_in(read_json(file), file)
    return [*names(setup), *(fusion.name_of(b.fused, b.name) for b in blocks(setup) if isinstance(b, Fuse))]


def _spelled(setup: Setup) -> dict[str, Any]:
    """A setup in their words; a name that a Fuse has is left out by theirs, but understood."""
    if not isinstance(setup, Block):
        return {"type": "single", "children": [setup]}
    options = {key: list(v) if isinstance(v, tuple) else v for key, v in setup.options().items()}
    children = [_spelled(child) for child in setup.children]
    return {"type": type(setup).__name__, "children": children} | ({"kwargs": options} if options else {})


def _alone(config: MethodConfig) -> MethodConfig:
    """The config without what an adapter does in a setup only."""
    if isinstance(config, UnionConfig):
        return config.replace(configs=tuple(map(_alone, config.configs)))
    return config.replace(original_ln_first=False) if isinstance(config, BottleneckConfig) else config


def _compare(name: str, ours: MethodConfig, read: MethodConfig, is_first: bool) -> None:
    """Refuse an adapter with which theirs would do something else in the setup than ours does."""
    for option in ("original_ln_first", *(() if is_first else ("first_only",))):
        mine, other = ([getattr(m, option, None) for m in methods_of(config)] for config in (ours, read))
        for had, got in zip(mine, other, strict=True):
            if had != got:
                message = f"{option}={had} of {name!r} in this setup; it would be read as {got}"
                raise unsaid(message, name)


def _unsaid(bundle: Bundle, shares: Sequence[Sequence[str]]) -> Iterator[Problem]:
    if bundle.skip_layers:
        yield _problem("layers that a setup skips")
    for group in shares:
        inside = [name for name in group if name in names(bundle.setup)]
        if len(inside) > 1:
            hint = "kit.unshare(...) first, which leaves the numbers as they are"
            yield _problem(f"tensors that {listing(map(repr, inside))} have in common", hint)


def _not_run(setup: Setup, adapters: Mapping[str, Adapter], blueprint: Blueprint) -> Iterator[Problem]:
    """What their library accepts or computes for no setup (adapters 1.3.0)."""
    yield from _nesting(setup, 0)
    alone = isinstance(setup, Stack) and setup.is_flat and len(setup.children) == 1
    for name in () if alone else names(setup):
        slots = adapters[name].plan.slots
        if any(slot.rows is not None and slot.role in MATRICES for slot in slots):
            yield _problem(f"a setup with {name!r}: at q, k and v in one map it acts alone only")
    for block in blocks(setup):
        word = type(block).__name__
        if isinstance(block, Parallel) and not hub_of(blueprint).parallel:
            yield _problem(f"{word} on this model, for which its library has none")
        told = (slot.address for name in names(block) for slot in adapters[name].plan.slots)
        if isinstance(block, Parallel) and (address := mixed(told, blueprint)) is not None:
            yield _problem(f"{word} at {address} on this model, where its library mixes the examples")
        for kind in _ACTING:
            places = [_places(child, kind, adapters) for child in block.children]
            if isinstance(block, Split | Fuse) and kind != "bottlenecks" and any(places):
                yield _problem(f"{word} of {kind}")
            elif isinstance(block, Fuse) and block.fused == block.children:
                continue  # it fuses those that act at a place
            elif not isinstance(block, Stack) and any(own != places[0] for own in places):
                yield _problem(f"{word} of {kind} at different places")


def _nesting(setup: Setup, depth: int) -> Iterator[Problem]:
    if not isinstance(setup, Block):
        return
    for child in setup.children:
        if not isinstance(child, Block):
            continue
        inner, outer = type(child).__name__, type(setup).__name__
        if type(child) not in _NESTED.get(type(setup), ()) or depth > (0 if isinstance(setup, Stack) else 1):
            yield _problem(f"{inner} in {outer}{' in another block' if depth else ''}")
        yield from _nesting(child, depth + 1)
    if type(setup) not in _NESTED:
        yield _problem(type(setup).__name__)


def _places(setup: Setup, kind: str, adapters: Mapping[str, Adapter]) -> set[str]:
    """Addresses of the slots at which a part of a setup has adapters of a kind."""
    if isinstance(setup, Block):
        return {place for child in setup.children for place in _places(child, kind, adapters)}
    config, slots = adapters[setup].config, adapters[setup].plan.slots
    members = config.members(slots) if isinstance(config, UnionConfig) else [(config, slots)]
    return {slot.address for method, own in members if isinstance(method, _ACTING[kind]) for slot in own}


def _problem(what: str, expected: str = "") -> Problem:
    return Problem("not-in-format", f"AdapterHub's format cannot hold {what}", expected=expected)
