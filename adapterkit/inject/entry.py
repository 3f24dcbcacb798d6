"""What happens where the stream enters a stack."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from adapterkit.inject import batch
from adapterkit.inject.batch import Inputs
from adapterkit.runtime import Program, Programs, Runtime

KEY = "input_grad"


class InputGrad(nn.Module):
    """Let the stream require a gradient where it enters layers that are checkpointed the reentrant way.

    Reentrant checkpointing runs a layer without autograd unless one of its inputs requires a gradient. With
    a frozen base none does, and the adapters of the layer would silently never train. The first layer is the
    place, not the embeddings: a model that is given `inputs_embeds` never calls those.
    """

    def __init__(self, layers: tuple[nn.Module, ...]) -> None:
        super().__init__()
        # a tuple, so that the layers are not registered a second time
        self.layers = layers

    def forward(self, x: Any) -> Any:
        if torch.is_grad_enabled() and isinstance(x, torch.Tensor) and not x.requires_grad:
            if any(map(_checkpoints_reentrantly, self.layers)):
                return x.detach().requires_grad_(True)
        return x


def _checkpoints_reentrantly(layer: nn.Module) -> bool:
    if not (layer.training and getattr(layer, "gradient_checkpointing", False)):
        return False
    run = getattr(layer, "_gradient_checkpointing_func", None)
    return getattr(run, "keywords", {}).get("use_reentrant") is not False


class Top:
    """What a site is elsewhere, for the model itself: its class is never swapped, so it is told by forward
    hooks.

    A hook that comes after the first compiled call would be ignored; every adapter that needs one also swaps
    a class inside, which makes the compiler look again.
    """

    key = ""

    def __init__(self, runtime: Runtime, inputs: Inputs) -> None:
        self.runtime = runtime
        self.inputs = inputs
        self.counts = False
        """Whether setups were activated that ask something of the batch."""
        self.program: Program | None = None
        self.units: dict[str, nn.Module] = {}
        self.hooks: tuple[RemovableHandle, ...] = ()

    def expect(self, model: nn.Module, programs: Programs) -> None:
        """Hook the model before a setup acts that asks something of the batch."""
        own = programs.get(self.key)
        if own is not None and own.batch is not None and not self.counts:
            self.counts = True
            self.attend(model)

    def rest(self, model: nn.Module) -> None:
        """Leave the model: no setup is active any more."""
        self.counts, self.program = False, None
        self.attend(model)

    def attend(self, model: nn.Module) -> None:
        """Hook the model while there are units here, and only then: compilers make a graph of every hook."""
        needed = self.counts or bool(self.units)
        if needed and not self.hooks:
            before = model.register_forward_pre_hook(self, with_kwargs=True)
            self.hooks = (before, model.register_forward_hook(self.leave))
        elif self.hooks and not needed:
            for hook in self.hooks:
                hook.remove()
            self.hooks = ()

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        override = self.runtime.override
        program = self.program if override.programs is None else override.programs.get(self.key)
        if program is None or program.batch is None:
            batch.refuse_columns(kwargs, self.inputs)
        if program is None:
            return args, kwargs
        if program.batch is not None:
            args, kwargs = batch.enter(
                model, program.batch, self.inputs, args, kwargs, override.flow, override.rows, override.tasks
            )
        for key in program.entry:
            args, kwargs = self.units[key](args, kwargs, model, override.flow)
        return args, kwargs

    @property
    def adapterkit(self) -> Top:
        """The site, as units that are called behind the model look for it."""
        return self

    def leave(self, model: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        """The same behind the model, as a forward hook."""
        override = self.runtime.override
        program = self.program if override.programs is None else override.programs.get(self.key)
        for key in program.outputs if program is not None else ():
            # what acts behind the model is a helper, never lanes of units
            out = self.units[str(key)](out, args[0] if args else None, self)
        if program is not None and program.batch is not None:
            batch.leave(override.flow)
        return out
