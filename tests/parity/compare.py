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
from adapterkit.files.adapterhub.places import left_out
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
    except (ak.errors.FileFormatError, ak.errors.CompositionError) as error:
        return Result("refused", error.code)
    expected = load_file(case.directory / "expected.safetensors")
    if said.get("merge"):
        worst = max([*differences(case, model, expected)])
        if not _agrees(case, model, expected, *worst):
            return Result("wrong", "", *worst)
        try:
            kit.merge("a")
        except ak.errors.PlanError as error:
            return Result("refused", error.code)
        worst = max([*differences(case, model, expected), *merged(case, model, expected)])
    else:
        worst = max(differences(case, model, expected))
    return Result("agree" if _agrees(case, model, expected, *worst) else "wrong", "", *worst)


def _agrees(case: Case, model: nn.Module, expected: Mapping[str, Tensor], off: float, name: str) -> bool:
    """Whether a difference is small, or one that rounding makes, too.

    Some of the random models multiply rounding errors, or have outputs of some thousands. There the recorded
    numbers have to be as near to the float64 numbers as twice our float32 numbers are, or as the float64
    numbers of weights with other last digits.
    """
    if off <= TOLERANCE:
        return True
    inputs = given(case)
    if not math.isfinite(off) or name not in expected or name.startswith("merged/"):
        return False
    wide = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}

    def exact(seed: int | None) -> Tensor:
        copied, generator = copy.deepcopy(model).double(), torch.Generator().manual_seed(seed or 0)
        with torch.no_grad():
            for parameter in copied.parameters() if seed is not None else ():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.mul_(1 + 2**-24 * noise)
            return outputs(called(case, copied, wide))[name]

    with torch.no_grad():
        ours = outputs(called(case, model, inputs))[name]
    real = exact(None)
    rounding = 2 * _largest(ours - real, inputs)
    rounding = max(rounding, *(_largest(exact(seed) - real, inputs) for seed in range(4)))
    return _largest(expected[name] - real, inputs) <= rounding


def loaded(case: Case, model: nn.Module, work: Path) -> ak.Kit:
    """A model with all adapters and fusions of a case, active as it says."""
    said = case.said()
    options: dict[str, Any] = {"head": False, "allow_bin": True}
    setup, skipped = said.get("setup", "a"), said.get("skip_layers", ())
    if "average" in said and (kit := averaged(case, model, work, options)):
        return kit
    if isinstance(setup, dict):
        kit = ak.load(model, setup_directory(case, work, setup), **options)
    else:
        kit = ak.load(model, adapter_directory(case, work, setup), name=setup, **options)
    if skipped:
        kit.activate(kit.active, skip_layers=left_out(kit.blueprint, skipped))
    return kit


def averaged(case: Case, model: nn.Module, work: Path, options: dict[str, Any]) -> ak.Kit | None:
    """A model with the average of a case; None if ours means another thing, and its file has to be read.

    Their `linear` averages tensors. Of low-rank updates ours does so under the name `negate_b`, but does not
    turn the sign of both factors.
    """
    asked = case.said()["average"]
    names = asked["adapter_list"]
    weights = dict(zip(names, asked.get("weights") or [1.0] * len(names), strict=True))
    linear = asked.get("combine_strategy", "linear") == "linear"
    if linear and min(weights.values()) < 0:
        return None
    for name in names:
        kit = ak.load(model, adapter_directory(case, work, name), name=name, **options)
    config = kit[names[0]].config
    factors = {member.method for member in getattr(config, "configs", (config,))} & {"lora", "vera"}
    kit.average(
        weights,
        name="merged",
        strategy="negate_b" if factors or not linear else "linear",
        normalize=asked.get("normalize_weights", True),
        activate=True,
    )
    return kit


def setup_directory(case: Case, work: Path, setup: dict[str, Any]) -> Path:
    """A case as their `save_adapter_setup` writes it."""
    directory = Path(tempfile.mkdtemp(dir=work))
    data = {"adapter_setup": in_their_words(setup), "head_setup": None, "version": "adapters.1.3.0"}
    (directory / "adapter_setup.json").write_text(json.dumps(data), encoding="utf-8")
    for path in (case.directory / "adapters").iterdir():
        (directory / path.name).symlink_to(adapter_directory(case, work, path.name))
    fusions = case.directory / "fusions"
    for path in fusions.iterdir() if fusions.is_dir() else ():
        (directory / path.name.replace("+", ",")).symlink_to(path)
    return directory


def in_their_words(setup: Any) -> dict[str, Any]:
    """A setup of case.json as their `to_dict` gives it."""
    if isinstance(setup, str):
        return {"type": "single", "children": [setup]}
    options = {key: value for key, value in setup.items() if key not in ("type", "children")}
    children = [in_their_words(child) for child in setup["children"]]
    return {"type": setup["type"], "children": children} | ({"kwargs": options} if options else {})


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
    extra = case.directory / f"extra_params{'_merged' if name == 'merged' else ''}.safetensors"
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
    more = {key: value for key, value in load_file(extra).items() if f".{name}." in f".{key}."}
    save_file({**tensors, **more}, copied / "adapter.safetensors")
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
    inputs = given(case)
    with torch.no_grad():
        found = outputs(called(case, model, inputs))
    for name, want in expected.items():
        if name.startswith("merged/"):
            continue
        if name.endswith(".pooler_output") and name.partition(".")[0] in NESTED:
            continue  # newer versions give another tensor under this name
        if name not in found or found[name].shape != want.shape:
            yield float("inf"), name
            continue
        yield _largest(found[name] - want, inputs), name


def given(case: Case) -> dict[str, Tensor]:
    """The inputs of a case: its own, or those of all cases of the class."""
    own = case.directory / "inputs.safetensors"
    return dict(load_file(own if own.exists() else case.base / "inputs.safetensors"))


def called(case: Case, model: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
    """The outputs of a model, each example by the task that the case gives it."""
    kit, tasks = ak.of(model), case.said().get("task_ids")
    if tasks is None:
        return model(**inputs)
    with kit.using(kit.active, task_ids=tasks):
        return model(**inputs)


def _largest(difference: Tensor, inputs: Mapping[str, Tensor]) -> float:
    """The largest of the differences that mean something: a padded query on the left attends to nothing."""
    off, mask = difference.abs(), inputs.get("attention_mask")
    mask = None if mask is None else mask.cummax(dim=1).values
    if mask is not None and off.shape[0] > len(mask):
        mask = mask.repeat(off.shape[0] // len(mask), 1)  # examples are there once for each adapter
    if mask is not None and off.shape[:2] == mask.shape:
        off = off[mask.bool()]
    return off.max().item()


def merged(case: Case, model: nn.Module, expected: Mapping[str, Tensor]) -> Iterator[tuple[float, str]]:
    """(largest absolute difference, name) of every weight that the recorder's merge changed."""
    here, renamed = dict(model.named_parameters()), {}
    for name, want in expected.items():
        if name.startswith("merged/"):
            own = name.removeprefix("merged/")
            if own not in here:  # newer versions have other names for it, and read it from the old ones
                renamed = renamed or _renamed(case)
                own = renamed[own]
            yield (here[own] - want).abs().max().item(), name


def _renamed(case: Case) -> dict[str, str]:
    """Name of each recorded weight -> that of the parameter into which it is loaded."""
    fresh, old = base(case, "eager").named_parameters(), load_file(case.base / "model.safetensors")
    places = {value.sum().item(): name for name, value in fresh}
    return {name: places[value.sum().item()] for name, value in old.items() if value.sum().item() in places}
