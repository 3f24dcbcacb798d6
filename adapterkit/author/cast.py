"""Which models an interface is looked at in: tiny ones of its model types, and those that a user names."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from adapterkit.author import inputs as drawing
from adapterkit.author import tiny
from adapterkit.author.scene import Scene
from adapterkit.errors import AdapterkitError, ConfigError, Problem
from adapterkit.spec.schema import Interface, Stack, Sublayer

SEQ = 7
_CROSSED = "add_cross_attention"


def cast(interface: Interface, model: Any = None, inputs: Mapping[str, Any] | None = None) -> list[Scene]:
    """Scenes for an interface.

    Args:
        model: None for tiny models of the interface's model types; a module with its `inputs`; a function
            that gives (module, inputs); whatever a tiny model can be built of; a list of these.
    Raises: ConfigError: there is nothing to look at.
    """
    if isinstance(model, list | tuple):
        return [scene for one in model for scene in cast(interface, one, inputs)]
    if isinstance(model, Scene):
        return [model]
    if model is None:
        if not interface.model_type:
            message = "the interface names no model type that a model could be built of"
            raise ConfigError(Problem("no-such-model", message, expected="a model: model=... or --model"))
        return _of_types(interface)
    if isinstance(model, nn.Module) and inputs is not None:
        return [Scene(type(model).__name__, model, dict(inputs))]
    if callable(model) and not isinstance(model, nn.Module):
        made = model()
        found = made if isinstance(made, tuple) else (made, None)
        return cast(interface, found[0], found[1]) if found[1] is not None else [_built(found[0])]
    return [_built(model)]


def _of_types(interface: Interface) -> list[Scene]:
    """Scenes of every model type that can be built; ConfigError if none can."""
    scenes: list[Scene] = []
    refused: ConfigError | None = None
    for kind in interface.model_type or ():
        try:
            scenes += of_type(interface, kind)
        except ConfigError as error:
            refused = refused or error
    if not scenes and refused is not None:
        raise refused
    return scenes


def _built(source: Any) -> Scene:
    made = tiny.build(source)
    name = source if isinstance(source, str) else type(made.model).__name__
    return Scene(name, made.model, made.inputs)


def of_type(interface: Interface, kind: str) -> Iterator[Scene]:
    """Scenes of one model type of an interface.

    They are the base class, classes that the interface or its heads speak of, and configs that its `when`s
    ask for.
    """
    config = tiny.config_of(kind)
    base = tiny.build(config)
    yield Scene(type(base.model).__name__, base.model, base.inputs)
    small = base.model.config
    for cls in _classes(interface, base.model):
        with suppress(Exception):  # classes that nothing is known of
            made = tiny.instance(cls, small)
            yield Scene(cls.__name__, made, drawing.draw(made))
    for settings in _conditions(interface):
        with suppress(Exception):  # values that the class does not take
            yield _under(settings, type(base.model), small, base.inputs)


def _classes(interface: Interface, model: nn.Module) -> list[type[nn.Module]]:
    """Further classes of a model type: those that `present_in` names, and one with a vocabulary."""
    module = importlib.import_module(type(model).__module__)
    public = [getattr(module, name, None) for name in getattr(module, "__all__", ())]
    classes = [
        cls
        for cls in public
        if isinstance(cls, type)
        and issubclass(cls, nn.Module)
        and cls is not type(model)
        and getattr(cls, "config_class", None) is type(model.config)
    ]
    named = {name for stack in interface.stacks.values() for name in stack.present_in or ()}
    found = [cls for cls in classes if cls.__name__ in named]
    if any(stack.unembed is not None for stack in interface.stacks.values()):
        speaking = [cls for cls in classes if cls not in found and _has_vocabulary(cls)]
        found += speaking[:1]
    return found


def _has_vocabulary(cls: type[nn.Module]) -> bool:
    return cls.__name__.endswith(("ForMaskedLM", "ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))


def _conditions(interface: Interface) -> list[dict[str, Any]]:
    """Every `when` of an interface, wherever it stands, once."""
    found: list[dict[str, Any]] = []

    def walk(value: Any) -> None:
        when = getattr(value, "when", None)
        if when and dict(when) not in found:
            found.append(dict(when))
        if isinstance(value, Stack | Sublayer) or hasattr(value, "model_fields_set"):
            for name in type(value).model_fields:
                walk(getattr(value, name))
        elif isinstance(value, Mapping):
            for item in value.values():
                walk(item)
        elif isinstance(value, tuple | list):
            for item in value:
                walk(item)

    walk(interface.stacks)
    return found


def _under(settings: dict[str, Any], cls: type[nn.Module], config: Any, inputs: Mapping[str, Any]) -> Scene:
    """A model whose config says this."""
    changed = type(config).from_dict(config.to_dict())
    before = {name: getattr(config, name) for name in settings}
    if before == settings:
        raise AdapterkitError(Problem("no-such-model", "it says so already"))
    given = dict(inputs)
    for name, value in settings.items():
        setattr(changed, name, value)
    if settings.get(_CROSSED):
        # states are read by decoders alone; where a family is always one, the word does nothing
        changed.is_decoder = True
        width = changed.hidden_size
        rows = next(iter(given.values())).shape[0]
        generator = torch.Generator().manual_seed(0)
        given["encoder_hidden_states"] = torch.randn(rows, SEQ, width, generator=generator)
        given["encoder_attention_mask"] = torch.ones(rows, SEQ, dtype=torch.long)
    model = tiny.instance(cls, changed)
    drawing.run(model, given)
    what = ", ".join(f"{name}: {value}" for name, value in settings.items())
    return Scene(f"{cls.__name__} with {what}", model, given)
