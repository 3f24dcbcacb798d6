"""The adapters in a model: putting them in, taking them out, and what the first of them needs."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from adapterkit import fusing, sharing
from adapterkit.adapter import Adapter
from adapterkit.composition import Setup, names
from adapterkit.errors import ConfigError, NotAttachedError, PlanError, Problem, did_you_mean, listing
from adapterkit.files import manifest
from adapterkit.inject import entry
from adapterkit.inject.batch import Inputs
from adapterkit.inject.injector import close_entries, eject, inject, open_entries
from adapterkit.inject.site import check_called, check_unwrapped, site_of
from adapterkit.inject.state import NAME, part_tensors, place_tensors
from adapterkit.methods.base import run_again
from adapterkit.methods.targets import shared_embeddings
from adapterkit.model.blueprint import Blueprint, Head, Slot
from adapterkit.model.walk import ATTRIBUTE, is_managed, is_sharded, parameters
from adapterkit.passes import others_within
from adapterkit.runtime import Programs, Runtime


class Named(Mapping[str, Adapter]):
    """Adapters by name, for reading."""

    def __init__(self, adapters: Mapping[str, Adapter]) -> None:
        self._adapters = adapters

    def __getitem__(self, name: str) -> Adapter:
        if not isinstance(name, str) or name not in self._adapters:
            message, known = f"there is no adapter {name!r}", f"attached: {listing(self._adapters)}"
            hint = did_you_mean(name, self._adapters)
            raise NotAttachedError(Problem("no-such-adapter", message, "", known, hint))
        return self._adapters[name]

    def get(self, name: object, default: Any = None) -> Any:
        """The adapter of this name, else the default."""
        return self._adapters.get(name, default) if isinstance(name, str) else default

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapters)

    def __len__(self) -> int:
        return len(self._adapters)

    def __contains__(self, name: object) -> bool:
        return name in self._adapters

    # one is itself, whatever its adapters
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


def _concerns(active: Setup | None, own: Sequence[str]) -> bool:
    return not own or not set(own).isdisjoint(names(active))


def _joined() -> bool:
    """Whether this process is one of several."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


