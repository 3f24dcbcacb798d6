"""Distributions are built once, and installed into environments of their own, far from the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def call(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command outside the checkout, without anything that points into it."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "ADAPTERKIT", "MYPY"))
    }
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=cwd, env=clean, capture_output=True, text=True, check=False)


def must(*command: str | Path, cwd: Path) -> str:
    """As `call`, for a command that has to succeed. Gives what it printed."""
    done = call(*command, cwd=cwd)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@dataclass(frozen=True)
class Environment:
    """A virtual environment that sees the packages of this one, but not the checkout."""

    root: Path

    @property
    def python(self) -> Path:
        return self.root / "bin" / "python"

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return call(self.python, *arguments, cwd=self.root)

    def must(self, *arguments: str | Path) -> str:
        return must(self.python, *arguments, cwd=self.root)


def environment(root: Path, *wanted: str | Path) -> Environment:
    """A new environment with `wanted` installed: no dependencies, no network, no isolated build."""
    must(sys.executable, "-m", "venv", "--without-pip", root, cwd=root.parent)
    made = Environment(root)
    own = Path(made.must("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (own / "packages_of_the_tests.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check", "--quiet")
    must(sys.executable, "-m", "pip", "--python", made.python, "install", *options, *wanted, cwd=root.parent)
    return made


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(sdist, wheel that was built from this sdist)."""
    folder = tmp_path_factory.mktemp("dist")
    must(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


@pytest.fixture(scope="session")
def installed(distributions: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with the wheel."""
    return environment(tmp_path_factory.mktemp("wheel") / "env", distributions[1])


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what an editable install needs, so that the real checkout stays as it is."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("adapterkit", "interfaces"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="session")
def editable(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with an editable install of the copy."""
    return environment(tmp_path_factory.mktemp("editable") / "env", "--editable", checkout)
