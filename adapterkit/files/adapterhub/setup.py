"""A directory with a setup of theirs: `adapter_setup.json`, and a directory for each adapter and fusion."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapterkit.composition import (
    Average,
    Block,
    Fuse,
    MultiTask,
    Parallel,
    Setup,
    Stack,
    blocks,
    first,
    from_dict,
    names,
)
from adapterkit.errors import CompositionError, FileFormatError, Problem
from adapterkit.files.adapterhub import fusion, reader
from adapterkit.files.content import Bundle, Content
from adapterkit.files.disk import read_json
from adapterkit.methods.base import MethodConfig
from adapterkit.methods.bottleneck import BottleneckConfig
from adapterkit.methods.dora import DoRAConfig, DVoRAConfig
from adapterkit.methods.fusion import FusionConfig
from adapterkit.methods.ia3 import IA3Config
from adapterkit.methods.invertible import InvertibleConfig
from adapterkit.methods.lora import LoRAConfig
from adapterkit.methods.prefix import PrefixTuningConfig
from adapterkit.methods.prompt import PromptTuningConfig
from adapterkit.methods.reft import ReFTConfig
from adapterkit.methods.union import UnionConfig
from adapterkit.methods.vera import VeRAConfig
from adapterkit.model.blueprint import Blueprint
from adapterkit.model.branches import branches

CONFIG = "adapter_setup.json"
_LOW_RANK = (LoRAConfig, VeRAConfig)
Methods = Mapping[str, tuple[MethodConfig, ...]]
_SELECTING = ("layers", "leave_out", "encoder_prefix", "cross_prefix")
_FIRST_ONLY = (ReFTConfig, InvertibleConfig, PromptTuningConfig)
"""Of these, theirs runs that of the first adapter, for all examples, and no other."""


def read(directory: Path, blueprint: Blueprint, allow_bin: bool) -> Bundle:
    """The adapters, fusions and the setup in a directory of AdapterHub.

    Raises: FileFormatError: with everything that is unknown, missing or cannot be reproduced.
    """
    file = directory / CONFIG
    data = read_json(file)
    setup = setup_in(data, file)
    fusions = {block.name: block for block in blocks(setup) if isinstance(block, Fuse)}
    contents = {}
    for name in sorted(names(setup), key=lambda name: name in fusions):
        if name in fusions:
            theirs = fusion.name_of(fusions[name].fused, name)
            found = fusion.read(_inside(directory, theirs), blueprint, allow_bin)
        else:
            found = reader.read(_inside(directory, name), blueprint, allow_bin)
        contents[name] = replace(found, name=name)
    try:
        contents = together(setup, contents, blueprint)
    except FileFormatError as error:
        raise FileFormatError(replace(problem, file=str(file)) for problem in error.problems) from None
    if data.get("head_setup"):
        first = next(iter(contents))
        contents[first] = replace(contents[first], heads={"heads": {}})
    return Bundle(tuple(contents.values()), setup)


def setup_in(data: Mapping[str, Any], file: Path) -> Setup:
    """The setup that a file of theirs says.

    Raises: FileFormatError: it has no meaning.
    """
    try:
        return from_dict(_plain(data.get("adapter_setup")))
    except CompositionError as error:
        raise FileFormatError(replace(problem, file=str(file)) for problem in error.problems) from None


def _inside(directory: Path, name: str) -> Path:
    """The directory of an adapter; a name leads nowhere else."""
    if Path(name).name != name:
        raise FileFormatError(Problem("bad-file", f"{name!r} is no name", file=str(directory / CONFIG)))
    return directory / name


def _plain(data: Any) -> Any:
    """Their data as ours: {"type": ..., "children": [...], "kwargs": {...}}, where 'single' is a name."""
    if not isinstance(data, Mapping) or not isinstance(data.get("children"), list):
        return data
    children = [_plain(child) if isinstance(child, Mapping) else child for child in data["children"]]
    if data.get("type") == "single" and len(children) == 1:
        return children[0]
    return {**data.get("kwargs", {}), "block": data.get("type"), "children": children}


def together(setup: Setup, contents: Mapping[str, Content], blueprint: Blueprint) -> dict[str, Content]:
    """The adapters with the options that say what theirs does with them in this setup.

    Raises: FileFormatError: no option says it.
    """
    problems = [*refusals(setup, contents), *_unlike(setup, contents, blueprint)]
    reader.refuse([*problems, *_in_parts(setup, blueprint)])
    return idle(setup, repeated(setup, contents))


def refusals(setup: Setup, contents: Mapping[str, Content]) -> Iterator[Problem]:
    """What their library computes in another way than the setup says (adapters 1.3.0)."""
    methods = {name: tuple(methods_of(content.config)) for name, content in contents.items()}
    for block in blocks(setup):
        word, inside = type(block).__name__, [methods[name] for name in names(block) if name in methods]
        if isinstance(block, Average):
            yield _problem(
                f"{word} of AdapterHub divides the weighted sum by the number of adapters once more"
            )
        yield from _on_weights(block, inside)
        bottlenecks = [m for own in inside for m in own if isinstance(m, BottleneckConfig)]
        if isinstance(block, Stack) and _many(inside, (BottleneckConfig,)) > 1:
            if any(m.is_parallel for m in bottlenecks):
                yield _problem(
                    f"a {word} of AdapterHub loses a part where it has parallel adapters beside others"
                )
        if isinstance(block, Fuse) and block.fused != block.children:
            yield from _in_fusion(bottlenecks)
        yield from _around(block, bottlenecks)
        if not isinstance(block, Stack | Fuse) and len({_prefixes(c, methods) for c in block.children}) > 1:
            yield _problem(
                f"{word} of AdapterHub fills shorter prefixes up with the number of the padding token"
            )
        if isinstance(block, MultiTask) and any(isinstance(child, Fuse) for child in block.children):
            yield _problem(f"{word} of AdapterHub does not compute a Fuse")
    whole = first(setup)
    for name, own in methods.items():
        if any(isinstance(method, _FIRST_ONLY) for method in own):
            message = "AdapterHub computes ReFT, prompts and invertible adapters of"
            if whole is None:
                told = f"not those of {name!r}" if name != _leader(setup) else "and of all examples"
                yield _problem(f"{message} {_leader(setup)!r} alone, {told}")
            elif name == whole and _times(setup, name) > 1:
                yield _problem(f"{message} {name!r} once")


def _prefixes(setup: Setup, methods: Methods) -> tuple[str, ...]:
    """How long the prefixes of a part of a setup are, and where."""
    told = set(PrefixTuningConfig.model_fields) & {"prefix_length", *_SELECTING}
    found = [m for name in names(setup) for m in methods.get(name, ()) if isinstance(m, PrefixTuningConfig)]
    return tuple(sorted(str(sorted(m.model_dump(include=told).items())) for m in found))


def idle(setup: Setup, contents: Mapping[str, Content]) -> dict[str, Content]:
    """The adapters with the option that lets a method act in the first alone, where another is the first."""
    return {
        name: content if name == first(setup) else replace(content, config=_first_only(content.config))
        for name, content in contents.items()
    }


def _first_only(config: MethodConfig) -> MethodConfig:
    if isinstance(config, UnionConfig):
        return config.replace(configs=tuple(map(_first_only, config.configs)))
    return config.replace(first_only=True) if isinstance(config, _FIRST_ONLY) else config


def _around(block: Block, configs: list[BottleneckConfig]) -> Iterator[Problem]:
    """What a block of theirs does before and after its bottlenecks, once for all of them.

    Before them is what the first one reads, after them what the last one does about the residual.
    """
    if isinstance(block, Fuse) or not configs:
        return
    before = {(c.original_ln_before, c.residual_before_ln, c.is_parallel) for c in configs}
    if len({config.original_ln_after for config in configs}) > 1 or (
        not isinstance(block, Stack) and len(before) > 1
    ):
        word = type(block).__name__
        yield _problem(f"{word} of AdapterHub treats adapters with different norms and residuals alike")


def _in_fusion(configs: Iterable[BottleneckConfig]) -> Iterator[Problem]:
    """What a Fuse of theirs does before all of its adapters, and a Stack in it does once more."""
    kinds = {
        (c.original_ln_before, c.original_ln_after, c.residual_before_ln, c.is_parallel) for c in configs
    }
    if len(kinds) > 1 or any(is_parallel for *_, is_parallel in kinds):
        message = "Fuse of AdapterHub treats parallel adapters, and adapters with different norms, alike"
        yield _problem(f"{message}, where one of its children is a Stack")


def prepared(setup: Setup, methods: Methods, before: int = 0) -> Iterator[tuple[str, int]]:
    """Adapters with bottlenecks, and how often theirs adds the residual before them.

    Each block but Stack and Fuse does it for what it holds, MultiTask twice, and a Stack for each of its
    adapters; the first of a Stack takes what was done before. A Fuse does it for the Stacks in it, too; its
    last adapter says how.
    """
    if isinstance(setup, Fuse):
        for child in setup.children:
            if isinstance(child, Stack) or child == setup.children[-1]:
                yield from prepared(child, methods, before + 1)
        return
    if not isinstance(setup, Block):
        yield setup, before
        return
    own = 0 if isinstance(setup, Stack) else 2 if isinstance(setup, MultiTask) else 1
    for child in setup.children:
        if not any(isinstance(m, BottleneckConfig) for name in names(child) for m in methods.get(name, ())):
            continue
        alone = isinstance(setup, Stack) and not isinstance(child, Block)
        yield from prepared(child, methods, before + own + alone)
        before = 0 if isinstance(setup, Stack) else before


def repeated(setup: Setup, contents: Mapping[str, Content]) -> dict[str, Content]:
    """The adapters with the option that adds the residual once more, where theirs does.

    Raises: FileFormatError: it does it in another way than the option.
    """
    methods = {name: tuple(methods_of(content.config)) for name, content in contents.items()}
    counts: dict[str, set[int]] = {}
    for name, count in prepared(setup, methods) if isinstance(setup, Block) else ():
        counts.setdefault(name, set()).add(count)
    found = dict(contents)
    bottlenecks = [m for name in counts for m in methods[name] if isinstance(m, BottleneckConfig)]
    reads = any(config.original_ln_before and not config.is_parallel for config in bottlenecks)
    if not reads or all(numbers == {1} for numbers in counts.values()):
        return found
    where = {(config.locations, config.layers, config.leave_out) for config in bottlenecks}
    for name, numbers in counts.items():
        if numbers - {1, 2} or len(numbers) > 1 or len(where) > 1:
            message = (
                f"AdapterHub adds the residual more than once before {name!r}, in a way that is not supported"
            )
            raise FileFormatError(_problem(message))
        if numbers == {2}:
            found[name] = replace(found[name], config=_first(found[name].config))
    return found


def _first(config: MethodConfig) -> MethodConfig:
    if isinstance(config, UnionConfig):
        return config.replace(configs=tuple(_first(member) for member in config.configs))
    return config.replace(original_ln_first=True) if isinstance(config, BottleneckConfig) else config


def _leader(setup: Setup) -> str:
    """The first adapter of all, wherever it acts."""
    while isinstance(setup, Block):
        setup = setup.children[0]
    return setup


def _times(setup: Setup, name: str) -> int:
    """How often an adapter stands in a setup."""
    if isinstance(setup, Block):
        return sum(_times(child, name) for child in setup.children)
    return int(setup == name)


def _in_parts(setup: Setup, blueprint: Blueprint) -> Iterator[Problem]:
    """What theirs computes otherwise in a model that is made of others."""
    repeats = any(isinstance(block, Parallel) for block in blocks(setup))
    if repeats and any("/" in stack for stack in blueprint.stacks):
        yield _problem(
            "Parallel of AdapterHub repeats the batch in each of the models that this one is made of"
        )


def _unlike(setup: Setup, contents: Mapping[str, Content], blueprint: Blueprint) -> Iterator[Problem]:
    """Adapters without a bottleneck, side by side with others: theirs prepares the states for these, too."""
    known = frozenset(branches(blueprint))

    def places(part: Setup) -> frozenset[str]:
        own = [contents[name] for name in names(part)]
        told = [content.addresses or () for content in own if not isinstance(content.config, FusionConfig)]
        return frozenset(address.rpartition(":")[2] for found in told for address in found) & known

    for block in blocks(setup):
        inside = [method for name in names(block) for method in methods_of(contents[name].config)]
        if not any(
            isinstance(m, BottleneckConfig) and (m.original_ln_before or m.is_parallel) for m in inside
        ):
            continue
        if not isinstance(block, Stack | Fuse) and len(set(map(places, block.children))) > 1:
            word = type(block).__name__
            yield _problem(f"{word} of AdapterHub has no way of its own for adapters that lack a layer")


def _on_weights(block: Block, inside: list[tuple[MethodConfig, ...]]) -> Iterator[Problem]:
    """What a block of theirs does with several methods at one map: the last says how all of them act."""
    word, added = type(block).__name__, _many(inside, _LOW_RANK)
    if added + _many(inside, (IA3Config,)) < 2:
        return
    if isinstance(block, Stack) and added:
        yield _problem(f"a {word} of AdapterHub gives the result of one LoRA to the next, and drops it")
    elif _many(inside, (DoRAConfig, DVoRAConfig)):
        yield _problem(f"{word} of AdapterHub takes the magnitude of its last DoRA for all of its adapters")
    elif added and _many(inside, (IA3Config,)):
        yield _problem(f"{word} of AdapterHub adds (IA)³, or multiplies with LoRA, as its last adapter does")


def _many(inside: list[tuple[MethodConfig, ...]], kinds: tuple[type[MethodConfig], ...]) -> int:
    return sum(any(isinstance(method, kinds) for method in own) for own in inside)


def methods_of(config: MethodConfig) -> Iterator[MethodConfig]:
    if isinstance(config, UnionConfig):
        for member in config.configs:
            yield from methods_of(member)
    else:
        yield config


def _problem(message: str) -> Problem:
    return Problem("not-reproducible", message)