class Members:
    """Adapters in a model by name, the entries of its stacks, and the model's own switches from before."""

    def __init__(self, model: nn.Module, blueprint: Blueprint, owner: Any) -> None:
        self.model = model
        self.blueprint = blueprint
        self.owner = owner
        self.adapters: dict[str, Adapter] = {}
        self.groups = sharing.Groups()
        self.runtime = Runtime()
        self.top = entry.Top(self.runtime, Inputs(blueprint))
        self.entries: dict[str, nn.Module] = {}
        self._trained: set[tuple[nn.Module, str]] | None = None
        self._hooks: list[Any] = []

    def check_name(self, name: str, replace: bool, fusion: bool = False) -> None:
        """Refuse a name that is none, or that is taken. Raises: ConfigError, PlanError."""
        if not isinstance(name, str) or not NAME.match(name.replace("+", "-") if fusion else name):
            raise ConfigError(
                Problem("bad-name", f"{name!r} is no name of an adapter", "name", "letters, digits, '_', '-'")
            )
        if name in self.adapters and not replace:
            message = f"there already is an adapter {name!r}"
            raise ConfigError(Problem("name-taken", message, "name", "another name, or replace=True"))
        fusing.refuse_used(name, self.adapters, "replace")

    def refuse_used(self, verb: str, active: Setup | None, *own: str) -> None:
        """Refuse what takes adapters (default: what acts) from under a block of `using`, in any thread, or a
        pass of another thread that has no block.

        Args: active: what acts in threads without a block.
        Raises: PlanError.
        """
        override, here = self.runtime.override, threading.get_ident()
        if override.programs is not None and _concerns(override.active, own):
            message = f"kit.using({override.active!r}) says what acts in this block"
            raise PlanError(Problem("in-use", message, verb, "the same call after the block"))
        uses = [use for use in tuple(self.runtime.uses) if use.thread != here]
        alive = {thread.ident for thread in threading.enumerate()} if uses else set()
        for use in uses:
            if use.thread in alive and _concerns(use.active, own):
                message = f"kit.using({use.active!r}) says what acts in another thread"
                raise PlanError(Problem("in-use", message, verb, "the same call after its block"))
        if _concerns(active, own):
            self.refuse_running(verb, active)

    def refuse_running(self, verb: str, active: Setup | None) -> None:
        """Refuse to change what acts in the midst of a pass of another thread: it would be half of each.

        Raises: PlanError.
        """
        if others_within(self.model) - {use.thread for use in tuple(self.runtime.uses)}:
            message = f"another thread is within a pass of the model, where {active!r} acts"
            expected = (
                "the same call when it has ended; kit.using(...) in each thread to change what acts there"
            )
            raise PlanError(Problem("in-use", message, verb, expected))

    @property
    def merged(self) -> str | None:
        """Name of the adapter that is folded into the weights."""
        return next((name for name, adapter in self.adapters.items() if adapter.merged), None)

    def refuse_altered(self, verb: str, own: str | None = None) -> None:
        """Refuse what reads tensors, or puts others in their place, where those of the model are not as they
        were: an adapter (but `own`) is merged, or they are sharded. Raises: PlanError.
        """
        if self.merged != own:
            self.refuse_merged(verb)
        self.refuse_sharded(verb)

    def refuse_merged(self, verb: str) -> None:
        """Refuse what has no meaning while an adapter is folded into the weights. Raises: PlanError."""
        if self.merged:
            message = f"{self.merged!r} is merged into the weights"
            raise PlanError(Problem("merged", message, verb, "kit.unmerge() first"))

    def refuse_sharded(self, verb: str) -> None:
        """Refuse what needs whole tensors where this process holds parts of them. Raises: PlanError.

        After a pass some are whole for a while; what is done to those is lost when they are parted again.
        """
        own = (tensor for adapter in self.adapters.values() for tensor in adapter.parameters())
        if _joined() and (any(map(is_managed, self.model.modules())) or any(map(is_sharded, own))):
            message = "the model is sharded: this process holds a part of its tensors"
            expected = "the same call before sharding, or on what ak.load takes out of a full checkpoint"
            raise PlanError(Problem("sharded", message, verb, expected))

    def refuse_late(self, host: nn.Module) -> None:
        """Refuse an adapter to be trained in a model that is sharded already: no group would know it.

        Raises: PlanError.
        """
        if not _joined():
            return
        firsts = (next(module.parameters(), None) for module in (host, self.model))
        if is_managed(self.model) or any(found is not None and is_sharded(found) for found in firsts):
            message = (
                "the model is sharded: an adapter that comes later would be trained apart in each process"
            )
            raise PlanError(Problem("sharded-before", message, expected="attach first, then shard"))

    def run(self, programs: Programs) -> None:
        """Let every site run its program."""
        self.runtime.programs = programs
        hosts = dict(self.entries)
        for adapter in self.adapters.values():
            hosts |= adapter.injection.hosts
        for path, host in hosts.items():
            site = site_of(host)
            if site is not None:
                site.__dict__["program"] = programs.get(path)  # attributes of modules are slow to set
        self.top.program = programs.get(self.top.key)

    def require_grad(self, adapters: Sequence[Adapter], wanted: bool) -> None:
        """Let tensors be trained or not; of adapters that share, as all of these say together."""
        for adapter in adapters:
            adapter.require_grad(wanted)
            for host in adapter.injection.hosts.values():
                site = site_of(host)
                if site is not None:
                    site.stacked.clear()  # what is trained may be written unseen
        for group in self.groups.names:
            sharing.require_grad([self.adapters[name] for name in group])

    def exchange(self, old: Adapter | None, new: Adapter) -> None:
        """Put an adapter in the place of another, also among the names.

        Raises: PlanError: a host cannot take it; the old one is there again, and no site has its program.
        """
        order, groups = list(self.adapters), self.groups.names
        if old is not None:
            self.take(old)
        try:
            self.put(new)
        except BaseException:
            if old is not None:
                self.put(old)
                self.regroup(groups)
            raise
        finally:
            for name in order if old is not None else ():
                if name in self.adapters:
                    self.adapters[name] = self.adapters.pop(name)

    def put(self, adapter: Adapter) -> None:
        """Put an adapter's modules into the model; the first one brings the hooks and entries with it.

        Raises: PlanError: a host cannot take them; the model is as before.
        """
        modules = {**adapter.units, **adapter.heads, **adapter.poolers}
        places: dict[str, Slot | Head] = {slot.address: slot for slot in adapter.plan.slots}
        places |= {head.address: head for head in (*self.blueprint.heads, *self.blueprint.poolers)}
        hosts = [(places[address], module) for address, module in modules.items()]
        helpers = adapter.config.helpers(adapter.plan.slots, self.blueprint)
        helpers += run_again(self.blueprint, [*adapter.plan.slots, *(helper.place for helper in helpers)])
        record = manifest.write(adapter.plan, self.blueprint)
        check_called(self.blueprint, [host.path for host, _ in hosts] + [one.place.path for one in helpers])
        if problems := shared_embeddings(self.blueprint, adapter.plan.slots):
            raise PlanError(problems)
        fusing.connect(adapter, self.adapters)
        adapter.injection = inject(
            self.runtime, adapter.name, hosts, adapter.shared, helpers, record, self.top
        )
        if ATTRIBUTE not in self.model.__dict__:
            try:
                self._enter()
            except BaseException:
                self.take(adapter)
                self._leave()
                raise
        self.adapters[adapter.name] = adapter
        self.top.attend(self.model)

    def take(self, adapter: Adapter) -> None:
        """Take an adapter's modules out of the model; it is no member then.

        Raises: PlanError: another library wrapped a host on top; nothing is changed.
        """
        others = (other.injection for other in self.adapters.values() if other is not adapter)
        eject(adapter.injection, others, self.top)
        self.adapters.pop(adapter.name, None)
        left = [name for name in self.groups.of(adapter.name) if name != adapter.name]
        self.groups.leave(adapter.name)
        if left:
            sharing.require_grad([self.adapters[name] for name in left])
            sharing.record(self.groups, self.adapters, self.blueprint)
        self.top.attend(self.model)

    def back(self, before: Mapping[str, Adapter], groups: tuple[tuple[str, ...], ...]) -> None:
        """Take out what has come since then, and put back what was replaced."""
        for name, own in reversed(list(self.adapters.items())):
            if name not in before:
                self.take(own)
            elif own is not before[name]:
                self.exchange(own, before[name])
        if self.adapters:
            self.regroup(groups)
        elif ATTRIBUTE in self.model.__dict__:
            self._leave()

    def regroup(self, groups: tuple[tuple[str, ...], ...]) -> None:
        """Let these groups share, of whose members the tensors are the same ones already."""
        if groups != self.groups.names:
            self.groups.names = groups
            sharing.record(self.groups, self.adapters, self.blueprint)

    def check_unwrapped(self) -> None:
        """Raise PlanError where another library wrapped a host on top, so that the kit cannot leave."""
        for hosts in (self.entries, *(adapter.injection.hosts for adapter in self.adapters.values())):
            for path, host in hosts.items():
                check_unwrapped(host, path)

    def take_all(self) -> None:
        """Leave the model as if nothing had ever been attached.

        Raises: PlanError: another library wrapped a host on top; nothing is changed.
        """
        self.check_unwrapped()
        for adapter in list(self.adapters.values()):
            self.take(adapter)
        self._leave()

    def kept(self, adapter: Adapter) -> tuple[dict[Head, nn.Module], dict[Head, nn.Module]]:
        """The adapter's copies of heads and of poolers, by what they are copies of."""
        places = {place.address: place for place in (*self.blueprint.heads, *self.blueprint.poolers)}
        heads, poolers = ({places[a]: m for a, m in own.items()} for own in (adapter.heads, adapter.poolers))
        return heads, poolers

    def _enter(self) -> None:
        """What the first adapter needs: a frozen base, the hooks, the entries, the mark on the model."""
        trained = [found for found in parameters(self.model) if found[2].requires_grad]
        # by place: sharding puts other tensors there, and other libraries rename the path
        self._trained = {(module, name) for module, name, _ in trained}
        self.entries |= open_entries(self.blueprint, self.runtime)
        for *_, parameter in trained:
            parameter.requires_grad_(False)
        self._hooks = [
            self.model.register_load_state_dict_pre_hook(_refuse_merged_load),
            self.model.register_load_state_dict_pre_hook(place_tensors),
            self.model.register_state_dict_pre_hook(_refuse_merged_state),
            self.model.register_state_dict_post_hook(_part_shared),
            self.model.register_load_state_dict_post_hook(_tie_again),
        ]
        self.model.__dict__[ATTRIBUTE] = self.owner

    def _leave(self) -> None:
        """Undo `_enter`."""
        close_entries(self.entries)
        self.entries.clear()
        self.top.rest(self.model)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.model.__dict__.pop(ATTRIBUTE, None)
        trained, self._trained = self._trained, None
        if trained is None:
            return
        for module, name, parameter in parameters(self.model):
            parameter.requires_grad_((module, name) in trained)


def _refuse_merged_state(model: nn.Module, prefix: str, keep_vars: bool) -> None:
    """State-dict pre-hook: weights with an adapter folded in are not the base model's."""
    kit = model.__dict__.get(ATTRIBUTE)
    if kit is not None:
        kit._members.refuse_merged("state_dict")


def _refuse_merged_load(model: nn.Module, *rest: Any) -> None:
    """Load-state-dict pre-hook: what is loaded into merged weights would be gone after `unmerge`."""
    kit = model.__dict__.get(ATTRIBUTE)
    if kit is not None:
        kit._members.refuse_merged("load_state_dict")


def _part_shared(model: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    """State-dict post-hook: what adapters have in common is there once for each of them."""
    kit = model.__dict__.get(ATTRIBUTE)
    if kit is not None and kit.shared:
        part_tensors(model, state_dict, prefix)


def _tie_again(model: nn.Module, keys: Any) -> None:
    """Load-state-dict post-hook: with `assign=True` every key has got a tensor of its own."""
    kit: Any = model.__dict__.get(ATTRIBUTE)
    for group in kit.shared if kit is not None else ():
        sharing.tie([kit[name] for name in group])
