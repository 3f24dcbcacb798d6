"""Tables that are made from the code at build time, so that they cannot go out of date.

```{language}                   every word of the interface language, from the schema
```{vocabulary} roles           the closed lists of words: sublayers, roles
```{options} lora               options of a method, from its config
```{presets} bottleneck        names that stand for a method with options of their own
```{families}                   shipped interfaces and their model types
```{matrix}                     families x methods, as `adapterkit list` knows them
```{blocks}                     methods x blocks of a setup, as `kit.activate` knows them
```{commands}                   commands and their options, from the command line itself
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any, Literal, Self, Union, get_args, get_origin

from docutils import nodes
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from transformers import AutoConfig, AutoModel
from typer.main import get_command

from adapterkit.api import attach
from adapterkit.cli.families import ROWLESS, no_parallel, refusal, rowless
from adapterkit.cli.main import app as cli
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
from adapterkit.errors import AdapterkitError, listing
from adapterkit.methods.names import LEGACY, METHODS, PRESETS, parse
from adapterkit.spec import registry, vocabulary
from adapterkit.spec.schema import Interface, Layers, Path, Unembed
from adapterkit.spec.terms import Scalar

SHORT = (Path, Layers, Unembed)
"""Models that may be written as one word."""


def parts(model: type[BaseModel], seen: dict[type[BaseModel], None] | None = None) -> list[type[BaseModel]]:
    """A model and all models below it, in the order of the text."""
    seen = {} if seen is None else seen
    if model not in seen:
        seen[model] = None
        for field in model.model_fields.values():
            for below in models_in(field.annotation):
                parts(below, seen)
    return list(seen)


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from models_in(argument)


def link(model: type[BaseModel]) -> str:
    name = model.__name__
    return f"path or [{name}](#{name.lower()})" if model in SHORT else f"[{name}](#{name.lower()})"


def shown(annotation: Any) -> str:
    """What may stand behind a word."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is Self:
        return "the same words"
    if annotation is Scalar:
        return "value"
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(shown(item) for item in arguments if item is not type(None)) or "nothing"
    if origin is tuple:
        return f"list of {shown(arguments[0])}"
    if origin is dict:
        return f"map: name → {shown(arguments[1])}"
    if hasattr(annotation, "__metadata__"):
        return shown(annotation.__origin__)
    if hasattr(annotation, "__value__"):
        return shown(annotation.__value__)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return link(annotation)
    plain = {
        str: "text",
        int: "whole number",
        float: "number",
        bool: "`true` or `false`",
        type(None): "reserved",
        Any: "any value",
    }
    return plain[annotation]


def meaning(field: FieldInfo) -> str:
    """The field's description, that of its type, or the first line of the part it holds."""
    notes = [note for item in (field.annotation, *get_args(field.annotation)) for note in get_args(item)[1:]]
    described = [note.description for note in notes if isinstance(note, FieldInfo) and note.description]
    below = [
        (model.__doc__ or "").splitlines()[0] for model in models_in(field.annotation) if model is not Path
    ]
    return next((text for text in (field.description, *described, *below) if text), "")


def default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value = field.default
    if field.default_factory is not None or value is None or value == ():
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + " --- |" * len(head), *lines[1:]])


def language() -> str:
    """Every part of the language with its words."""
    text = []
    for model in parts(Interface):
        rows = (
            (f"`{name}`", shown(field.annotation), default(field), meaning(field))
            for name, field in model.model_fields.items()
        )
        head = ("word", "value", "default", "meaning")
        text += [f"## {model.__name__}", (model.__doc__ or "").strip(), table(head, rows)]
    return "\n\n".join(text)


def words(which: str) -> str:
    found = {"roles": vocabulary.ROLES, "sublayers": vocabulary.SUBLAYERS}[which]
    return table(
        (which.removesuffix("s"), "meaning"), ((f"`{word}`", meaning) for word, meaning in found.items())
    )


def options(method: str) -> str:
    fields = METHODS[method].model_fields.items()
    rows = ((f"`{name}`", f"`{option_default(field)}`", field.description or "") for name, field in fields)
    return table(("option", "default", "meaning"), rows)


def option_default(field: FieldInfo) -> Any:
    value = field.get_default(call_default_factory=True)
    return value if isinstance(value, str) or value is None else repr(value)


def families() -> str:
    types_of: dict[str, list[str]] = {name: [] for name in registry.interfaces() if registry.is_shipped(name)}
    for model_type, name in registry.model_types().items():
        types_of[name].append(f"`{model_type}`")
    rows = ((f"`{name}.yaml`", ", ".join(model_types)) for name, model_types in types_of.items())
    return table(("interface", "model types"), rows)


