"""Setups: which adapters act together, and how. Frozen values without any tensor."""

from __future__ import annotations

from dataclasses import dataclass

from adapterkit.errors import CompositionError, Problem


@dataclass(frozen=True, init=False, repr=False)
class Fuse:
    """Attend over the outputs of several adapters (AdapterFusion, Pfeiffer et al. 2021, arXiv:2005.00247).

    The weights that attend are made by `kit.fuse(...)` and have a name, 'a+b' if none was given.
    Raises: CompositionError: fewer than two children, or one of them twice.
    """

    children: tuple[str, ...]
    name: str

    def __init__(self, *children: str, name: str | None = None) -> None:
        if len(children) < 2 or len(set(children)) < len(children):
            message = (
                f"Fuse needs two or more different adapters, not {', '.join(map(repr, children)) or 'none'}"
            )
            raise CompositionError(Problem("bad-setup", message))
        if not all(isinstance(child, str) for child in children):
            raise CompositionError(Problem("bad-setup", "the children of Fuse are names of adapters"))
        object.__setattr__(self, "children", children)
        object.__setattr__(self, "name", name or "+".join(children))

    def __repr__(self) -> str:
        inside = ", ".join(map(repr, self.children))
        named = "" if self.name == "+".join(self.children) else f", name={self.name!r}"
        return f"Fuse({inside}{named})"


Setup = str | Fuse
"""The name of an adapter, or a block of several."""
