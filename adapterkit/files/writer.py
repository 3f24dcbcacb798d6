"""Writing adapters and setups in the formats that there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from adapterkit.adapter import Adapter
from adapterkit.composition import names
from adapterkit.errors import ConfigError, Problem
from adapterkit.files import adapterhub, native, peft, reader, setups
from adapterkit.files.content import Bundle
from adapterkit.files.present import refuse_parted, refuse_unwritable
from adapterkit.methods.fusion import FusionConfig
from adapterkit.model.blueprint import Blueprint

Format = Literal["adapterkit", "adapterhub", "peft"]


def write(
    directory: Path,
    adapter: Adapter,
    adapters: Mapping[str, Adapter],
    blueprint: Blueprint,
    head: bool | str,
    format: str,
) -> Path:
    """Write one adapter. Args: adapters: all of the model, which a fusion needs.

    Raises: ConfigError: there is no such format. FileFormatError: it has no words for the adapter, or that is
        sharded or quantised.
    """
    _refuse_unwritable(adapter)
    reader.refuse_hidden(directory)
    if format == "peft":
        return peft.write(directory, adapter, blueprint, head)
    if format == "adapterhub":
        if isinstance(adapter.config, FusionConfig):
            adapterhub.write_fusion(directory, adapter, adapters, blueprint)
        else:
            adapterhub.write(directory, adapter, blueprint, head)
        return directory
    if format == "adapterkit":
        return native.write(directory, adapter, blueprint, head)
    raise ConfigError(Problem("bad-option", f"{format!r} is no format that can be written", "format"))


def write_setup(
    directory: Path,
    bundle: Bundle,
    adapters: Mapping[str, Adapter],
    shared: Sequence[tuple[str, ...]],
    blueprint: Blueprint,
    head: bool | str,
    format: str,
) -> Path:
    """Write a setup with its adapters, see `setups.asked` for the formats that have any."""
    for name in names(bundle.setup):
        _refuse_unwritable(adapters[name])
    write = adapterhub.write_setup if format == "adapterhub" else setups.write
    return write(directory, bundle, adapters, shared, blueprint, head)


def _refuse_unwritable(adapter: Adapter) -> None:
    for address, module in adapter.modules().items():
        refuse_parted(module, address)
        refuse_unwritable({f"{address}.{name}": value for name, value in module.state_dict().items()})
