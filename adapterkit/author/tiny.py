"""A tiny instance of any model: random weights, seeded, no files and no network, with inputs that it runs on.

model, inputs = tiny.build("some_type")            # its base class, from the default config
model, inputs = tiny.build(config)                 # a config, a directory, a config.json
model, inputs = tiny.build("package.module:make")  # a function that gives any nn.Module
"""

from __future__ import annotations

import copy
import importlib
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from adapterkit.author import inputs as drawing
from adapterkit.author.shrink import WAYS, Shrinker, names
from adapterkit.errors import ConfigError, Problem, did_you_mean
from adapterkit.spec import registry
from adapterkit.spec.making import Drawn
from adapterkit.spec.making import Tiny as Said

PARAMETERS = 40_000_000
"""What is larger than this after shrinking is not built."""
SPREAD, SHIFT = 0.15, 0.05
_FACTORY = "let the function give the module and a dict of its inputs"


class Tiny(NamedTuple):
    """A model in eval mode, and arguments of its forward by name."""

    model: nn.Module
    inputs: dict[str, Any]


def build(
    source: Any,
    cls: type[nn.Module] | str | None = None,
    *,
    seed: int = 0,
    given: Mapping[str, Any] | None = None,
) -> Tiny:
    """A tiny instance of `source`, always the same for the same seed.

    Args:
        source: a model type; a config; a directory with config.json, or such a file; `module:function` that
            gives a module, or a module with its inputs; a module: taken as it is, unless it has a config.
        cls: a class of transformers, or its name; default: the base model of the type.
        given: arguments of the forward that are known; the others are found by trying.
    Raises: ConfigError: there is no such model, no way of shrinking fits it, or no inputs run.
    """
    if isinstance(source, str) and ":" in source:
        return _made(source, seed, given)
    if isinstance(source, nn.Module):
        config = getattr(source, "config", None)
        if not hasattr(config, "model_type"):
            return _drawn(source, seed, given, str(type(source).__name__))
        return build(config, cls or type(source), seed=seed, given=given)
    config = config_of(source)
    wanted = class_of(config, cls)
    said = _said(config)
    given = {**drawn(said.inputs, seed), **(given or {})}
    reasons: list[str] = []
    text_only: Tiny | None = None
    for way in WAYS:
        if text_only is not None and not way.equal:
            continue
        try:
            model = instance(wanted, Shrinker(config, way).shrink(config, said.config), seed)
            found = Tiny(model, drawing.draw(model, seed, given))
            if not drawing.is_blind(*found):
                return found
            # the widths of a default config's towers may be at odds, so that only its text runs
            text_only = text_only or found
        except drawing.NotRunning as error:
            reasons.append(error.reasons[0] if error.reasons else str(error))
        except Exception as error:  # constructors of transformers raise anything
            reasons.append(f"{type(error).__name__}: {error}")
    if text_only is not None:
        return text_only
    raise _refused(config.model_type, "; ".join(dict.fromkeys(map(_short, reasons))))


def _said(config: Any) -> Said:
    """What a known interface says of tiny models of this type.

    Raises: ConfigError: it speaks of a field that the config has not.
    """
    if config.model_type not in registry.model_types():
        return Said()
    said = registry.by_name(config.model_type).tiny.get(config.model_type, Said())
    unknown = [name for name in said.config if name not in names(config)]
    if unknown:
        hint = did_you_mean(unknown[0], names(config))
        message = f"'tiny' of its interface names {unknown[0]!r}, which is no field of its config"
        raise ConfigError(Problem("unknown-config-field", message, config.model_type, hint=hint))
    return said


def drawn(inputs: Mapping[str, Drawn | None], seed: int = 0) -> dict[str, torch.Tensor | None]:
    """Arguments as an interface says them."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, torch.Tensor | None] = {}
    for name, one in inputs.items():
        if one is None:
            found[name] = None
        elif one.shape is None:
            found[name] = torch.tensor(one.values)
        elif one.below is not None:
            found[name] = torch.randint(one.below, one.shape, generator=generator)
        else:
            found[name] = torch.randn(one.shape, generator=generator)
    return found


def config_of(source: Any) -> Any:
    """The config that `source` means: itself, one that is read, or the default one of a model type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if hasattr(source, "model_type"):
        return source
    path = Path(source)
    if (path / "config.json").is_file() or path.is_file() or source not in CONFIG_MAPPING:
        return _read(source)
    known = registry.by_name(source).tiny if source in registry.model_types() else {}
    needed = {n: v for n, v in known.get(source, Said()).config.items() if isinstance(v, Mapping)}
    kind: Any = CONFIG_MAPPING[source]
    try:
        return kind(**copy.deepcopy(needed))
    except Exception as error:  # some configs need arguments
        raise _refused(str(source), f"it has no default config: {_short(str(error))}") from error


