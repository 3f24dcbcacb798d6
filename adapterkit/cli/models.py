"""MODEL of the command line -> a model: of transformers' classes modules and shapes alone, and no network."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.errors import ConfigError, Problem, did_you_mean

if TYPE_CHECKING:
    from torch import nn

_EXPECTED = "a directory with config.json, a model type, a hub id in the local cache, or module:function"


def see_here() -> None:
    """Let modules in the working directory be imported, as with `python -m`."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)


def named(name: str) -> nn.Module:
    """The model that `name` means; of transformers' classes one on the meta device.

    Args: name: a directory with config.json or a hub id in the cache gives the class that the config names;
        a model type gives its base model with the default config; `module:function` what the function gives.
    Raises: ConfigError: there is no such model, or it cannot be built.
    """
    if ":" in name and not Path(name).exists():
        from adapterkit.author.tiny import from_factory

        see_here()
        return from_factory(name)[0]
    import torch
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    folder = Path(name)
    # a file or folder of this name that is no model does not hide the model type
    known = not (folder / "config.json").is_file() and name in CONFIG_MAPPING
    config = _default(name) if known else _configured(name)
    cls = _class(config)
    if cls is None:
        raise _refused(name, "transformers has no base model of this type; its config must name a class")
    try:
        with torch.device("meta"):
            return cls._from_config(config)  # type: ignore[no-any-return]
    except Exception as error:  # constructors of transformers raise anything
        raise _refused(name, f"transformers cannot build it: {_first_line(error)}") from error


def _default(model_type: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[model_type]()
    except Exception as error:  # some configs need arguments
        raise _refused(model_type, "it has no default config") from error


def _configured(name: str) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        return AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # not there, not readable, needs code of its own
        hint = did_you_mean(name, CONFIG_MAPPING)
        raise _refused(
            name, _first_line(error) if Path(name).exists() else "there is none of this name", hint
        ) from error


def _class(config: Any) -> Any:
    """The class that the config names, else the base model of its type, None if there is none."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type):
            return found
    found = MODEL_MAPPING.get(type(config), None)
    return found[0] if isinstance(found, tuple) else found


def _refused(name: str, why: str, hint: str = "") -> ConfigError:
    return ConfigError(Problem("no-such-model", f"model {name!r}: {why}", expected=_EXPECTED, hint=hint))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
