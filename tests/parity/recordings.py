"""What AdapterHub's `adapters` 1.3.0 computed on tiny random models, with transformers 4.57.6.

    <family>/<Class>/config.json, model.safetensors or weights.json (how they are drawn): the base model
                     inputs.safetensors
                     <case>/case.json, expected.safetensors, adapters/<name>/, extra_params.safetensors
    matrix.json      {family: {Class: {case: {status, suspect, ...}}}}

A family is a directory or an archive. `tests/parity/data` is a small part, packed by pack.py; the environment
variable ADAPTERKIT_GOLDENS names a directory with a whole recording, which is read in place of it.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.parity import weights

COMPACT = Path(__file__).parent / "data"
LORA = r"lora.*|ia3.*|vera.*|dora.*|dvora|merge_.*|mtl_lora_single"
BOTTLENECK = r"(double_)?seq_bn|(scaled_)?par_bn|par_bn_.*|bn_.*|adapterplus.*|compacter.*"
OTHERS = r"seq_bn_(inv.*|glow)|(lo|no|di)reft.*|union_.*"
PROMPT = r"prompt_.*"
PREFIX = r"mam|unipelt|prefix_.*"
UNNORMED = r"stack_mixed_cfg|adapterplus|bn_obT.*|bn_ob._oaF.*|bn_ln_both_resT|bn_gating|bn_rf_map_leave_out"
FUSE = r"fuse.*"
ALONE = re.compile("|".join((LORA, BOTTLENECK, OTHERS, PROMPT, PREFIX)))
"""Cases of one adapter each."""
SETUPS = r"(batch_)?split.*|stack.*|parallel.*|average.*|multi_task.*|mtl.*|skip_layers.*"
AVERAGED = r"avg_w_.*"
METHODS = re.compile(f"{ALONE.pattern}|{FUSE}|{SETUPS}|{AVERAGED}")
ABOUT = {
    "LoRA family": LORA,
    "bottleneck, Compacter": BOTTLENECK,
    "invertible, ReFT, unions": OTHERS,
    "prompt tuning": PROMPT,
    "prefix tuning, mam, unipelt": PREFIX,
    "fusion": FUSE,
    "other setups": SETUPS,
    "averages": AVERAGED,
}
"""What the cases are about -> their names."""


@dataclass(frozen=True)
class Case:
    """One adapter on one base model, and what came out."""

    root: Path
    family: str
    cls: str
    name: str

    @property
    def base(self) -> Path:
        """Directory of the base model, complete."""
        return base_directory(unpacked(self.root, self.family) / self.cls)

    @property
    def directory(self) -> Path:
        return self.base / self.name

    def said(self) -> dict[str, Any]:
        """The facts in case.json."""
        found: dict[str, Any] = json.loads((self.directory / "case.json").read_text(encoding="utf-8"))
        return found

    def __str__(self) -> str:
        return f"{self.family}-{self.cls}-{self.name}"


def root() -> Path:
    """The recording that the tests read."""
    return Path(os.environ.get("ADAPTERKIT_GOLDENS", COMPACT))


def cases(root: Path, pattern: re.Pattern[str] = METHODS) -> Iterator[Case]:
    """Cases whose numbers are to be reproduced: those that ran, and are not suspected of an accident."""
    matrix = json.loads((root / "matrix.json").read_text(encoding="utf-8"))
    for family, classes in matrix.items():
        for cls, results in classes.items():
            for name, result in results.items():
                if pattern.fullmatch(name) and result["status"] == "ok" and not result.get("suspect"):
                    yield Case(root, family, cls, name)


def refusal(case: Case) -> str | None:
    """The code that a case must be refused with; all others must agree."""
    if case.family == "xmod" and re.fullmatch(UNNORMED, case.name):
        return "not-reproducible"  # they leave out the norm of the sum, or that of the language adapters
    if re.fullmatch(PROMPT, case.name) and case.family in ("deberta", "deberta-v2", "distilbert"):
        return "not-reproducible"  # masks behind the place of the prompt, or prompts that attend to padding
    if case.family == "whisper" and case.name.startswith("seq_bn_inv"):
        return "not-reproducible"  # theirs is not behind the embeddings, but behind the whole encoder
    if case.name.endswith("_prefix_len"):
        return "not-reproducible"  # theirs lets every token attend to what it fills shorter prefixes up with
    if case.family == "encoder-decoder" and case.name == "stack_parallel":
        return "not-reproducible"  # theirs repeats the batch twice
    if case.family == "xmod" and re.fullmatch(FUSE, case.name):
        return "not-reproducible"  # the language adapters would act beside the fusion
    if case.family == "deberta" and case.name in ("lora_gating", "unipelt"):
        return "gated-blocks"  # three gates, for thirds of rows that are no roles
    # they adapt no output projection, so that nothing is in the file
    return "empty-adapter" if case.name == "lora_o_only" else None


@cache
def unpacked(root: Path, family: str) -> Path:
    """The directory of a family, from an archive if need be."""
    if (root / family).is_dir():
        return root / family
    archive = next(path for path in sorted(root.glob(f"{family}.tar.*")))
    with tarfile.open(archive) as packed:
        packed.extractall(_workplace(), filter="data")
    return _workplace() / family


@cache
def _workplace() -> Path:
    directory = Path(tempfile.mkdtemp(prefix="parity-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


@cache
def base_directory(directory: Path) -> Path:
    """A directory with the weights of its base model, drawn again where only the way to draw them is kept."""
    if not (directory / "model.safetensors").exists():
        weights.write(directory)
    return directory
