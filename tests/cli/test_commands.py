"""The other commands, and how the command line ends."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adapterkit import __main__ as entry
from adapterkit.spec import jsonschema, registry
from adapterkit.versions import __version__
from tests.cli.conftest import Ran
from tests.models import custom, tiny
from tests.models.rows import ROWS

Run = Callable[..., Ran]
LORA_FAMILY = {"lora", "ia3", "vera", "dora", "dvora", "mtl_lora"}


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A directory with the config of a tiny classifier, as transformers saves it."""
    config = tiny.config("bert", "BertForSequenceClassification")
    config.architectures = ["BertForSequenceClassification"]
    config.save_pretrained(tmp_path)
    return str(tmp_path)


def test_alone_it_says_three_next_steps(run: Run) -> None:
    found = run()
    assert found.code == 0
    steps = re.findall(r"^  (adapterkit \w+)", found.out, re.MULTILINE)
    assert steps == ["adapterkit list", "adapterkit show", "adapterkit demo"]


def test_version_and_help(run: Run) -> None:
    assert run("--version").out == f"adapterkit {__version__}\n"
    found = run("--help")
    assert found.code == 0
    for command in ("check", "list", "show", "plan", "schema", "env", "demo"):
        assert re.search(rf"^\s+{command}\b", found.out, re.MULTILINE)


@pytest.mark.parametrize(
    "wrong", [("nope",), ("show",), ("plan", "bert"), ("check", "--nope"), ("demo", "--seeds", "0")]
)
def test_wrong_usage_ends_with_2(run: Run, wrong: tuple[str, ...]) -> None:
    found = run(*wrong)
    assert found.code == 2
    assert "Usage:" in found.err
    assert "Traceback" not in found.err


def test_list_is_derived_from_the_specs(run: Run) -> None:
    found = run("list", "--json")
    assert found.code == 0
    rows = {row["name"]: row for row in json.loads(found.out)["interfaces"]}
    assert set(rows) == {path.stem for path in registry.shipped_directory().glob("*.yaml")}
    assert all(set(row["methods"]) >= LORA_FAMILY for row in rows.values())
    assert all(rows[name]["parallel"] is None for name in ROWS if name in rows)
    assert not any(rows[name]["parallel_not_at"] for name in ROWS if name in rows)
    assert rows["swin"]["parallel_not_at"] == [f"attention.{role}" for role in "qkvo"]
    assert rows["clip"]["model_types"] == ["clip", "clip_text_model", "clip_vision_model"]
    lines = run("list").out.splitlines()
    assert lines[0].split() == ["interface", "model", "types", "methods", "Parallel"]
    assert re.match(r"bert +bert +all +yes$", next(line for line in lines if line.startswith("bert ")))
    named = next(line for line in lines if line.startswith("methods: "))
    assert set(named.removeprefix("methods: ").split(", ")) == set(rows["bert"]["methods"])
    assert "silence" not in rows["bert"]["methods"]  # it trains nothing


def test_list_gives_the_reason_where_a_family_lacks_a_method(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "odd.yaml").write_text(
        "adapterkit: 1\nmodel_type: odd\nunsupported: {vera: the sizes differ}\n"
        "stacks: {decoder: {layers: blocks, attention: {core: attn, q: attn.q, out: attn}}}\n"
    )
    monkeypatch.setenv(registry.SEARCH_PATH, str(tmp_path))
    rows = {row["name"]: row["methods"] for row in json.loads(run("list", "--json").out)["interfaces"]}
    assert rows["odd"]["vera"] == "the sizes differ"
    assert rows["odd"]["lora"] == "it has no v"
    assert rows["odd"]["ia3"] == "it has no k, v, down"
    assert rows["bert"]["lora"] is None
    text = run("list").out
    assert re.search(r"^odd +odd +all but lora, ia3, vera", text, re.MULTILINE)
    assert "odd: no vera: the sizes differ" in text


def test_list_says_where_a_method_finds_a_place_in_some_layers_only(run: Run) -> None:
    rows = {row["name"]: row for row in json.loads(run("list", "--json").out)["interfaces"]}
    assert rows["bert"]["partly"] == {}
    (why,) = rows["mixtral"]["partly"]["ia3"]
    assert rows["mixtral"]["methods"]["ia3"] is None and why.startswith("its experts keep their matrices")
    assert "lora" not in rows["mixtral"]["partly"]
    assert f"mixtral: ia3 not in every layer or model: {why}" in run("list").out
    assert rows["voxtral_encoder"]["methods"]["invertible"] == "no stack has embeddings that are named"
    assert rows["whisper"]["methods"]["invertible"] is None
    assert rows["wavlm"]["methods"]["prefix_tuning"].startswith("one function computes attention")


