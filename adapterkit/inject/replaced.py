"""Modules with adapters that somebody replaces: the new ones would run without, and nobody would be told.

New output embeddings after a change of the vocabulary, another table, another classifier. What wraps the old
module (sharding, compilers) keeps it inside, and a whole model may be replaced by another.
"""

from __future__ import annotations

from functools import cache

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from adapterkit.errors import PlanError, Problem
from adapterkit.model.walk import ATTRIBUTE, CHILD


@cache
def attend() -> None:
    """From now on look at every module that takes the place of another; once for the process."""
    register_module_module_registration_hook(_refuse)


def _refuse(parent: nn.Module, name: str, new: nn.Module | None) -> None:
    """Raises: PlanError: an adapted module would be lost; nothing is changed then."""
    old = parent._modules.get(name)
    if old is None or new is old:
        return
    inside = list(old.modules())
    sites = [module for module in inside if CHILD in module._modules]
    if not sites or any(ATTRIBUTE in module.__dict__ for module in inside):
        return
    if new is not None and any(module is old for module in new.modules()):
        return
    path = sites[0]._modules[CHILD].__dict__.get("key", name)
    message = (
        f"{name!r} of {type(parent).__name__} has adapters (at {path}), which {type(new).__name__} has not"
    )
    expected = "the change first, then attach; or kit.detach() before it"
    raise PlanError(Problem("replaced-module", message, expected=expected))
