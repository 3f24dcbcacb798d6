"""Interfaces of types outside the table: every class of every type fits, on the meta device."""

from __future__ import annotations

import re

import pytest
import torch

from adapterkit.model.resolve import resolve
from tests.models import further

# an old version of one source file is scripted when it is imported
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

KINDS = ("CausalLM", "MaskedLM", "ConditionalGeneration", "LMHeadModel")
BEHIND = {  # classes whose head is no module, or which have one beside a vocabulary
    "BlipForQuestionAnswering",
    "ImageGPTForCausalImageModeling",
    "LukeForMaskedLM",
    "RoCBertForPreTraining",
    "TapasForQuestionAnswering",
}


def fits(model_type: str, every: bool) -> int:
    """How many classes of a type were built; their interface resolves, and heads are where names say."""
    config, built = further.config(model_type), 0
    for cls in further.classes(model_type):
        try:
            with torch.device("meta"):
                model = cls(config)
        except (ValueError, RuntimeError, AttributeError, ImportError, TypeError):
            continue  # it wants another config
        blueprint = resolve(model)
        built += 1
        assert blueprint.slots or any("branch" not in without for without in blueprint.without.values())
        name = cls.__name__
        if name not in BEHIND and re.search("For[A-Z]", name):
            assert bool(blueprint.heads) != name.endswith(KINDS), (name, blueprint.heads)
        if not every:
            break
    return built


@pytest.mark.parametrize("model_type", further.types())
def test_one_class_of_every_type_fits(model_type: str) -> None:
    assert fits(model_type, every=False) == 1


@pytest.mark.full
@pytest.mark.parametrize("model_type", further.types())
def test_all_classes_of_every_type_fit(model_type: str) -> None:
    assert fits(model_type, every=True) >= 1


def test_variants_are_of_types_that_are_shipped() -> None:
    assert {t for t, _ in further.VARIANTS.values()} <= set(further.types())
