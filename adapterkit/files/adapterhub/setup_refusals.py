"""What AdapterHub's library computes in another way than a setup says (adapters 1.3.0)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

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
    names,
)
from adapterkit.errors import Problem
from adapterkit.files.adapterhub.places import MATRICES, hub_of
from adapterkit.files.content import Content
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

Methods = Mapping[str, tuple[MethodConfig, ...]]
FIRST_ONLY = (ReFTConfig, InvertibleConfig, PromptTuningConfig)
"""Of these, theirs runs that of the first adapter, for all examples, and no other."""
_LOW_RANK = (LoRAConfig, VeRAConfig)
_SELECTING = ("layers", "leave_out", "encoder_prefix", "cross_prefix")


def refusals(setup: Setup, contents: Mapping[str, Content]) -> Iterator[Problem]:
    """What their library computes in another way than the setup says (adapters 1.3.0)."""
    methods = {name: tuple(methods_of(content.config)) for name, content in contents.items()}
    for block in blocks(setup):
        word, inside = type(block).__name__, [methods[name] for name in names(block) if name in methods]
        if isinstance(block, Average):
            yield problem(
                f"{word} of AdapterHub divides the weighted sum by the number of adapters once more"
            )
        yield from _on_weights(block, inside)
        bottlenecks = [m for own in inside for m in own if isinstance(m, BottleneckConfig)]
        if isinstance(block, Stack) and _many(inside, (BottleneckConfig,)) > 1:
            if any(m.is_parallel for m in bottlenecks):
                yield problem(
                    f"a {word} of AdapterHub loses a part where it has parallel adapters beside others"
                )
        if isinstance(block, Fuse) and block.fused != block.children:
            yield from _in_fusion(bottlenecks)
        yield from _around(block, bottlenecks)
        if not isinstance(block, Stack | Fuse) and len({_prefixes(c, methods) for c in block.children}) > 1:
            yield problem(
                f"{word} of AdapterHub fills shorter prefixes up with the number of the padding token"
            )
        if isinstance(block, MultiTask) and any(isinstance(child, Fuse) for child in block.children):
            yield problem(f"{word} of AdapterHub does not compute a Fuse")
    whole = first(setup)
    for name, own in methods.items():
        if any(isinstance(method, FIRST_ONLY) for method in own):
            message = "AdapterHub computes ReFT, prompts and invertible adapters of"
            if whole is None:
                told = f"not those of {name!r}" if name != _leader(setup) else "and of all examples"
                yield problem(f"{message} {_leader(setup)!r} alone, {told}")
            elif name == whole and _times(setup, name) > 1:
                yield problem(f"{message} {name!r} once")


def _prefixes(setup: Setup, methods: Methods) -> tuple[str, ...]:
    """How long the prefixes of a part of a setup are, and where."""
    told = set(PrefixTuningConfig.model_fields) & {"prefix_length", *_SELECTING}
    found = [m for name in names(setup) for m in methods.get(name, ()) if isinstance(m, PrefixTuningConfig)]
    return tuple(sorted(str(sorted(m.model_dump(include=told).items())) for m in found))


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
        yield problem(f"{word} of AdapterHub treats adapters with different norms and residuals alike")


def _in_fusion(configs: Iterable[BottleneckConfig]) -> Iterator[Problem]:
    """What a Fuse of theirs does before all of its adapters, and a Stack in it does once more."""
    kinds = {
        (c.original_ln_before, c.original_ln_after, c.residual_before_ln, c.is_parallel) for c in configs
    }
    if len(kinds) > 1 or any(is_parallel for *_, is_parallel in kinds):
        message = "Fuse of AdapterHub treats parallel adapters, and adapters with different norms, alike"
        yield problem(f"{message}, where one of its children is a Stack")


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


def repeating(setup: Setup, contents: Mapping[str, Content], blueprint: Blueprint) -> Iterator[Problem]:
    """What a Parallel of theirs computes otherwise in this model."""
    for block in blocks(setup):
        if not isinstance(block, Parallel):
            continue
        if any("/" in stack for stack in blueprint.stacks):
            yield problem(
                "Parallel of AdapterHub repeats the batch in each of the models that this one is made of"
            )
        told = (address for name in names(block) for address in contents[name].addresses or ())
        if (address := mixed(told, blueprint)) is not None:
            message = "Parallel of AdapterHub mixes the examples, on this model, of adapters that change"
            yield problem(f"{message} {address}")


def mixed(addresses: Iterable[str], blueprint: Blueprint) -> str | None:
    """A place of adapters whose examples a Parallel of theirs mixes on this model, None if there is none."""
    if hub_of(blueprint).parallel != "branches":
        return None
    return next((address for address in addresses if address.rpartition(".")[2] in MATRICES), None)


def unlike(setup: Setup, contents: Mapping[str, Content], blueprint: Blueprint) -> Iterator[Problem]:
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
            yield problem(f"{word} of AdapterHub has no way of its own for adapters that lack a layer")


def _on_weights(block: Block, inside: list[tuple[MethodConfig, ...]]) -> Iterator[Problem]:
    """What a block of theirs does with several methods at one map: the last says how all of them act."""
    word, added = type(block).__name__, _many(inside, _LOW_RANK)
    if added + _many(inside, (IA3Config,)) < 2:
        return
    if isinstance(block, Stack) and added:
        yield problem(f"a {word} of AdapterHub gives the result of one LoRA to the next, and drops it")
    elif _many(inside, (DoRAConfig, DVoRAConfig)):
        yield problem(f"{word} of AdapterHub takes the magnitude of its last DoRA for all of its adapters")
    elif added and _many(inside, (IA3Config,)):
        yield problem(f"{word} of AdapterHub adds (IA)³, or multiplies with LoRA, as its last adapter does")


def _many(inside: list[tuple[MethodConfig, ...]], kinds: tuple[type[MethodConfig], ...]) -> int:
    return sum(any(isinstance(method, kinds) for method in own) for own in inside)


def methods_of(config: MethodConfig) -> Iterator[MethodConfig]:
    if isinstance(config, UnionConfig):
        for member in config.configs:
            yield from methods_of(member)
    else:
        yield config


def problem(message: str) -> Problem:
    return Problem("not-reproducible", message)
