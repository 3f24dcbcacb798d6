"""Other weights for an attached adapter: those of a file, in place, or its own without their MLP."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from adapterkit.adapter import Adapter
from adapterkit.errors import FileFormatError, PlanError, Problem
from adapterkit.files import kinship
from adapterkit.files.assemble import compare, other_types
from adapterkit.files.content import Content
from adapterkit.methods.targets import Selection
from adapterkit.model.blueprint import Blueprint
from adapterkit.model.walk import CHILD
from adapterkit.planning import Draft, Plan, describe


@torch.no_grad()
def swap(adapter: Adapter, content: Content, blueprint: Blueprint) -> None:
    """Copy the tensors of a file into an adapter of the same method, slots and shapes.

    In place: compiled graphs and optimisers keep what they hold.

    Raises: FileFormatError: with everything that differs; nothing is changed then.
    """
    kinship.check(content.facts, content.addresses or (), blueprint, content.source)
    own = {**dict(adapter.named_parameters()), **_buffers(adapter)}
    given = dict(content.tensors)
    for path, tensors in content.heads.items():
        given |= {f"head.{path}.{key}": tensor for key, tensor in tensors.items()}
    models = {pooler.address: pooler.module.state_dict() for pooler in blueprint.poolers}
    problems = []
    for address, tensors in content.poolers.items():
        if address in adapter.poolers:
            given |= {f"{address}.{key}": tensor for key, tensor in tensors.items()}
        elif not _same(models.get(address, {}), tensors):
            message = "the file brings another pooler than the model's own, on which this adapter stands"
            problems.append(Problem("other-adapter", message, address, file=content.source))
    shapes = {key: tuple(tensor.shape) for key, tensor in own.items()}
    problems += compare(shapes, given, content.source) + other_types(own, given, content.source)
    if content.config.to_dict() != adapter.config.to_dict():
        message = f"the file holds {content.config.method} with other options than {adapter.name!r}"
        problems.append(Problem("other-adapter", message, adapter.name, file=content.source))
    if problems:
        raise FileFormatError(problems)
    for key, tensor in own.items():
        tensor.copy_(given[key])


def _same(own: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> bool:
    """Whether tensors by name are the same numbers; those that adapters put there do not count."""
    own = {key: tensor for key, tensor in own.items() if f"{CHILD}." not in key}
    return own.keys() == given.keys() and all(
        torch.equal(tensor.cpu(), given[key].cpu().to(tensor.dtype)) for key, tensor in own.items()
    )


def flat(adapter: Adapter, blueprint: Blueprint) -> tuple[Plan, Draft]:
    """Plan and units of an adapter whose prefixes no longer come from an MLP.

    Raises: PlanError: it has none that do.
    """
    found = adapter.config.flattened(adapter.plan.slots, adapter.units, adapter.shared)
    if found is None:
        message = f"{adapter.name!r} has no prefix that comes from an MLP"
        expected = "an adapter with prefix_tuning that is not flat"
        raise PlanError(Problem("nothing-to-eject", message, expected=expected))
    config, units, shared = found
    selection = Selection(adapter.plan.slots, adapter.plan.missing)
    draft = Draft(units, shared)
    return describe(blueprint, config, adapter.name, selection, adapter.plan.heads, draft), draft


def _buffers(adapter: Adapter) -> dict[str, torch.Tensor]:
    """Tensors of an adapter that are saved and are no parameters."""
    return {
        f"{address}.{name}": buffer
        for address, module in adapter.modules().items()
        for name, buffer in module.named_buffers()
    }
