"""One recorded case in this version of transformers: load its files, run its inputs, compare."""

from __future__ import annotations

import copy
import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adapterkit as ak
from tests.parity.recordings import Case

TOLERANCE = 1e-4
"""Absolute; outputs are of order 1 to 10."""
NESTED = ("text_model_output", "vision_model_output")


@dataclass(frozen=True)
class Result:
    """What became of a case: `agree`, `refused` with a code, or `wrong` with the largest difference."""

    status: str
    code: str = ""
    worst: float = 0.0
    where: str = ""


def run(case: Case, work: Path) -> Result:
    """Load a case's adapter and compare its outputs; merge it and compare again where the recorder did."""
    said = case.said()
    model = base(case, said["attn"])
    try:
        kit = loaded(case, model, work)
        kit.activate(setup_of(said.get("setup", "a")))
    except (ak.errors.FileFormatError, ak.errors.CompositionError) as error:
        return Result("refused", error.code)
    expected = load_file(case.directory / "expected.safetensors")
    if said.get("merge"):
        worst = max([*differences(case, model, expected)])
        if not _agrees(case, model, expected, *worst):
            return Result("wrong", "", *worst)
        kit.merge("a")
        worst = max([*differences(case, model, expected), *merged(model, expected)])
    else:
        worst = max(differences(case, model, expected))
    return Result("agree" if _agrees(case, model, expected, *worst) else "wrong", "", *worst)


def _agrees(case: Case, model: nn.Module, expected: Mapping[str, Tensor], off: float, name: str) -> bool:
    """Whether a difference is small, or no larger than what float32 does to this very model.

    Some of the random models multiply rounding errors, or have outputs of some thousands. There the recorded
    numbers have to be as near to the float64 numbers as our own float32 numbers are.
    """
    if off <= TOLERANCE:
        return True
    inputs = load_file(case.base / "inputs.safetensors")
    if not math.isfinite(off) or name not in expected or name.startswith("merged/"):
        return False
    exact = copy.deepcopy(model).double()
    wide = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    with torch.no_grad():
        real, ours = outputs(exact(**wide))[name], outputs(model(**inputs))[name]
    return _largest(expected[name] - real, inputs) <= 2 * _largest(ours - real, inputs)


def loaded(case: Case, model: nn.Module, work: Path) -> ak.Kit:
    """A model with all adapters and fusions of a case."""
    options: dict[str, Any] = {"head": False, "allow_bin": True, "activate": False}
    for name in sorted(path.name for path in (case.directory / "adapters").iterdir()):
        kit = ak.load(model, adapter_directory(case, work, name), name=name, **options)
    if (case.directory / "fusions").is_dir():
        for path in sorted((case.directory / "fusions").iterdir()):
            ak.load(model, path, **options)
    return kit


def setup_of(said: Any) -> Any:
    """A setup of ours for what a case says."""
    if isinstance(said, str):
        return said
    children = [setup_of(child) for child in said["children"]]
    options = {key: value for key, value in said.items() if key not in ("type", "children")}
    return getattr(ak, said["type"])(*children, **options)


def base(case: Case, attn: str) -> nn.Module:
    """The recorded base model."""
    cls: Any = getattr(transformers, case.cls)
    model: nn.Module = cls.from_pretrained(case.base, attn_implementation=attn)
    return model.eval()


def adapter_directory(case: Case, work: Path, name: str = "a") -> Path:
    """An adapter directory of a case, with the tensors that `save_adapter` left out where there are any.

    From a base model class it does not save what VeRA and Compacter share, and then the numbers are not in
    the files. Nor does it write the option that makes a DiReFT of a NoReFT; it is written here.
    """
    directory = case.directory / "adapters" / name
    extra = case.directory / "extra_params.safetensors"
    is_direft = case.name.startswith("direft")
    if not extra.exists() and not is_direft:
        return directory
    copied = Path(tempfile.mkdtemp(dir=work)) / name
    shutil.copytree(directory, copied)
    if is_direft:
        path = copied / "adapter_config.json"
        said = json.loads(path.read_text(encoding="utf-8"))
        said["config"]["subtract_projection"] = False
        path.write_text(json.dumps(said), encoding="utf-8")
    if not extra.exists():
        return copied
    tensors = stored(copied)
    (copied / "pytorch_adapter.bin").unlink(missing_ok=True)
    save_file({**tensors, **load_file(extra)}, copied / "adapter.safetensors")
    return copied


def stored(directory: Path) -> dict[str, Tensor]:
    """The tensors of an adapter directory, each with memory of its own."""
    file = directory / "adapter.safetensors"
    if not file.exists():
        found = torch.load(directory / "pytorch_adapter.bin", weights_only=True)
        return {key: value.contiguous().clone() for key, value in found.items()}
    return dict(load_file(file))


def outputs(result: Mapping[str, Any]) -> dict[str, Tensor]:
    """All plain tensors of an output by name; those of nested outputs after a dot."""
    found = {}
    for name, value in result.items():
        if isinstance(value, Tensor):
            found[name] = value
        elif name in NESTED:
            found |= {f"{name}.{inner}": tensor for inner, tensor in outputs(value).items()}
    return found


def differences(case: Case, model: nn.Module, expected: Mapping[str, Tensor]) -> Iterator[tuple[float, str]]:
    """(largest absolute difference, name) of every recorded output."""
    inputs = load_file(case.base / "inputs.safetensors")
    with torch.no_grad():
        found = outputs(model(**inputs))
    for name, want in expected.items():
        if name.startswith("merged/"):
            continue
        if name.endswith(".pooler_output") and name.partition(".")[0] in NESTED:
            continue  # newer versions give another tensor under this name
        if name not in found or found[name].shape != want.shape:
            yield float("inf"), name
            continue
        yield _largest(found[name] - want, inputs), name


def _largest(difference: Tensor, inputs: Mapping[str, Tensor]) -> float:
    """The largest of the differences that mean something: a padded query on the left attends to nothing."""
    off, mask = difference.abs(), inputs.get("attention_mask")
    if mask is not None and off.shape[:2] == mask.shape:
        off = off[mask.bool()]
    return off.max().item()


def merged(model: nn.Module, expected: Mapping[str, Tensor]) -> Iterator[tuple[float, str]]:
    """(largest absolute difference, name) of every weight that the recorder's merge changed."""
    here = dict(model.named_parameters())
    for name, want in expected.items():
        if name.startswith("merged/"):
            yield (here[name.removeprefix("merged/")] - want).abs().max().item(), name
