"""Invertible adapters: `<base>.invertible_adapters.<name>.<parameter>`, an option of their bottlenecks."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from adapterkit.errors import FileFormatError, Problem
from adapterkit.files.adapterhub.bottleneck import BottleneckFile
from adapterkit.files.adapterhub.keys import Host, Keyed
from adapterkit.files.adapterhub.member import Member, Part, Shapes
from adapterkit.methods.activations import ACTIVATIONS
from adapterkit.methods.invertible import InvertibleConfig
from adapterkit.model.blueprint import Blueprint
from adapterkit.model.embeddings import embedding_slots
from adapterkit.spec.foreign import AdapterHub


class InvertibleMember(Member):
    """The invertible adapter of a bottleneck config."""

    def __init__(self, theirs: BottleneckFile, blueprint: Blueprint) -> None:
        self.theirs = theirs
        self.hub, self.stack = AdapterHub(), ""
        for stack, info in blueprint.stacks.items():
            hub = info.interface.adapterhub
            if hub is not None and info.reads is None and hub.invertible == stack.rpartition("/")[2]:
                self.hub, self.stack = hub, stack
                break
        slot = embedding_slots(blueprint).get(f"{self.stack}.embeddings")
        self.width = (slot.shape or (0, 0))[0] if slot is not None else 0

    def refusals(self) -> Iterator[Problem]:
        if not self.width:
            message = "AdapterHub has no invertible adapters behind the embeddings of this model"
            yield Problem("not-reproducible", message, "inv_adapter")
        if self.theirs.inv_adapter != "nice" or self.width % 2:
            message = "AdapterHub computes no coupling but 'nice', of an even width"
            yield Problem("unsupported-option", message, "inv_adapter")
        if self.theirs.non_linearity.lower() not in ACTIVATIONS:
            message = f"there is no activation {self.theirs.non_linearity!r}"
            yield Problem("unsupported-option", message, "non_linearity")

    @property
    def factor(self) -> float:
        return self.theirs.inv_adapter_reduction_factor or 2

    def wanted(self, given: Keyed) -> dict[Host, Shapes]:
        half = self.width // 2
        hidden = max(int(half // self.factor), 1)
        shapes: Shapes = {}
        for net in ("F", "G"):
            shapes |= {f"{net}.0.weight": (hidden, half), f"{net}.0.bias": (hidden,)}
            shapes |= {f"{net}.2.weight": (half, hidden), f"{net}.2.bias": (half,)}
        # a decoder whose encoder has one names the same module once more
        again = [host for host in given.parts if host[0] == "invertible"]
        return {host: shapes for host in (("invertible", self.stack), *again)}

    def parts(self, given: Keyed) -> Iterator[Part]:
        own = given.parts["invertible", self.stack]
        for host, others in given.parts.items():
            if host[0] == "invertible" and not all(torch.equal(own[n], t) for n, t in others.items()):
                message = f"differs from the invertible adapter of {self.stack!r}, which is the same module"
                raise FileFormatError(Problem("bad-file", message, host[1]))
        config = InvertibleConfig(
            reduction_factor=self.factor,
            non_linearity=self.theirs.non_linearity.lower(),
            stacks=(self.stack,),
            inverse=None if self.hub.inverse else False,
        )
        names = {".0.": ".down.", ".2.": ".up."}
        key = f"stacks.{self.stack.replace('/', '_')}"
        shared = {}
        for name, tensor in own.items():
            layer = name[1:4]
            shared[f"{key}.{name.replace(layer, names[layer])}"] = tensor
        yield Part(config, {}, shared)
