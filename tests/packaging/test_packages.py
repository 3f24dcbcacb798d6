"""What is in the sdist and in the wheel, and that both kinds of install find their interfaces."""

from __future__ import annotations

import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
import yaml

from adapterkit.versions import __version__
from tests.packaging.conftest import ROOT, Environment, must

LIST = "from adapterkit.spec import registry as r; print(r.shipped_directory(), *r.interfaces(), sep='\\n')"
SHIPPED = sorted(path.stem for path in (ROOT / "interfaces").glob("*.yaml"))


def members(distributions: tuple[Path, Path]) -> tuple[set[str], set[str]]:
    """Names of the files in sdist (without its top directory) and wheel."""
    with tarfile.open(distributions[0]) as sdist, zipfile.ZipFile(distributions[1]) as wheel:
        inside = {member.name.partition("/")[2] for member in sdist.getmembers() if member.isfile()}
        return inside, {name for name in wheel.namelist() if not name.endswith("/")}


def test_wheel_holds_exactly_this(distributions: tuple[Path, Path]) -> None:
    _, wheel = members(distributions)
    info = f"adapterkit-{__version__}.dist-info"
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "adapterkit").rglob("*.py")}
    interfaces = {f"adapterkit/interfaces/{name}.yaml" for name in SHIPPED}
    more = {"adapterkit/py.typed", "adapterkit/interfaces/schema.json"}
    about = {
        f"{info}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")
    }
    assert len(package) > 20 and len(interfaces) > 20
    assert wheel == package | interfaces | more | about


def test_sdist_holds_what_it_takes_to_build_and_test(distributions: tuple[Path, Path]) -> None:
    sdist, _ = members(distributions)
    single = {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        ".pre-commit-hooks.yaml",
    }
    single |= {
        "tests/conftest.py",
        "tests/models/custom.yaml",
        "docs/conf.py",
        "interfaces/schema.json",
        "PKG-INFO",
    }
    assert single <= sdist
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "adapterkit").rglob("*.py")} <= sdist
    assert {f"interfaces/{name}.yaml" for name in SHIPPED} <= sdist
    assert not [name for name in sdist if "__pycache__" in name or name.startswith((".git/", ".venv"))]


def metadata(distributions: tuple[Path, Path]) -> Message:
    with zipfile.ZipFile(distributions[1]) as wheel:
        return Parser().parsestr(wheel.read(f"adapterkit-{__version__}.dist-info/METADATA").decode())


def test_metadata(distributions: tuple[Path, Path]) -> None:
    found = metadata(distributions)
    assert (found["Name"], found["Version"], found["License-Expression"]) == (
        "adapterkit",
        __version__,
        "Apache-2.0",
    )
    assert {"demo", "test", "docs", "bench"} <= set(found.get_all("Provides-Extra", []))
    needed = [line for line in found.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert not [line for line in needed if line.startswith(("peft", "accelerate"))]
    assert any(line.startswith("transformers<6,>=5.5") for line in needed)


def test_wheel_finds_its_interfaces(installed: Environment) -> None:
    folder, *names = installed.must("-c", LIST).split()
    assert Path(folder).is_relative_to(installed.root)
    assert names == SHIPPED
    assert (Path(folder) / "schema.json").is_file()


def test_wheel_has_its_commands(installed: Environment) -> None:
    assert "structure ok" in installed.must("-m", "adapterkit", "check")
    script = installed.root / "bin" / "adapterkit"
    assert must(script, "--version", cwd=installed.root).strip() == f"adapterkit {__version__}"


def test_editable_install_finds_its_interfaces(editable: Environment, checkout: Path) -> None:
    folder, *names = editable.must("-c", LIST).split()
    assert Path(folder) == checkout / "interfaces"
    assert names == SHIPPED
    # an edit is seen at once
    (checkout / "interfaces" / "mine.yaml").write_text(
        "adapterkit: 1\nmodel_type: mine\nlike: bert\n", encoding="utf-8"
    )
    assert "mine" in editable.must("-c", LIST).split()


@pytest.mark.parametrize(
    "text, expected", [("adapterkit: 1\nlike: bert\n", 0), ("adapterkit: 1\nlayers: x\n", 1)]
)
def test_pre_commit_hook(installed: Environment, tmp_path: Path, text: str, expected: int) -> None:
    """What the hooks run, on a file as pre-commit passes it."""
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    hooks = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
    assert {hook["id"] for hook in hooks} == {"adapterkit-check", "adapterkit-check-installed"}
    for hook in hooks:
        words = hook["entry"].removeprefix("python ").replace("adapterkit check", "-m adapterkit check", 1)
        words = words.replace("-m -m", "-m").split()
        assert installed.run(*words, tmp_path / "mine.yaml").returncode == expected
