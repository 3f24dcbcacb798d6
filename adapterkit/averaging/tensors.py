"""Averages of every tensor by itself, for methods that change no weight in a way that could be added up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from adapterkit.averaging.parts import Made, Part, mean, refusal


def linear(parts: Sequence[Part]) -> Made:
    """Every tensor is the weighted sum of the adapters' tensors."""
    _check_same(parts)
    return _made(parts, lambda key: [part.weight for part in parts])


def negate_b(parts: Sequence[Part]) -> Made:
    """The same, with the sizes of the weights for all tensors but those that carry the sign of the update.

    Source: Zhang et al. 2023, arXiv:2306.14870, section 3.2: if both factors of B A changed their sign, B A
    would stay what it is.
    Raises: PlanError: the method has no such tensor.
    """
    _check_same(parts)
    first = parts[0]
    signed = {f"{address}.{name}" for address, unit in first.units.items() for name in unit.signed}
    for address, unit in first.units.items():
        if not unit.signed:
            message = f"{first.config.method} has no tensor that carries the sign of what it adds"
            raise refusal(message, address, "strategy='linear'")
    return _made(parts, lambda key: [p.weight if key in signed else abs(p.weight) for p in parts])


def _made(parts: Sequence[Part], weights: Callable[[str], Sequence[float]]) -> Made:
    named = [_named(part) for part in parts]
    tensors = {key: mean([own[key] for own in named], weights(key)) for key in named[0]}
    return Made(parts[0].config, tuple(parts[0].units), tensors)


def _named(part: Part) -> dict[str, torch.Tensor]:
    modules: dict[str, torch.nn.Module] = dict(part.units)
    if part.shared is not None:
        modules["shared"] = part.shared
    return {
        f"{a}.{key}": tensor for a, module in modules.items() for key, tensor in module.state_dict().items()
    }


def _check_same(parts: Sequence[Part]) -> None:
    """Refuse tensors that do not mean the same."""
    first, *others = parts
    for other in others:
        names = f"{first.name!r} and {other.name!r}"
        if other.config.method != first.config.method:
            raise refusal(f"{names} are {first.config.method} and {other.config.method}")
        differing = _options(first).items() ^ _options(other).items()
        if differing:
            words = ", ".join(sorted({option for option, _ in differing}))
            raise refusal(f"{names} have other options: {words}", expected="adapters of one config")
        if other.units.keys() != first.units.keys():
            address = sorted(other.units.keys() ^ first.units.keys())[0]
            raise refusal(f"only one of {names} has a unit there", address, "adapters of the same slots")
        mine, theirs = _named(first), _named(other)
        for key in sorted(mine.keys() | theirs.keys()):
            shapes = [tuple(named[key].shape) if key in named else None for named in (mine, theirs)]
            if shapes[0] != shapes[1]:
                raise refusal(f"{names} have tensors of shapes {shapes[0]} and {shapes[1]}", key)


def _options(part: Part) -> Mapping[str, str]:
    """Options that say what the tensors mean, as text."""
    config = part.config
    return {name: repr(value) for name, value in config.to_dict().items() if name not in config.passing}
