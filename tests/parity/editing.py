"""Recorded files of AdapterHub, edited."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from tests.parity.compare import adapter_directory, stored
from tests.parity.recordings import Case

Tensors = dict[str, Tensor]


def edited(
    case: Case,
    work: Path,
    *,
    tensors: Callable[[Tensors], Tensors] = lambda found: found,
    config: dict[str, Any] | None = None,
    **facts: Any,
) -> Path:
    """A copy of a recorded adapter with other tensors, other options in `config`, other facts beside it."""
    source = adapter_directory(case, work)
    directory = Path(tempfile.mkdtemp(dir=work)) / "edited"
    shutil.copytree(source, directory)
    said = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    said = {**said, **facts, "config": {**said["config"], **(config or {})}}
    (directory / "adapter_config.json").write_text(json.dumps(said), encoding="utf-8")
    found = {key: value.clone() for key, value in tensors(stored(directory)).items()}
    (directory / "pytorch_adapter.bin").unlink(missing_ok=True)
    save_file(found, directory / "adapter.safetensors")
    return directory


def without(pattern: str) -> Callable[[Tensors], Tensors]:
    """Tensors whose key does not match."""
    return lambda tensors: {key: value for key, value in tensors.items() if not re.search(pattern, key)}
