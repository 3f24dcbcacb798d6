"""Prompt tuning: `<base>.prompt_tuning.prompt_tunings.<name>.prompt_embedding.weight`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from adapterkit.errors import PlanError, Problem
from adapterkit.files.adapterhub.config import validated
from adapterkit.files.adapterhub.keys import Host, Keyed
from adapterkit.files.adapterhub.member import Member, Part, Shapes
from adapterkit.methods.prompt import PromptTuningConfig
from adapterkit.model.blueprint import Blueprint, Slot

_WEIGHT = "prompt_embedding.weight"


class PromptFile(BaseModel):
    """`config` of an adapter_config.json; fields and defaults of adapters 1.3.0, PromptTuningConfig."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    architecture: Literal["prompt_tuning"]
    prompt_length: int = 10
    prompt_init: str = "random_uniform"
    prompt_init_text: str | None = None
    random_uniform_scale: float = 0.5
    combine: Literal["prefix", "prefix_after_bos"] = "prefix"
    dtype: str | None = None
    init_weights_seed: int | None = None


class PromptMember(Member):
    """A prompt-tuning config on one model. How the vectors were started is not kept."""

    def __init__(self, config: Mapping[str, Any], blueprint: Blueprint) -> None:
        self.theirs = validated(PromptFile, config)
        self.stack = next(iter(blueprint.stacks))
        after = self.theirs.combine == "prefix_after_bos"
        self.config = PromptTuningConfig(
            prompt_length=self.theirs.prompt_length,
            position="after_first" if after else "before",
            # theirs go behind the embeddings and their norm, and stay in everything that the model gives
            insert="out",
            keep_positions=True,
            stacks=(self.stack,),
        )
        self.slots: tuple[Slot, ...] = ()
        self.misplaced: tuple[Problem, ...] = ()
        try:
            self.slots = self.config.select(blueprint).slots
        except PlanError as error:
            self.misplaced = error.problems
        self.hub = blueprint.interface.adapterhub
        self.alone = len(blueprint.stacks) == 1

    def refusals(self) -> Iterator[Problem]:
        if not self.alone:
            message = "AdapterHub has prompt tuning in models of one stack only"
            yield Problem("not-reproducible", message, self.stack)
        for problem in self.misplaced:
            # their library has no prompts in such models either
            yield Problem("not-reproducible", problem.message, self.stack)
        hub = self.hub
        if hub is not None and hub.no_prompt is not None:
            yield Problem("not-reproducible", hub.no_prompt, self.stack)

    def wanted(self, given: Keyed) -> dict[Host, Shapes]:
        width = (self.slots[0].shape or (0, 0))[0]
        return {("prompt", self.stack): {_WEIGHT: (self.theirs.prompt_length, width)}}

    def parts(self, given: Keyed) -> Iterator[Part]:
        tensor = given.parts["prompt", self.stack][_WEIGHT]
        yield Part(self.config, {self.slots[0].address: {"embeds": tensor}})
