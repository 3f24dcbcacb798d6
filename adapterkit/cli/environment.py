"""`adapterkit env`: what a bug report needs."""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from typing import Any

from adapterkit.cli import report
from adapterkit.errors import SpecError
from adapterkit.spec import registry
from adapterkit.versions import __version__, installed, unverified

PACKAGES = (
    "torch",
    "transformers",
    "pydantic",
    "PyYAML",
    "safetensors",
    "huggingface_hub",
    "typer",
    "rich",
    "peft",
    "accelerate",
    "bitsandbytes",
    "torchao",
)


def run(as_json: bool) -> None:
    found = describe()
    if as_json:
        report.as_json(found)
        return
    lines = {key: value for key, value in found.items() if isinstance(value, str)}
    lines |= {name: version or "not installed" for name, version in found["packages"].items()}
    wide = max(map(len, lines)) + 2
    for key, value in lines.items():
        sys.stdout.write(f"{key:<{wide}}{value}\n")
    sys.stdout.write("interfaces\n")
    for name, digest in found["interfaces"].items():
        sys.stdout.write(f"  {name:<{wide}}{digest}\n")


def describe() -> dict[str, Any]:
    """Versions and platform; the interfaces with the hash of what they say."""
    note = unverified()
    return {
        "adapterkit": __version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": platform.platform(),
        "installed at": str(Path(__file__).parent.parent),
        **({"note": note} if note else {}),
        "packages": {name: installed(name) for name in PACKAGES},
        "interfaces": {entry.name: _digest(entry) for entry in registry.known_files()},
    }


def _digest(entry: registry.Entry) -> str:
    source = "" if entry.shipped else f"  {entry.path}"
    try:
        return registry.digest(registry.load(entry.path)) + source
    except SpecError as error:
        return f"has {len(error.problems)} problems{source}"