def _read(source: str | Path) -> Any:
    """The config of a directory, a file, or a hub id in the local cache."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        return AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # not there, not readable, of an unknown type, needs code of its own
        found = Path(source).exists()
        why = _short(str(error)) if found else "there is none of this name"
        raise _refused(
            str(source), why, "" if found else did_you_mean(str(source), CONFIG_MAPPING)
        ) from error


def class_of(config: Any, cls: type[nn.Module] | str | None = None) -> Any:
    """The class that is meant: the named one, else the base model of the config's type."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    if cls is not None and not isinstance(cls, str):
        return cls
    found = getattr(transformers, cls, None) if cls else MODEL_MAPPING.get(type(config), None)
    if isinstance(found, tuple):
        found = found[0]
    if found is None and cls is None:
        found = _class_beside(type(config))
    if found is None:
        raise _refused(config.model_type, f"transformers has no {cls or 'base model'} of this type")
    return found


def _class_beside(config: type) -> Any:
    """The plainest model of a config that AutoModel does not know, from the module beside it."""
    try:
        module = importlib.import_module(config.__module__.replace(".configuration_", ".modeling_"))
    except ImportError:
        return None
    classes = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, nn.Module)]
    own = [c for c in classes if c.__dict__.get("config_class", getattr(c, "config_class", None)) is config]
    own = [c for c in own if not c.__name__.endswith("PreTrainedModel")]
    return min(own, key=lambda c: (not c.__name__.endswith("Model"), len(c.__name__)), default=None)


def instance(cls: Any, config: Any, seed: int = 0) -> nn.Module:
    """A model in eval mode whose weights the seed decides, large enough for attention to be uneven.

    Raises: ValueError: it would not be tiny.
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        size = _size(cls, config)
        if size is not None and size > PARAMETERS:
            raise ValueError(f"{size:,} parameters after shrinking")
        make = getattr(cls, "_from_config", cls)
        model: nn.Module = make(copy.deepcopy(config))
    redraw(model, seed)
    return model.float().eval()


def _size(cls: Any, config: Any) -> int | None:
    """Number of parameters, None if the class cannot tell without building."""
    try:
        with torch.device("meta"):
            return int(sum(p.numel() for p in cls(copy.deepcopy(config)).parameters()))
    except Exception:  # constructors that read their own weights
        return None


@torch.no_grad()
def redraw(model: nn.Module, seed: int) -> None:
    """Draw every matrix anew, and move biases and norms a little: nothing is zero or one by chance."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * SPREAD if parameter.dim() > 1 else parameter + noise * SHIFT)


def _made(source: str, seed: int, given: Mapping[str, Any] | None) -> Tiny:
    """What a factory gives: a module, or a module and its inputs."""
    model, inputs = from_factory(source, seed)
    if inputs is None:
        return _drawn(model, seed, given, source)
    if not isinstance(inputs, Mapping):
        raise _refused(source, f"beside the module it gives {type(inputs).__name__}", _FACTORY)
    found = Tiny(model.eval(), {**inputs, **(given or {})})
    try:
        drawing.run(*found)
    except Exception as error:  # models raise anything on what does not fit
        raise _refused(source, f"it does not run on its inputs: {_told(error)}", _FACTORY) from error
    return found


def from_factory(source: str, seed: int = 0) -> tuple[nn.Module, Any]:
    """The module that `module:function` gives, and what it gives beside it, None if that is all.

    Raises: ConfigError: there is no such function, it fails, or gives something else.
    """
    module, _, name = source.partition(":")
    try:
        factory: Callable[[], Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise _refused(source, f"it cannot be imported: {error}") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            made = factory()
        except Exception as error:  # code of others
            why = f"it is called without arguments, and raises {_told(error)}"
            raise _refused(source, why, _FACTORY) from error
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise _refused(source, f"it gives {type(model).__name__}, not a module", _FACTORY)
    return model, inputs


def _drawn(model: nn.Module, seed: int, given: Mapping[str, Any] | None, name: str) -> Tiny:
    try:
        return Tiny(model.eval(), drawing.draw(model, seed, given))
    except drawing.NotRunning as error:
        why = f"no inputs were found that it runs on: {_short(str(error))}"
        raise _refused(name, why, _FACTORY) from error


def _told(error: Exception) -> str:
    """An error of other code, and its line."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {_short(str(error))} ({Path(place.filename).name}:{place.lineno})"


def _short(text: str) -> str:
    return " ".join(text.split())[:200]


def _refused(name: str, why: str, hint: str = "") -> ConfigError:
    expected = "a model type, a config or its directory, or module:function"
    return ConfigError(Problem("no-such-model", f"model {name!r}: {why}", expected=expected, hint=hint))
