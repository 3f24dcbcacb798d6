"""The shape of the code itself: which room may import which, and that no family name steers it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import adapterkit

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "adapterkit"
FILES = sorted(PACKAGE.rglob("*.py"))
LONGEST = 600

ROOMS = (
    "errors versions | composition spec | model | methods | planning | runtime | inject | adapter"
    " | meaning fusing | activation generating liveness merging overriding passes routing | files"
    " | averaging sharing | members swapping report"
    " | kit | api | author | demo | testing | cli | __init__ __main__"
)
"""From the ground up: a room imports rooms before it, and none between the same two bars."""

LEVEL = {room: level for level, rooms in enumerate(ROOMS.split(" | ")) for room in rooms.split()}


def room_of(path: Path) -> str:
    """The first directory below the package, or the module itself."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that is imported, wherever the statement stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)


def wrong_ways(room: str, source: str) -> list[str]:
    """Imports in `source`, a file of `room`, that do not point to a lower room."""
    found = []
    for line, name in imported(ast.parse(source)):
        package, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        if package == "adapterkit" and other in LEVEL and other != room and LEVEL[other] >= LEVEL[room]:
            found.append(f"line {line}: {room} imports {name}")
    return found


def test_every_room_has_its_place() -> None:
    assert {room_of(path) for path in FILES} - LEVEL.keys() == set()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    assert wrong_ways(room_of(path), path.read_text(encoding="utf-8")) == []


def test_a_wrong_import_is_found() -> None:
    assert wrong_ways("methods", "from adapterkit.planning import Plan") != []
    assert wrong_ways("merging", "from adapterkit import liveness") != []
    assert wrong_ways("spec", "def f():\n    import adapterkit.model.resolve") != []
    assert wrong_ways("planning", "from adapterkit.methods.base import Unit\nimport adapterkit.errors") == []


@pytest.mark.parametrize("room", ["errors", "versions", "spec", "methods"])
def test_what_a_room_must_not_know(room: str) -> None:
    """errors stand on the standard library alone, specs are read without torch, methods see slots and never a
    model."""
    barred = {"methods": {"transformers"}}.get(room, {"torch", "transformers"})
    if room == "errors":
        barred |= {"pydantic", "yaml", "rich", "typer"}
    for path in (p for p in FILES if room_of(p) == room):
        packages = {
            name.partition(".")[0] for _, name in imported(ast.parse(path.read_text(encoding="utf-8")))
        }
        assert packages & barred == set(), path


# ------------------------------------------------------------------------------------------- family names


def families() -> set[str]:
    """Shipped model types and file names, as words: with and without their version, in lower case."""
    names: set[str] = set()
    for path in (ROOT / "interfaces").glob("*.yaml"):
        declared = yaml.safe_load(path.read_text(encoding="utf-8")).get("model_type") or []
        names |= {path.stem, *([declared] if isinstance(declared, str) else declared)}
    words = {re.sub(r"[^a-z0-9]", "", name.lower()) for name in names}
    return words | {stem for word in words if len(stem := re.sub(r"v?\d+$", "", word)) > 2}


def words(text: str) -> Iterator[str]:
    """Words of an identifier or a literal: cut at signs, and at the capitals of CamelCase."""
    for run in re.findall(r"[A-Za-z0-9]+", text):
        yield run.lower()
        parts = re.findall(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+\d*|[A-Z]+\d*|\d+", run)
        yield from (part.lower() for part in parts)
        # the usual prefixes of class names: GPT2Model begins with GPT2
        yield from ("".join(parts[:count]).lower() for count in range(2, len(parts)))
    yield re.sub(r"[^a-z0-9]", "", text.lower())


def docstrings(tree: ast.AST) -> set[int]:
    """Ids of the nodes that are docstrings, or strings that stand alone and describe an attribute."""
    return {
        id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)
    }


def said(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of every identifier and every string literal that is no docstring."""
    tree = ast.parse(source)
    prose = docstrings(tree)
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield line, node.value
        for field in ("id", "attr", "name", "arg", "asname", "module", "rest"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                yield line, value


OTHERS = {
    ("author/inputs.py", "frames_per_clip"),  # a field of configs for films
    ("demo/train.py", "clip_grad_norm_"),  # a function of torch
    ("files/adapterhub/bottleneck.py", "bert"),
    ("methods/bottleneck.py", "bert"),  # a way to start weights, which AdapterHub calls so
}
"""Words that mean something else."""


def family_words(source: str, known: set[str], file: str = "") -> list[str]:
    spoken = ((line, text) for line, text in said(source) if (file, text) not in OTHERS)
    return [f"line {line}: {text!r}" for line, text in spoken if known.intersection(words(text))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_family_name_steers_code(path: Path) -> None:
    source, file = path.read_text(encoding="utf-8"), path.relative_to(PACKAGE).as_posix()
    assert family_words(source, families(), file) == []


@pytest.mark.parametrize(
    "line",
    [
        "if model_type == 'bert': pass",
        "x = GPT2Model",
        "def read_llama(): pass",
        "key.startswith('deberta-v2.')",
        "from transformers import Qwen3ForCausalLM",
        "KIND = 'bert-generation'",
        "isinstance(m, XLMRobertaModel)",
        "f(vit=1)",
    ],
)
def test_a_family_name_is_found(line: str) -> None:
    assert family_words(line, families()) != []
    assert family_words(f'"""{line}"""', families()) == []


# ----------------------------------------------------------------------------------- the package as a whole


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST


def test_import_is_lazy() -> None:
    """`import adapterkit`, the errors and the loader of specs leave torch and transformers alone."""
    code = (
        "import sys, adapterkit, adapterkit.errors, adapterkit.spec.registry as registry\n"
        "registry.by_name(registry.interfaces()[0])\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'rich', 'typer'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


@pytest.mark.parametrize("name", adapterkit.__all__)
def test_public_names_resolve(name: str) -> None:
    assert getattr(adapterkit, name) is not None
    assert name in dir(adapterkit)


def test_public_names_are_what_is_typed() -> None:
    """Names that are loaded when used, names that type checkers see and `__all__` are the same."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    typed = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname or alias.name
        for node in ast.walk(typed)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {*seen, "__version__"} == set(adapterkit.__all__) == {*adapterkit._HOMES, "__version__"}


def test_no_module_hides_a_public_name() -> None:
    """Importing a submodule binds its name in the package, so that a public name of the same spelling would
    change."""
    modules = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in FILES}
    assert modules & set(adapterkit.__all__) == {"errors"}


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'atach'"):
        adapterkit.atach  # noqa: B018