def presets(method: str) -> str:
    """Names of a method with what they change, and what AdapterHub called them before."""
    before = {name: old for old, name in LEGACY.items()}
    rows = (
        (
            f"`{name}`",
            ", ".join(f"`{key}={shown_value(value)}`" for key, value in given.items()) or "nothing",
            f"`{before[name]}`" if name in before else "",
        )
        for name, (base, given) in PRESETS.items()
        if base == method
    )
    return table(("name", "options that it sets", "older name"), rows)


def shown_value(value: Any) -> str:
    """A value as a shorthand would give it."""
    if isinstance(value, tuple):
        return f"[{', '.join(value)}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


COLUMNS: dict[str, Any] = {
    "LoRA": "lora",
    "(IA)³": "ia3",
    "VeRA": "vera",
    "DoRA": "dora",
    "MTL-LoRA": "mtl_lora",
    "bottleneck": "bottleneck",
    "Compacter": "compacter",
    "fusion": {"method": "fusion", "children": ["a", "b"]},
    "invertible": "invertible",
    "prefix": "prefix_tuning",
    "prompt": "prompt_tuning",
    "ReFT": "reft",
}


def matrix() -> str:
    """Families x methods: a tick, or the number of the reason below."""
    configs = {column: parse(method) for column, method in COLUMNS.items()}
    reasons: dict[str, int] = {}
    rows = []
    for name in filter(registry.is_shipped, registry.interfaces()):
        interface = registry.by_name(name)
        whys = (refusal(interface, config) for config in configs.values())
        cells = [
            "✓" if why is None else f"({reasons.setdefault(why, len(reasons) + 1)})"
            for why in (*whys, no_parallel(interface) or not_everywhere(interface))
        ]
        rows.append((f"`{name}`", *cells))
    notes = [f"({number}) {why}" for why, number in reasons.items()]
    return "\n\n".join([table(("family", *configs, "Parallel"), iter(rows)), *notes])


def not_everywhere(interface: Interface) -> str | None:
    """Where adapters cannot act side by side, if they can elsewhere."""
    found = list(rowless(interface))
    return f"not at {listing(found)}: {ROWLESS}" if found else None


BLOCKS: dict[str, Any] = {
    "Stack": lambda kit: Stack("a", "b"),
    "Fuse": lambda kit: kit.fuse("a", "b", name="f") and Fuse("a", "b", name="f"),
    "Parallel": lambda kit: Parallel("a", "b"),
    "BatchSplit": lambda kit: BatchSplit("a", "b", batch_sizes=1),
    "Route": lambda kit: Route("a", "b"),
    "MultiTask": lambda kit: MultiTask("a", "b"),
    "Split": lambda kit: Split("a", "b", splits=1),
    "Average": lambda kit: Average("a", "b"),
}


def blocks() -> str:
    """Methods x blocks: a tick, or the code of the error."""
    rows = []
    for column, method in COLUMNS.items():
        if column == "fusion":
            continue
        config = AutoConfig.for_model(
            "bert",
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            vocab_size=50,
        )
        model = AutoModel.from_config(config)
        options = {"method": method, **({"reduction_factor": 2} if method == "compacter" else {})}
        for name in "ab":
            kit = attach(model, options, name=name)
        cells = []
        for make in BLOCKS.values():
            try:
                kit.activate(make(kit))
                cells.append("✓")
            except AdapterkitError as error:
                cells.append(f"[{error.code}](errors.md#{error.code})")
        rows.append((column, *cells))
    return table(("method", *BLOCKS), iter(rows))


def commands() -> str:
    """Every command with what it takes, as `--help` says it."""
    text = []
    for name, command in get_command(cli).commands.items():
        takes: list[tuple[str, str]] = []
        usage = [f"adapterkit {name}"]
        for one in command.params:
            value = one.metavar or "N"
            if one.param_type_name == "argument":
                usage.append(value.strip("{}"))
                takes.append((f"`{usage[-1]}`", one.help))
            else:
                flags = ", ".join(f"`{flag}`" for flag in (*one.opts, *one.secondary_opts))
                takes.append((flags if one.is_flag else f"{flags} `{value}`", one.help))
        head = ("argument", "meaning")
        text += [f"## {name}", command.help, f"```text\n{' '.join(usage)}\n```"]
        text += [table(head, iter(takes))] if takes else []
    return "\n\n".join(text)


class Generated(SphinxDirective):
    """A directive whose text a function writes."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        text = MAKERS[self.name](*self.arguments)
        return self.parse_text_to_nodes(text, allow_section_headings=True)


MAKERS: dict[str, Any] = {
    "language": language,
    "vocabulary": words,
    "options": options,
    "presets": presets,
    "families": families,
    "matrix": matrix,
    "blocks": blocks,
    "commands": commands,
}


def setup(app: Sphinx) -> dict[str, Any]:
    for name in MAKERS:
        app.add_directive(name, Generated)
    return {"version": "1", "parallel_read_safe": True}
