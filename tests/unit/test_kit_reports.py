"""The state of a kit as text, HTML and data; the library says nothing on its own."""

from __future__ import annotations

import json
import logging
from html.parser import HTMLParser

import pytest

import adapterkit as ak
from adapterkit import report
from tests.unit.kit_scene import INPUTS, bert

TABLE = """\
BertForSequenceClassification (bert), 19,347 parameters
adapter  method  slots  parameters  %     dtype    device  active  trained
a        lora    6      1,699       8.78  float32  cpu     yes     yes
bb       ia3     6      307         1.59  float32  cpu     no      no"""


@pytest.fixture
def kit(monkeypatch: pytest.MonkeyPatch) -> ak.Kit:
    """Two adapters; the version of transformers counts as verified."""
    monkeypatch.setattr(report, "unverified", lambda: None)
    kit = ak.attach(bert(), "lora[targets=[q, v, up], r=4]", name="a")
    return kit.attach("ia3", name="bb", activate=False, trainable=False)


def test_summary(kit: ak.Kit) -> None:
    assert kit.summary() == TABLE
    assert str(kit) == repr(kit) == TABLE
    kit.merge("bb")
    assert (
        kit.summary().splitlines()[3]
        == "bb       ia3     6      307         1.59  float32  cpu     merged  no"
    )


def test_status_as_data(kit: ak.Kit) -> None:
    found = kit.status().to_dict()
    assert found["adapters"][1] == {
        "name": "bb",
        "method": "ia3",
        "slots": 6,
        "parameters": 307,
        "percent": pytest.approx(100 * 307 / 19347),
        "dtype": "float32",
        "device": "cpu",
        "active": False,
        "trainable": False,
        "merged": False,
    }
    assert {key: value for key, value in found.items() if key != "adapters"} == {
        "model": "BertForSequenceClassification",
        "interface": "bert",
        "base_parameters": 19347,
        "notes": (),
    }
    assert json.loads(json.dumps(found))["adapters"][0]["name"] == "a"


def test_a_version_that_was_not_verified_is_a_line(kit: ak.Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "unverified", lambda: "not verified & new")
    assert kit.status().notes == ("not verified & new",)
    assert kit.summary() == f"{TABLE}\nnot verified & new"
    assert "not verified &amp; new" in kit._repr_html_()


class Cells(HTMLParser):
    """Rows of the tables in a page."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "tr":
            self.rows.append([])

    def handle_data(self, data: str) -> None:
        if self.rows:
            self.rows[-1].append(data)


def test_html_holds_the_same_cells_as_the_text(kit: ak.Kit) -> None:
    cells = Cells()
    cells.feed(kit._repr_html_())
    assert cells.rows == [line.split() for line in TABLE.splitlines()[1:]]


def test_numbers_of_an_adapter(kit: ak.Kit) -> None:
    trained = sum(parameter.numel() for parameter in kit["a"].parameters())
    assert kit["a"].num_parameters == trained == 1699
    assert kit["a"].config == ak.LoRAConfig(targets=("q", "v", "up"), r=4)
    assert repr(kit["a"]) == str(kit["a"].plan)
    assert set(kit["bb"].state_dict()) == {
        *(f"encoder.{i}.{role}.scale" for i in (0, 1) for role in ("attention.k", "attention.v", "mlp.down")),
        "head.classifier.weight",
        "head.classifier.bias",
    }
    assert not any(value.requires_grad for value in kit["a"].state_dict().values())


def test_the_library_prints_nothing_and_logs_the_plan(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="adapterkit"):
        kit = ak.attach(bert(), "lora")
        kit.model(**INPUTS)
        kit.merge("default").unmerge().detach()
    assert [record.getMessage() for record in caplog.records if record.name == "adapterkit"] == [
        str(ak.plan(bert(), "lora"))
    ]
    assert capfd.readouterr() == ("", "")
