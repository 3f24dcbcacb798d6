"""The adapters in a model: putting them in, taking them out, and what the first of them needs."""

from __future__ import annotations

from typing import Any

from torch import nn

from adapterkit import fusing, sharing
from adapterkit.adapter import Adapter
from adapterkit.files import manifest
from adapterkit.inject import entry
from adapterkit.inject.batch import Inputs
from adapterkit.inject.injector import close_entries, eject, inject, open_entries
from adapterkit.inject.site import check_unwrapped
from adapterkit.inject.state import part_tensors, place_tensors
from adapterkit.model.blueprint import Blueprint, Head, Slot
from adapterkit.model.walk import named_parameters
from adapterkit.runtime import Runtime

ATTRIBUTE = "_adapterkit"
"""Where the model keeps its kit."""


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
        self._trained: frozenset[str] | None = None
        self._hooks: list[Any] = []

    def put(self, adapter: Adapter) -> None:
        """Put an adapter's modules into the model; the first one brings the hooks and entries with it.

        Raises: PlanError: a host cannot take them; the model is as before.
        """
        modules = {**adapter.units, **adapter.heads, **adapter.poolers}
        places: dict[str, Slot | Head] = {slot.address: slot for slot in adapter.plan.slots}
        places |= {head.address: head for head in (*self.blueprint.heads, *self.blueprint.poolers)}
        hosts = [(places[address], module) for address, module in modules.items()]
        helpers = adapter.config.helpers(adapter.plan.slots, self.blueprint)
        record = manifest.write(adapter.plan, self.blueprint)
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
        self.groups.leave(adapter.name)
        self.top.attend(self.model)

    def take_all(self) -> None:
        """Leave the model as if nothing had ever been attached.

        Raises: PlanError: another library wrapped a host on top; nothing is changed.
        """
        for hosts in (self.entries, *(adapter.injection.hosts for adapter in self.adapters.values())):
            for path, host in hosts.items():
                check_unwrapped(host, path)
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
        trained = {path: p for path, p in named_parameters(self.model) if p.requires_grad}
        self._trained = frozenset(trained)
        self.entries |= open_entries(self.blueprint, self.runtime)
        for parameter in trained.values():
            parameter.requires_grad_(False)
        self._hooks = [
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
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.model.__dict__.pop(ATTRIBUTE, None)
        trained, self._trained = self._trained, None
        if trained is None:
            return
        for path, parameter in named_parameters(self.model):
            # by name: sharding replaces the tensors themselves
            parameter.requires_grad_(path in trained)


def _refuse_merged_state(model: nn.Module, prefix: str, keep_vars: bool) -> None:
    """State-dict pre-hook: weights with an adapter folded in are not the base model's."""
    kit = model.__dict__.get(ATTRIBUTE)
    if kit is not None:
        kit._refuse_merged("state_dict")


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
