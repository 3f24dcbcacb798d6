"""A model to observe, and what it runs on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from adapterkit.author.axes import examples
from adapterkit.author.observe import Observation, observe
from adapterkit.author.recorder import Edit, Enter, tensors


@dataclass(frozen=True)
class Scene:
    """One model with inputs, in which the claims of an interface are looked for."""

    name: str
    model: nn.Module
    inputs: Mapping[str, Any]

    @cached_property
    def observation(self) -> Observation:
        return self.observe()

    def observe(
        self,
        *,
        edits: Mapping[nn.Module, Edit] | None = None,
        enter: Mapping[nn.Module, Enter] | None = None,
        methods: Mapping[nn.Module, str] | None = None,
    ) -> Observation:
        return observe(self.model, self.inputs, edits=edits, enter=enter, methods=methods)

    @cached_property
    def _others(self) -> dict[object, Observation | None]:
        return {}

    def once(self, key: object, run: Callable[[], Observation]) -> Observation | None:
        """An observation under other circumstances, made once; None if the model does not run then."""
        if key not in self._others:
            try:
                self._others[key] = run()
            except Exception:  # models raise anything on what does not fit
                self._others[key] = None
        return self._others[key]

    @cached_property
    def rows(self) -> int:
        """B, as most inputs have it."""
        return examples(tensors(self.inputs))

    @cached_property
    def shorter(self) -> Observation | None:
        """The same with one example less, None if there is but one."""
        if self.rows < 2:
            return None
        fewer = self.rows - 1

        def cut(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return value[:fewer] if value.ndim and value.shape[0] == self.rows else value
            if isinstance(value, Mapping):
                return {name: cut(item) for name, item in value.items()}
            return type(value)(map(cut, value)) if type(value) in (tuple, list) else value

        try:
            return observe(self.model, {name: cut(value) for name, value in self.inputs.items()})
        except Exception:  # inputs whose rows are no examples
            return None
