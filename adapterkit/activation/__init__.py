"""Setups -> programs, at the time when a setup is activated."""

from adapterkit.activation.program import programs

__all__ = ["programs"]
