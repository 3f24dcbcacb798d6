"""What a file says -> modules ready to be put into the model; nothing is changed until all of them are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce

import torch
from torch import nn

from adapterkit.errors import FileFormatError, Problem, did_you_mean, listing
from adapterkit.files import kinship
from adapterkit.files.content import Content
from adapterkit.inject.injector import copies_of, copy_head, device_of
from adapterkit.methods.targets import Selection
from adapterkit.model.blueprint import Blueprint, Head, Slot
from adapterkit.planning import Draft, Plan, build, choose, describe


@dataclass(frozen=True)
class Assembled:
    """An adapter from a file, outside the model."""

    plan: Plan
    draft: Draft
    heads: dict[Head, nn.Module]
    poolers: dict[Head, nn.Module]


def assemble(blueprint: Blueprint, content: Content, name: str, head: bool | str) -> Assembled:
    """The modules of an adapter with the tensors of a file.

    Raises: FileFormatError, PlanError: with everything that does not fit.
    """
    kinship.check(content.facts, content.addresses or (), blueprint, content.source)
    chosen = choose(blueprint, content.config, strict=False).slots if content.addresses is None else None
    own = chosen or slots(blueprint, content)
    with torch.device("meta"):
        draft = build(content.config, own, None)
    heads = check_heads(blueprint, content, head)
    plan = describe(blueprint, content.config, name, Selection(own), heads, draft)
    fill(plan, draft, content, blueprint.model)
    copies = {found: filled_head(copied, found, content) for found, copied in copies_of(heads).items()}
    poolers = filled_poolers(blueprint, content) if head is not False else {}
    return Assembled(plan, draft, copies, poolers)


def slots(blueprint: Blueprint, content: Content) -> tuple[Slot, ...]:
    """The slots of this model that the content adapts.

    Raises: FileFormatError: the model has not got them all, or in other shapes.
    """
    problems, found = [], []
    available = content.config.available(blueprint)
    for address in content.addresses or ():
        slot = available.get(address)
        if slot is None:
            hint = did_you_mean(address, available)
            problems.append(
                Problem("no-such-slot", "this model has no such slot", address, "", hint, file=content.source)
            )
        elif address in content.shapes and tuple(content.shapes[address]) != slot.shape:
            message = f"made for a slot of shape {content.shapes[address]}; here it is {slot.shape}"
            problems.append(Problem("other-shape", message, address, file=content.source))
        else:
            found.append(slot)
    if problems or not found:
        raise FileFormatError(problems or [Problem("bad-file", "holds no adapter", file=content.source)])
    order = {address: i for i, address in enumerate(available)}
    return tuple(sorted(found, key=lambda slot: order[slot.address]))


def check_heads(blueprint: Blueprint, content: Content, head: bool | str) -> tuple[Head, ...]:
    """The heads that come from the file: all of the model, or none with `head=False`.

    Raises: FileFormatError: the file has other heads than the model; no head is ever left at random.
    """
    if head is False or not content.config.has_head:
        return ()
    here, there = {found.path for found in blueprint.heads}, set(content.heads)
    problems = [
        Problem(
            "head-missing",
            f"the model has a head {path!r} that the file lacks",
            path,
            _HEAD,
            file=content.source,
        )
        for path in sorted(here - there)
    ]
    problems += [
        Problem(
            "head-unknown",
            f"the file has a head {path!r} that the model lacks",
            path,
            _HEAD,
            file=content.source,
        )
        for path in sorted(there - here)
    ]
    if problems:
        raise FileFormatError(problems)
    return blueprint.heads


_HEAD = "the class of model that the adapter was trained with, or head=False"


def fill(plan: Plan, draft: Draft, content: Content, model: nn.Module) -> None:
    """Give the units of a plan (on the meta device) their hosts' device and the file's tensors.

    Raises: FileFormatError: with every tensor that is unknown, missing or of another shape.
    """
    hosts = {slot.address: slot for slot in plan.slots} | {"shared": plan.slots[0]}
    wanted = {
        f"{address}.{key}": (module, key, value)
        for address, module in draft.modules().items()
        for key, value in module.state_dict(keep_vars=True).items()
    }
    problems = compare(
        {key: tuple(value.shape) for key, (_, _, value) in wanted.items()}, content.tensors, content.source
    )
    problems += other_types(
        {key: value for key, (_, _, value) in wanted.items()}, content.tensors, content.source
    )
    if problems:
        raise FileFormatError(problems)
    for address, module in draft.modules().items():
        own = {key: content.tensors[f"{address}.{key}"] for key in module.state_dict()}
        if not own:
            continue
        floats = [tensor.dtype for tensor in own.values() if tensor.is_floating_point()]
        module.to_empty(device=device_of(hosts[address], model))
        module.to(reduce(torch.promote_types, floats) if floats else torch.float32)
        module.load_state_dict(own)


def compare(
    wanted: Mapping[str, tuple[int, ...]], given: Mapping[str, torch.Tensor], source: str
) -> list[Problem]:
    """What is unknown, missing or of another shape."""
    problems = []
    for key in sorted(given.keys() - wanted.keys()):
        hint = did_you_mean(key, wanted)
        problems.append(
            Problem("unknown-tensors", "the adapter has no such tensor", key, "", hint, file=source)
        )
    for key in sorted(wanted.keys() - given.keys()):
        problems.append(Problem("missing-tensors", "the file lacks this tensor", key, file=source))
    for key in sorted(wanted.keys() & given.keys()):
        if tuple(given[key].shape) != wanted[key]:
            message = f"has shape {tuple(given[key].shape)}, {wanted[key]} was expected"
            problems.append(Problem("other-shape", message, key, file=source))
    return problems


def other_types(
    wanted: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor], source: str
) -> list[Problem]:
    """What is no floating-point number where one was expected, or one that nothing computes with."""
    return [
        Problem(
            "bad-file", f"holds {given[key].dtype}", key, f"one of {listing(map(str, _FLOATS))}", file=source
        )
        for key in sorted(wanted.keys() & given.keys())
        if wanted[key].is_floating_point() and given[key].dtype not in _FLOATS
    ]


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def filled_head(module: nn.Module, head: Head, content: Content) -> nn.Module:
    """A copy of a head with the file's tensors.

    Raises: FileFormatError: they do not fit, other labels for example.
    """
    own = content.heads[head.path]
    there = module.state_dict()
    shapes = {key: tuple(value.shape) for key, value in there.items()}
    problems = compare(shapes, own, content.source) + other_types(there, own, content.source)
    if problems:
        hint = f"heads here: {listing(f'{key} {shape}' for key, shape in shapes.items())}"
        raise FileFormatError(
            [*problems, Problem("head-shape", "the head does not fit", head.path, hint, _HEAD)]
        )
    module.load_state_dict(dict(own))
    return module


def filled_poolers(blueprint: Blueprint, content: Content) -> dict[Head, nn.Module]:
    """Copies of the poolers whose tensors in the file differ from the model's: newly initialised ones come
    back.

    Raises: FileFormatError: the file has a pooler that the model lacks, or of another shape.
    """
    found: dict[Head, nn.Module] = {}
    unknown = content.poolers.keys() - {pooler.address for pooler in blueprint.poolers}
    if unknown:
        message = "the model has no such pooler"
        raise FileFormatError(
            Problem("unknown-tensors", message, address, expected=_HEAD, file=content.source)
            for address in unknown
        )
    for pooler in blueprint.poolers:
        given = content.poolers.get(pooler.address)
        if given is None:
            continue
        plain = copy_head(pooler.module)
        own = plain.state_dict()
        problems = compare({key: tuple(value.shape) for key, value in own.items()}, given, content.source)
        if problems:
            raise FileFormatError(problems)
        if any(not torch.equal(own[key].cpu(), given[key].cpu().to(own[key].dtype)) for key in own):
            plain.load_state_dict(dict(given))
            found[pooler] = plain
    return found
