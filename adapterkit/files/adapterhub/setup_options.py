"""Options that say what AdapterHub's library does with adapters in a setup."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from adapterkit.composition import Block, Fuse, MultiTask, Setup, Stack, first, names
from adapterkit.errors import FileFormatError
from adapterkit.files.adapterhub.setup_refusals import FIRST_ONLY, Methods, methods_of, problem
from adapterkit.files.content import Content
from adapterkit.methods.base import MethodConfig
from adapterkit.methods.bottleneck import BottleneckConfig
from adapterkit.methods.union import UnionConfig


def idle(setup: Setup, contents: Mapping[str, Content]) -> dict[str, Content]:
    """The adapters with the option that lets a method act in the first alone, where another is the first."""
    return {
        name: content if name == first(setup) else replace(content, config=_first_only(content.config))
        for name, content in contents.items()
    }


def _first_only(config: MethodConfig) -> MethodConfig:
    if isinstance(config, UnionConfig):
        return config.replace(configs=tuple(map(_first_only, config.configs)))
    return config.replace(first_only=True) if isinstance(config, FIRST_ONLY) else config


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
            raise FileFormatError(problem(message))
        if numbers == {2}:
            found[name] = replace(found[name], config=_first(found[name].config))
    return found


def _first(config: MethodConfig) -> MethodConfig:
    if isinstance(config, UnionConfig):
        return config.replace(configs=tuple(_first(member) for member in config.configs))
    return config.replace(original_ln_first=True) if isinstance(config, BottleneckConfig) else config
