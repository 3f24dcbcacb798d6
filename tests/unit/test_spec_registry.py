"""Which interface describes which model type, wherever its file lies."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from adapterkit.errors import SpecError
from adapterkit.spec import registry

TEXT = """adapterkit: 1
model_type: [mine, mine_too]
stacks:
  decoder:
    layers: blocks
    mlp: {up: mlp.up, down: mlp.down}
"""


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """A registry of its own for each test, and the usual one after it."""
    registry._registry.cache_clear()
    yield
    registry._registry.cache_clear()


def write(folder: Path, name: str, text: str = TEXT) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def raises(code: str, action: object, *arguments: object) -> SpecError:
    assert callable(action)
    with pytest.raises(SpecError) as caught:
        action(*arguments)
    assert caught.value.code == code
    return caught.value


def test_shipped_interfaces_are_known_by_name_and_model_type() -> None:
    assert {"bert", "gpt2", "llama", "t5", "vit"} <= set(registry.interfaces())
    assert registry.by_name("xlm-roberta") is registry.by_name("xlm_roberta")
    assert registry.is_shipped("bert")
    assert registry.name_of(registry.by_name("bert")) == "bert"


def test_no_two_shipped_files_describe_one_model_type() -> None:
    entries = list(registry.known_files())
    types = [kind for entry in entries for kind in registry.load(entry.path).model_type or ()]
    assert len(types) == len(set(types))


def test_a_misspelt_name_has_a_hint() -> None:
    assert "did you mean 'bert'?" in str(raises("unknown-interface", registry.by_name, "berd"))
    assert "did you mean" in str(raises("unknown-interface", registry.load, "gptt2"))


def test_a_registered_file_is_known(tmp_path: Path) -> None:
    assert registry.register(write(tmp_path, "family.yaml")) == "family"
    assert registry.by_name("mine_too") is registry.by_name("family")
    assert not registry.is_shipped("family")
    assert registry.model_types()["mine"] == "family"


def test_a_file_with_problems_is_not_registered(tmp_path: Path) -> None:
    raises("unknown-word", registry.register, write(tmp_path, "family.yaml", TEXT + "extra: {}\n"))
    assert "family" not in registry.interfaces()


def test_registering_again_replaces(tmp_path: Path) -> None:
    path = write(tmp_path, "family.yaml")
    registry.register(path)
    assert list(registry.by_name("mine").stacks) == ["decoder"]
    registry.register(write(tmp_path, "family.yaml", TEXT.replace("decoder", "encoder")))
    assert list(registry.by_name("mine").stacks) == ["encoder"]


def test_a_file_that_takes_a_shipped_name_takes_only_its_own_types(tmp_path: Path) -> None:
    shipped = registry.digest(registry.by_name("bert"))
    registry.register(write(tmp_path, "bert.yaml"))
    assert registry.by_name("mine").model_type == ("mine", "mine_too")
    assert registry.digest(registry.by_name("bert")) == shipped
    assert not registry.is_shipped("bert")  # so that files of adapters carry the whole interface


def test_a_file_may_describe_a_shipped_model_type_anew(tmp_path: Path) -> None:
    registry.register(write(tmp_path, "my_bert.yaml", TEXT.replace("[mine, mine_too]", "bert")))
    assert list(registry.by_name("bert").stacks) == ["decoder"]


def test_the_search_path_holds_files_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder, "one.yaml", TEXT.replace("[mine, mine_too]", "one"))
    write(folder, "two.yml", TEXT.replace("[mine, mine_too]", "two"))
    write(folder, "notes.txt", "no interface")
    single = write(tmp_path, "three.yaml", TEXT.replace("[mine, mine_too]", "three"))
    monkeypatch.setenv(registry.SEARCH_PATH, os.pathsep.join([str(folder), "", str(single)]))
    assert {"one", "two", "three"} <= set(registry.model_types())
    assert "notes" not in registry.interfaces()


def test_a_missing_search_path_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(registry.SEARCH_PATH, str(tmp_path / "nowhere"))
    assert registry.SEARCH_PATH in str(raises("unreadable", registry.interfaces))


def distribution(folder: Path, target: str) -> None:
    """An installed package, as importlib.metadata sees it."""
    info = folder / "family_pack-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: family-pack\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{registry.ENTRY_POINTS}]\nfamily = {target}\n")


@pytest.mark.parametrize("target", ["family_pack_{0}:interfaces", "family_pack_{0}:FOLDER"])
def test_entry_points_bring_interfaces(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = target.format(tmp_path.name.replace("-", "_"))
    module = target.partition(":")[0]
    (tmp_path / f"{module}.py").write_text(
        "from pathlib import Path\n\nFOLDER = Path(__file__).parent / 'specs'\n\n"
        "def interfaces():\n    return FOLDER\n"
    )
    (tmp_path / "specs").mkdir()
    write(tmp_path / "specs", "family.yaml")
    distribution(tmp_path, target)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert registry.by_name("mine").model_type == ("mine", "mine_too")
    assert not registry.is_shipped("family")


@pytest.mark.parametrize("target", ["no_such_module_at_all:interfaces", "os:no_such_name", "os:getpid"])
def test_a_broken_entry_point_says_which(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distribution(tmp_path, target)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert target in str(raises("bad-entry-point", registry.interfaces))


def test_like_looks_beside_the_file_that_says_it(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml")
    write(tmp_path, "roberta.yaml", "adapterkit: 1\nstacks: {a: {layers: x, mlp: {up: u, down: d}}}\n")
    child = write(tmp_path, "child.yaml", "adapterkit: 1\nlike: base\nstacks: {decoder: {layers: other}}\n")
    assert registry.load(child).stacks["decoder"].layers.path == "other"
    # the shipped parent's own parent is the shipped one, whatever lies beside the file that asked
    far = write(tmp_path, "far.yaml", "adapterkit: 1\nlike: xlm_roberta\n")
    assert list(registry.load(far).stacks) == ["encoder"]


def test_an_interface_may_be_a_dict() -> None:
    data = {"adapterkit": 1, "stacks": {"a": {"layers": "x", "mlp": {"up": "ü.p", "down": "d"}}}}
    assert "bad-path" in str(raises("bad-path", registry.load, data))
    data["stacks"]["a"]["mlp"]["up"] = "u"  # type: ignore[index]
    assert registry.load(data).stacks["a"].layers.path == "x"


@pytest.mark.parametrize("value", [object(), {1, 2}, float("nan"), b"x"])
def test_a_dict_with_other_things_is_refused(value: object) -> None:
    raises("wrong-type", registry.load, {"adapterkit": 1, "stacks": value})


def test_a_dict_that_holds_itself_is_refused() -> None:
    data: dict[str, object] = {"adapterkit": 1}
    data["stacks"] = data
    raises("wrong-type", registry.load, data)


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b", "no/such/folder/x.yaml", ""])
def test_strange_names_are_refused(name: str) -> None:
    with pytest.raises(SpecError):
        registry.load(name)


def test_one_path_of_embeddings_is_both_for_what_copies_it(tmp_path: Path) -> None:
    (tmp_path / "low.yaml").write_text(TEXT + "    embeddings: table\n")
    high = tmp_path / "high.yaml"
    high.write_text("adapterkit: 1\nlike: low\nstacks:\n  decoder:\n    embeddings: {out: drop}\n")
    found = registry.load(high).stacks["decoder"].embeddings
    assert found is not None and found.table is not None and found.out is not None
    assert (found.table.path, found.out.path) == ("table", "drop")


@pytest.mark.parametrize("call", [registry.load, registry.register])
def test_what_is_no_interface_is_refused(call: Callable[[Any], object]) -> None:
    with pytest.raises(SpecError) as caught:
        call(3)
    assert caught.value.code == "wrong-type"


def test_interfaces_that_say_the_same_are_equal(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(TEXT)
    one, other = registry.load(path), registry.load(yaml.safe_load(TEXT))
    assert one == other and hash(one) == hash(other)
    path.write_text(TEXT.replace("mlp.up", "mlp.wide"))
    assert registry.load(path) != one
