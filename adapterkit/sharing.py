"""Tensors that several adapters have in common: one parameter, registered at the units of all of them.

It is the same object everywhere, so that optimisers, `to`, `deepcopy` and pickle see one tensor. Checkpoints
may hold it under the key of any of the adapters; see inject/state.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from adapterkit.adapter import Adapter
from adapterkit.errors import ConfigError, PlanError, Problem
from adapterkit.files import manifest
from adapterkit.files.content import Content
from adapterkit.inject.site import site_of
from adapterkit.inject.state import slug
from adapterkit.methods.base import Unit
from adapterkit.methods.fusion import FusionConfig
from adapterkit.model.blueprint import Blueprint

Places = dict[str, tuple[nn.Module, str]]
"""Address and name of a tensor -> the module that holds it, and its name there."""


class Groups:
    """Which adapters share tensors: groups of names that have no member in common."""

    def __init__(self) -> None:
        self.names: tuple[tuple[str, ...], ...] = ()

    def of(self, name: str) -> tuple[str, ...]:
        """The group of an adapter, itself alone if it shares nothing."""
        return next((group for group in self.names if name in group), (name,))

    def join(self, names: Sequence[str]) -> tuple[str, ...]:
        """One group of these adapters and of all they share with already; the first one's tensors stay."""
        joined = tuple(dict.fromkeys(member for name in names for member in (name, *self.of(name))))
        self.names = (*(group for group in self.names if not set(group) & set(joined)), joined)
        return joined

    def leave(self, name: str) -> None:
        """Take an adapter out of its group; a group of one is none."""
        left = (tuple(member for member in group if member != name) for group in self.names)
        self.names = tuple(group for group in left if len(group) > 1)

    def refuse_shared(self, name: str, verb: str) -> None:
        """Refuse what would change the tensors of other adapters too.

        Raises: PlanError.
        """
        others = [other for other in self.of(name) if other != name]
        if others:
            message = f"{name!r} shares tensors with {', '.join(map(repr, others))}"
            raise PlanError(Problem("shares-tensors", message, verb, f"kit.unshare({name!r}) first"))


def share(
    groups: Groups, names: Sequence[str], adapters: Mapping[str, Adapter], blueprint: Blueprint
) -> None:
    """Let adapters have tensors in common, those of the first.

    Raises: ConfigError, NotAttachedError, PlanError: nothing is changed then.
    """
    if len(names) < 2 or len(set(names)) < len(names):
        given = ", ".join(map(repr, names)) or "none"
        message = f"two or more different adapters share tensors, not {given}"
        raise ConfigError(Problem("bad-option", message, "names"))
    chosen = [adapters[name] for name in names]
    check(chosen)
    tie([adapters[name] for name in groups.join(names)])
    record(groups, adapters, blueprint)


def unshare(
    groups: Groups, names: Sequence[str], adapters: Mapping[str, Adapter], blueprint: Blueprint
) -> None:
    """Give adapters (default: all that share) tensors of their own, with the numbers they have.

    Raises: NotAttachedError; PlanError: one of them shares nothing.
    """
    for name in names:
        if len(groups.of(adapters[name].name)) == 1:
            message = f"{name!r} has all its tensors for itself"
            raise PlanError(Problem("not-shared", message, "unshare"))
    for name in names or [member for group in groups.names for member in group]:
        if len(groups.of(name)) > 1:
            untie(adapters[name])
        groups.leave(name)
        adapters[name].require_grad(adapters[name].trainable)
    for group in groups.names:
        require_grad([adapters[name] for name in group])
    record(groups, adapters, blueprint)


def places(adapter: Adapter) -> Places:
    """Where the tensors are that the adapter can have in common with others; never those of heads."""
    modules: dict[str, nn.Module] = dict(adapter.units)
    if adapter.shared is not None:
        modules["shared"] = adapter.shared
    return {
        f"{address}.{path}": (module.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2])
        for address, module in modules.items()
        for path, _ in module.named_parameters()
        if not isinstance(module, Unit) or module.common is None or path.partition(".")[0] in module.common
    }


def check(adapters: Sequence[Adapter]) -> None:
    """Refuse adapters whose tensors do not mean the same.

    Raises: PlanError.
    """
    first, *others = adapters
    problems = []
    for adapter in adapters:
        if isinstance(adapter.config, FusionConfig):
            problems.append(_problem(f"{adapter.name!r} is a fusion, whose weights are for its own adapters"))
    mine = {key: _kind(*place) for key, place in places(first).items()}
    for other in others:
        names = f"{first.name!r} and {other.name!r}"
        if other.config.method != first.config.method:
            message = f"{names} are {first.config.method} and {other.config.method}"
            problems.append(_problem(message))
            continue
        theirs = {key: _kind(*place) for key, place in places(other).items()}
        for key in sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)):
            message = f"{names} have {mine.get(key, 'nothing')} and {theirs.get(key, 'nothing')} there"
            problems.append(_problem(message, key))
    if problems:
        raise PlanError(problems)


def _problem(message: str, address: str = "") -> Problem:
    return Problem("cannot-share", message, address, "adapters of one method, with the same slots and shapes")


def _kind(module: nn.Module, name: str) -> str:
    tensor = module._parameters[name]
    assert tensor is not None
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}".replace("torch.", "")


def tie(adapters: Sequence[Adapter]) -> None:
    """Give all adapters the parameters of the first."""
    first, *others = (places(adapter) for adapter in adapters)
    for other in others:
        for key, (module, name) in first.items():
            host, own = other[key]
            host._parameters[own] = module._parameters[name]
    require_grad(adapters)


def untie(adapter: Adapter) -> None:
    """Give an adapter parameters of its own, with the same numbers."""
    copies: dict[int, nn.Parameter] = {}
    for module, name in places(adapter).values():
        old = module._parameters[name]
        assert old is not None
        copy = copies.setdefault(id(old), nn.Parameter(old.detach().clone(), old.requires_grad))
        module._parameters[name] = copy


def require_grad(adapters: Sequence[Adapter]) -> None:
    """What several adapters have in common is trained as long as one of them is."""
    wanted = any(adapter.trainable for adapter in adapters)
    first = adapters[0]
    frozen = first.shared is not None and not first.shared.trained
    for key, (module, name) in places(first).items():
        tensor = module._parameters[name]
        assert tensor is not None
        tensor.requires_grad_(wanted and not (frozen and key.startswith("shared.")))


def record(groups: Groups, adapters: Mapping[str, Adapter], blueprint: Blueprint) -> None:
    """Write into the manifests of all adapters what they share, so that a full checkpoint says it."""
    for name, adapter in adapters.items():
        path, _ = adapter.injection.entries[0]
        site = site_of(adapter.injection.hosts[path])
        assert site is not None
        key = slug(name, "manifest")
        old = site._buffers[key]
        assert old is not None
        others = [other for other in groups.of(name) if other != name]
        site._buffers[key] = manifest.write(adapter.plan, blueprint, others).to(old.device)


def groups_in(contents: Sequence[Content]) -> Iterator[tuple[str, ...]]:
    """The groups of which the files of adapters speak, as far as all of their members are there."""
    names = {content.name for content in contents}
    done: set[str] = set()
    for content in contents:
        group = (content.name, *map(str, content.facts.get("shares", ())))
        if len(group) > 1 and names.issuperset(group) and content.name not in done:
            done.update(group)
            yield group