def test_show_marks_the_slots_of_a_model(run: Run) -> None:
    found = run("show", "bert")
    assert found.code == 0
    lines = found.out.splitlines()
    assert lines[0] == "BertModel (bert), 109,482,240 parameters"
    query = next(line for line in lines if line.strip().startswith("query "))
    assert query.strip() == "query  Linear  <- encoder.0.attention.q 768 -> 768"
    assert any("0 ... 11  (12 alike)  BertLayer" in line for line in lines)
    # two matrices of 768 x 8 for q and v of twelve layers
    lora = next(line for line in lines if line.startswith("lora "))
    assert lora.split()[:3] == ["lora", "24", f"{2 * 2 * 768 * 8 * 12:,}"]
    assert {line.split()[0] for line in lines if line.strip()} >= LORA_FAMILY


def test_show_tells_layers_that_differ_apart(run: Run) -> None:
    # only the first layer of T5 holds the table of relative positions
    found = run("show", "t5")
    assert re.search(r"^ +0  T5Block", found.out, re.MULTILINE)
    assert re.search(r"^ +1 \.\.\. 5  \(5 alike\)  T5Block", found.out, re.MULTILINE)


def test_show_reads_the_class_from_a_config_in_a_folder(run: Run, folder: str) -> None:
    data = json.loads(run("show", folder, "--json").out)
    assert data["model"] == "BertForSequenceClassification"
    assert data["heads"] == ["classifier"]
    assert data["slots"]["encoder.1.mlp.up"] == {
        "path": "bert.encoder.layer.1.intermediate.dense",
        "shape": [40, 32],
    }
    assert data["methods"]["lora"]["parameters"] == 2 * 2 * 32 * 8 * 2


def test_show_with_an_interface_of_ones_own(run: Run, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mlp = "{up: intermediate.dense, down: output.dense}"
    mine.write_text(f"adapterkit: 1\nstacks: {{mine: {{layers: encoder.layer, mlp: {mlp}}}}}\n")
    data = json.loads(run("show", "bert", "--interface", str(mine), "--json").out)
    assert set(data["slots"]) == {f"mine.{i}.mlp.{role}" for i in range(12) for role in ("up", "down")}
    assert "refused" in data["methods"]["lora"]
    mine.write_text("adapterkit: 1\nstacks: {mine: {layers: encoder.layers, mlp: {down: output.dense}}}\n")
    found = run("show", "bert", "--interface", str(mine))
    assert (found.code, found.out) == (1, "")
    assert "error[path-not-found] stacks.mine.layers" in found.err


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("show {made} --interface {file}", "blocks"),
        ("plan {made} lora --interface {file}", "encoder.attention.q"),
        ("check {file} --model {made}", "TinyClassifier"),
        ("check {file} --forward --model {made}", "11 of 11 methods proved"),
        ("draft {made}", "layers: blocks"),
    ],
)
def test_every_command_finds_a_function_in_the_working_directory(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, told: str
) -> None:
    """As the console script is called: there the working directory is not on the path."""
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", str(Path.cwd()))])
    module = f"made_for_{command.split()[0]}_{len(command)}"
    (tmp_path / f"{module}.py").write_text(f"from {custom.__name__} import TinyClassifier as make\n")
    monkeypatch.chdir(tmp_path)
    file = Path(custom.__file__).with_suffix(".yaml")
    found = run(*(word.format(made=f"{module}:make", file=file) for word in command.split()))
    assert found.code == 0 and told in found.out, (found.out, found.err)


def test_a_function_that_is_not_there_is_told(run: Run) -> None:
    found = run("show", "no_such_module:make")
    assert found.code == 2 and "it cannot be imported: No module named 'no_such_module'" in found.err


def test_plan_says_what_attach_would_do(run: Run) -> None:
    found = run("plan", "gpt2", "lora[r=4,targets=[q,v,up]]")
    assert found.code == 0
    assert re.search(r"decoder\.attention\.q +12 x +768 -> 768", found.out)
    assert re.search(r"decoder\.mlp\.up +12 x +768 -> 3072", found.out)
    data = json.loads(run("plan", "gpt2", "lora[r=4]", "--json").out)
    assert data["parameters"] == 2 * 2 * 768 * 4 * 12
    assert data["slots"]["decoder.0.attention.q"]["path"] == "h.0.attn.c_attn"


