"""Which format a source is in, and its contents: directories, hub ids, full checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapterkit.errors import FileFormatError, Problem, listing
from adapterkit.files import adapterhub, kinship, manifest, native, peft, setups
from adapterkit.files.content import Bundle, Content
from adapterkit.files.disk import read_json, read_tensors
from adapterkit.inject.state import is_manifest, slug, strip
from adapterkit.methods.fusion import FusionConfig
from adapterkit.model.blueprint import Blueprint

_CHECKPOINTS = ("model.safetensors", "pytorch_model.bin")
_INDEX = "model.safetensors.index.json"
# everything that one of the formats needs; nothing else is fetched from a hub
_PATTERNS = ["*.json", "*.safetensors", "*.bin"]


def locate(source: str | Path, revision: str | None, local_files_only: bool) -> Path:
    """A local directory, or the snapshot of a hub id in huggingface_hub's cache.

    Raises: FileFormatError: neither exists, or it is a file.
    """
    path = Path(source)
    if path.is_dir() and str(source).strip():
        return path
    if path.exists():
        message = "is a file; what it says is read together with what lies beside it"
        raise FileFormatError(Problem("not-found", message, expected="its directory", file=str(path)))
    name = str(source)
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or not name.strip():
        raise FileFormatError(Problem("not-found", "there is no such directory", file=name))
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            name, revision=revision, local_files_only=local_files_only, allow_patterns=_PATTERNS
        )
    except Exception as error:
        # a missing repository, a missing revision, no network, an empty cache: one sentence says which
        first = str(error).strip().splitlines()
        message = (
            f"no directory, and no hub id that can be had: {first[0] if first else type(error).__name__}"
        )
        raise FileFormatError(Problem("not-found", message, file=name)) from error
    return Path(found)


_KINDS = {
    setups.CONFIG: "setup",
    adapterhub.SETUP_CONFIG: "adapterhub_setup",
    native.CONFIG: "",
    adapterhub.FUSION_CONFIG: "adapterhub_fusion",
    **dict.fromkeys((*_CHECKPOINTS, _INDEX), "checkpoint"),
}
"""File by which a directory is known -> its format; '' where the file itself has to be looked into."""


def refuse_hidden(directory: Path) -> None:
    """Refuse to write an adapter beside what would be read in its place.

    Raises: FileFormatError.
    """
    for name in _KINDS:
        if name == native.CONFIG:
            return
        if (directory / name).is_file():
            message = f"holds {name}, which would be read in place of an adapter that is written there"
            raise FileFormatError(Problem("bad-file", message, file=str(directory)))


def kind(directory: Path) -> str:
    """Format of a directory: native, adapterhub, peft, checkpoint, or what else `_KINDS` has.

    Raises: FileFormatError: it is none of them.
    """
    for name, found in _KINDS.items():
        if (directory / name).is_file():
            return found or _format(directory / name)
    names = listing(sorted(entry.name for entry in directory.iterdir()))
    message = f"holds no {native.CONFIG} and no checkpoint"
    raise FileFormatError(
        Problem("unknown-format", message, expected=f"files there: {names}", file=str(directory))
    )


def _format(config: Path) -> str:
    """Format of an adapter by its config."""
    data = read_json(config)
    if data.get("format") == "adapterkit":
        return "native"
    if "peft_type" in data:
        return "peft"
    if adapterhub.recognises(data):
        return "adapterhub"
    known = "'format': 'adapterkit', or a config of AdapterHub or PEFT"
    raise FileFormatError(
        Problem("unknown-format", "no format that is known", expected=known, file=str(config))
    )


def read(
    source: str | Path, blueprint: Blueprint, *, revision: str | None, local_files_only: bool, allow_bin: bool
) -> Bundle:
    """Everything that a source holds, in the words of adapterkit.

    Raises: FileFormatError.
    """
    directory = locate(source, revision, local_files_only)
    match kind(directory):
        case "setup":
            return setups.read(directory)
        case "adapterhub_setup":
            return adapterhub.read_setup(directory, blueprint, allow_bin)
        case "adapterhub_fusion":
            return Bundle((adapterhub.read_fusion(directory, blueprint, allow_bin),))
        case "adapterhub":
            return Bundle((adapterhub.read(directory, blueprint, allow_bin),))
        case "native":
            return Bundle((native.read(directory),))
        case "peft":
            return Bundle((peft.read(directory, blueprint, allow_bin),))
    tensors = _checkpoint_tensors(directory, allow_bin)
    return Bundle(tuple(checkpoint(tensors, str(directory))))


def _checkpoint_tensors(directory: Path, allow_bin: bool) -> dict[str, torch.Tensor]:
    """All tensors of a full checkpoint, from one file or several."""
    index = directory / _INDEX
    if index.is_file():
        listed = read_json(index).get("weight_map")
        files = listed.values() if isinstance(listed, dict) else (listed,)
        tensors: dict[str, torch.Tensor] = {}
        for name in sorted(set(map(str, files))):
            if Path(name).name != name:
                raise FileFormatError(
                    Problem("bad-file", f"names a file elsewhere: {name!r}", file=str(index))
                )
            tensors |= read_tensors(directory / name, allow_bin)
        return tensors
    file = next(directory / name for name in _CHECKPOINTS if (directory / name).is_file())
    return read_tensors(file, allow_bin)


def checkpoint(tensors: Mapping[str, torch.Tensor], source: str) -> list[Content]:
    """The adapters in a full checkpoint, by their manifests.

    Raises: FileFormatError: there are none.
    """
    parts = strip(tensors)
    contents = []
    for key in sorted(part for part in parts if is_manifest(part)):
        data = manifest.read(parts[key], source)
        own: dict[str, torch.Tensor] = {}
        for address, prefix in _addresses(data).items():
            for part, value in parts.items():
                if part.startswith(f"{prefix}."):
                    own[f"{address}.{part.removeprefix(f'{prefix}.')}"] = value
        for other in data.get("shares", ()):
            # a tensor that several adapters have in common may be there once
            for address in (*data["slots"], "shared"):
                prefix = slug(str(other), address)
                for part, value in parts.items():
                    if part.startswith(f"{prefix}."):
                        own.setdefault(f"{address}.{part.removeprefix(f'{prefix}.')}", value)
        contents.append(native.to_content(data, own, source))
    if not contents:
        raise FileFormatError(
            Problem("no-adapter", "the checkpoint holds no adapter of adapterkit", file=source)
        )
    # a fusion is put between adapters that are there already
    return sorted(contents, key=lambda content: isinstance(content.config, FusionConfig))


def _addresses(data: Mapping[str, Any]) -> dict[str, str]:
    """Address -> what its tensors are called in a state dict."""
    addresses = [
        *data["slots"],
        "shared",
        *(f"head.{path}" for path in data["heads"]),
        *data.get("poolers", ()),
    ]
    return {address: slug(str(data["name"]), address) for address in addresses}


def interface_for(
    source: str | Path, given: Any, revision: str | None, local_files_only: bool, model: nn.Module
) -> Any:
    """The interface that travels in a file, where none was given and the file's is no shipped one.

    Raises: FileFormatError: it is one for models of other types.
    """
    if given is not None:
        return given
    directory = locate(source, revision, local_files_only)
    config = directory / native.CONFIG
    if (directory / setups.CONFIG).is_file():  # each of its adapters says the same
        config = next(iter(sorted(directory.glob(f"*/{native.CONFIG}"))), config)
    if config.is_file():
        return _interface(read_json(config), model, str(config))
    if any((directory / name).is_file() for name in (_CHECKPOINTS[0], _INDEX)):
        parts = strip(_checkpoint_tensors(directory, allow_bin=False))
        for key in sorted(part for part in parts if is_manifest(part)):
            return _interface(manifest.read(parts[key], str(directory)), model, str(directory))
    return None


def _interface(data: Mapping[str, Any], model: nn.Module, file: str) -> dict[str, Any] | None:
    """The interface that a config holds in full.

    Raises: FileFormatError: it holds something else in its place, or one for models of other types.
    """
    said = data.get("interface")
    spec = said.get("spec") if isinstance(said, dict) else None
    if spec is not None and not isinstance(spec, dict):
        raise FileFormatError(Problem("bad-file", "'spec' is no interface", "interface", file=file))
    if spec is not None:
        kinship.check_travelled(data, model, file)
    return spec
