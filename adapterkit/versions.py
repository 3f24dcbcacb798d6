"""Versions of adapterkit and of what it stands on."""

from __future__ import annotations

__version__ = "0.1.0"

TRANSFORMERS_TESTED = ("5.5.0", "5.24.0")
"""Both ends of the range of transformers that the tests run on."""


def installed(package: str) -> str | None:
    """Version of a package, None if it is not installed."""
    from importlib.metadata import PackageNotFoundError, version  # slow to import

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:3] if part.isdigit())


def unverified() -> str | None:
    """A sentence about a transformers version that the tests have not seen, None if they have."""
    found = installed("transformers")
    if found is None:
        return None
    low, high = TRANSFORMERS_TESTED
    if _numbers(low) <= _numbers(found) <= _numbers(high):
        return None
    return f"transformers {found} is outside the tested range {low} to {high}"
