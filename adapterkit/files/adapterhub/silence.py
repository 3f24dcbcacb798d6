"""What their library takes out of a model: adapters of its own, which have no tensors in the file."""

from __future__ import annotations

from collections.abc import Iterator

from adapterkit.errors import Problem
from adapterkit.files.adapterhub.keys import Host, Keyed
from adapterkit.files.adapterhub.member import Member, Part, Shapes
from adapterkit.methods.silence import SilenceConfig
from adapterkit.model.blueprint import Blueprint


class SilenceMember(Member):
    """The model's own adapters, which every adapter of theirs was trained without."""

    def __init__(self, blueprint: Blueprint) -> None:
        self.config = SilenceConfig()
        self.addresses = tuple(self.config.available(blueprint))

    def refusals(self) -> Iterator[Problem]:
        return iter(())

    def wanted(self, given: Keyed) -> dict[Host, Shapes]:
        return {}

    def parts(self, given: Keyed) -> Iterator[Part]:
        if self.addresses:
            yield Part(self.config, {address: {} for address in self.addresses})
