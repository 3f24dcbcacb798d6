"""Declarative adapters for PyTorch and Hugging Face models: every method for every model, described by one
YAML file.

Names are loaded when they are first used: `import adapterkit` loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from adapterkit.versions import __version__

_HOMES = {
    "attach": "adapterkit.api",
    "load": "adapterkit.api",
    "of": "adapterkit.api",
    "check": "adapterkit.author.check",
    "plan": "adapterkit.api",
    "draft": "adapterkit.author.draft",
    "Draft": "adapterkit.author.draft",
    "Kit": "adapterkit.kit",
    "Adapter": "adapterkit.adapter",
    "Plan": "adapterkit.planning",
    "Interface": "adapterkit.spec.schema",
    "register": "adapterkit.spec.registry",
    "interfaces": "adapterkit.spec.registry",
    "LoRAConfig": "adapterkit.methods.lora",
    "IA3Config": "adapterkit.methods.ia3",
    "VeRAConfig": "adapterkit.methods.vera",
    "DoRAConfig": "adapterkit.methods.dora",
    "DVoRAConfig": "adapterkit.methods.dora",
    "MTLLoRAConfig": "adapterkit.methods.mtl_lora",
    "Stack": "adapterkit.composition",
    "Fuse": "adapterkit.composition",
    "Parallel": "adapterkit.composition",
    "Split": "adapterkit.composition",
    "BatchSplit": "adapterkit.composition",
    "Average": "adapterkit.composition",
    "MultiTask": "adapterkit.composition",
    "Route": "adapterkit.composition",
    "FusionConfig": "adapterkit.methods.fusion",
    "BottleneckConfig": "adapterkit.methods.bottleneck",
    "CompacterConfig": "adapterkit.methods.compacter",
    "InvertibleConfig": "adapterkit.methods.invertible",
    "PrefixTuningConfig": "adapterkit.methods.prefix",
    "PromptTuningConfig": "adapterkit.methods.prompt",
    "ReFTConfig": "adapterkit.methods.reft",
    "UnionConfig": "adapterkit.methods.union",
    "errors": "adapterkit.errors",
}

__all__ = [
    "Adapter",
    "Average",
    "BatchSplit",
    "BottleneckConfig",
    "CompacterConfig",
    "DVoRAConfig",
    "DoRAConfig",
    "Draft",
    "Fuse",
    "FusionConfig",
    "IA3Config",
    "Interface",
    "InvertibleConfig",
    "Kit",
    "LoRAConfig",
    "MTLLoRAConfig",
    "MultiTask",
    "Parallel",
    "Plan",
    "PrefixTuningConfig",
    "PromptTuningConfig",
    "ReFTConfig",
    "Route",
    "Split",
    "Stack",
    "UnionConfig",
    "VeRAConfig",
    "__version__",
    "attach",
    "check",
    "draft",
    "errors",
    "interfaces",
    "load",
    "of",
    "plan",
    "register",
]

if TYPE_CHECKING:
    from adapterkit import errors
    from adapterkit.adapter import Adapter
    from adapterkit.api import attach, load, of, plan
    from adapterkit.author.check import check
    from adapterkit.author.draft import Draft, draft
    from adapterkit.composition import (
        Average,
        BatchSplit,
        Fuse,
        MultiTask,
        Parallel,
        Route,
        Split,
        Stack,
    )
    from adapterkit.kit import Kit
    from adapterkit.methods.bottleneck import BottleneckConfig
    from adapterkit.methods.compacter import CompacterConfig
    from adapterkit.methods.dora import DoRAConfig, DVoRAConfig
    from adapterkit.methods.fusion import FusionConfig
    from adapterkit.methods.ia3 import IA3Config
    from adapterkit.methods.invertible import InvertibleConfig
    from adapterkit.methods.lora import LoRAConfig
    from adapterkit.methods.mtl_lora import MTLLoRAConfig
    from adapterkit.methods.prefix import PrefixTuningConfig
    from adapterkit.methods.prompt import PromptTuningConfig
    from adapterkit.methods.reft import ReFTConfig
    from adapterkit.methods.union import UnionConfig
    from adapterkit.methods.vera import VeRAConfig
    from adapterkit.planning import Plan
    from adapterkit.spec.registry import interfaces, register
    from adapterkit.spec.schema import Interface


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'adapterkit' has no attribute {name!r}")
    module = import_module(home)
    value = module if name == "errors" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