@pytest.mark.parametrize(
    ("method", "code", "said"),
    [
        ("lra", 2, "did you mean 'lora'?"),
        ("lora[rank=4]", 2, "error[unknown-option]"),
        ("lora[r=4", 2, "error[bad-shorthand]"),
        ("lora[targets=[gate]]", 1, "error[no-such-role]"),
    ],
)
def test_plan_refuses_what_cannot_be(run: Run, method: str, code: int, said: str) -> None:
    found = run("plan", "bert", method)
    assert (found.code, found.out) == (code, "")
    assert said in found.err
    assert "Traceback" not in found.err


def test_plan_may_be_partial(run: Run) -> None:
    found = run("plan", "bert", "lora[targets=[q,gate]]", "--partial")
    assert found.code == 0
    assert "missing  this model has no 'gate' (bert)" in found.out


def test_errors_are_json_on_request(run: Run) -> None:
    found = run("show", "nope", "--json")
    assert found.code == 2
    data = json.loads(found.out)
    assert (data["error"], data["problems"][0]["code"]) == ("ConfigError", "no-such-model")


def test_a_hub_id_comes_from_the_local_cache_only(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    found = run("show", "nobody/no-such-model")
    assert found.code == 2
    assert "hub id in the local cache" in found.err


def test_a_type_without_a_model_of_its_own_says_so(run: Run) -> None:
    found = run("show", "encoder-decoder")
    assert found.code == 2
    assert "error[no-such-model]" in found.err


def test_a_known_model_without_an_interface(run: Run) -> None:
    found = run("show", "xlnet")
    assert found.code == 1
    assert "error[no-interface]" in found.err


def test_schema_is_printed_and_written(run: Run, tmp_path: Path) -> None:
    assert run("schema").out == run("schema", "--json").out == jsonschema.text()
    path = tmp_path / "schema.json"
    assert run("schema", "--write", str(path)) == Ran(0, "", "")
    assert path.read_text(encoding="utf-8") == jsonschema.text()
    found = run("schema", "--write", str(tmp_path / "no" / "x.json"))
    assert found.code == 2
    assert "error[unwritable]" in found.err


def test_env(run: Run) -> None:
    data = json.loads(run("env", "--json").out)
    assert data["adapterkit"] == __version__
    assert set(data["packages"]) >= {"torch", "transformers", "pydantic"}
    assert data["interfaces"]["bert"] == registry.digest(registry.by_name("bert"))
    text = run("env").out
    assert data["interfaces"]["bert"] in text
    assert data["platform"] in text


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", "adapterkit", *arguments]


@pytest.mark.parametrize("name", ["list", "schema", "env", "check"])
def test_a_closed_pipe_is_no_error(name: str) -> None:
    process = subprocess.Popen(command(name), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(60) == 141  # as if the signal had ended it, and not the code for problems
    assert errors == ""


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C as in a terminal, also where the tests run in a background that ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("where", ["adapterkit.cli.check.run", "adapterkit.cli.report.checked"])
def test_control_c_ends_with_130_and_no_traceback(
    where: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(where, interrupt)
    assert run("check") == Ran(130, "", "")


@pytest.mark.usefixtures("interruptible")
def test_control_c_while_the_command_line_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupting:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "adapterkit.cli.main":
                signal.raise_signal(signal.SIGINT)

    monkeypatch.delitem(sys.modules, "adapterkit.cli.main")
    monkeypatch.setattr(sys, "meta_path", [Interrupting(), *sys.meta_path])
    with pytest.raises(SystemExit) as ended:
        entry.main()
    assert ended.value.code == 130


@pytest.mark.parametrize(("plain", "colours"), [(None, True), ("1", False)])
def test_colours_on_a_terminal_unless_no_color(plain: str | None, colours: bool, tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("adapterkit: 1\nstack: {}\n")
    environment = {**os.environ, "TERM": "xterm-256color", **({"NO_COLOR": plain} if plain else {})}
    if plain is None:
        environment.pop("NO_COLOR", None)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command("check", str(bad)), stdout=theirs, env=environment)
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 10_000)
        except OSError:  # the other side is closed
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    assert process.wait(60) == 1
    assert (b"\x1b[1;31m" in shown) == colours
    assert b"did you mean" in shown


def test_demo_hands_on_its_options_and_its_result(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    demo = pytest.importorskip("adapterkit.demo")
    asked = []

    class Result:
        passed = False

    def pretend(**options: object) -> Result:
        asked.append(options)
        return Result()

    monkeypatch.setattr(demo, "run", pretend)
    assert run("demo").code == 1
    assert run("demo", "--quick", "--seeds", "1").code == 0
    assert asked == [{"seeds": 3, "quick": False}, {"seeds": 1, "quick": True}]
