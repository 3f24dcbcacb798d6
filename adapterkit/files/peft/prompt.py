"""PEFT's prompt tuning of causal language models: P vectors before everything, padding included.

Source: peft 0.21 peft_model.py, PeftModelForCausalLM.forward. Other task types give poolers and heads the
prompt's positions to read, or put a second prompt before a decoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from adapterkit.adapter import Adapter
from adapterkit.errors import FileFormatError, Problem
from adapterkit.files.content import Content
from adapterkit.files.peft.config import PromptFile
from adapterkit.methods.prompt import PromptTuningConfig
from adapterkit.model.blueprint import Blueprint, Slot
from adapterkit.model.embeddings import output_embeddings

KEY = "prompt_embeddings"
CAUSAL = "CAUSAL_LM"


def content(
    said: PromptFile, tensors: Mapping[str, torch.Tensor], blueprint: Blueprint, source: str, facts: Any
) -> Content:
    """The adapter that a file holds.

    Raises: FileFormatError: the prompt is one of another kind of model, or has no place in this one.
    """
    problems = []
    if said.task_type != CAUSAL:
        message = f"is a prompt for {said.task_type}: PEFT shows it to what reads the states"
        problems.append(Problem("peft-prompt", message, "task_type", CAUSAL, file=source))
    if said.num_transformer_submodules not in (None, 1):
        message = "holds prompts of several stacks"
        problems.append(Problem("peft-prompt", message, "num_transformer_submodules", "1", file=source))
    config = PromptTuningConfig(prompt_length=said.num_virtual_tokens, before_padding=True)
    slots = config.select(blueprint).slots
    problems += _misplaced(slots, blueprint, source)
    problems += [
        Problem("unknown-tensors", "is no tensor of a prompt", key, KEY, file=source)
        for key in sorted(tensors.keys() - {KEY})
    ]
    if KEY not in tensors:
        problems.append(Problem("missing-tensors", "the file lacks this tensor", KEY, file=source))
    if problems:
        raise FileFormatError(problems)
    address = slots[0].address
    return Content(
        name="default",
        config=config,
        tensors={f"{address}.embeds": tensors[KEY]},
        addresses=(address,),
        source=source,
        facts=facts,
    )


def written(
    adapter: Adapter, blueprint: Blueprint, file: str
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and fields of the config for `PeftModel.from_pretrained`.

    Raises: FileFormatError: PEFT would put the prompt elsewhere, or show it to something.
    """
    config = adapter.config
    assert isinstance(config, PromptTuningConfig)
    problems = _misplaced(adapter.plan.slots, blueprint, file)
    if not config.before_padding or config.keep_positions:
        message = "PEFT's prompt stands before padding on the left, and its positions are not kept here"
        expected = "before_padding=True, keep_positions=False, or adapterkit's own format"
        problems.append(Problem("peft-prompt", message, expected=expected, file=file))
    if output_embeddings(blueprint.model) is None or adapter.heads:
        message = f"{type(blueprint.model).__name__} is no causal language model"
        problems.append(Problem("peft-prompt", message, expected="adapterkit's own format", file=file))
    if problems:
        raise FileFormatError(problems)
    (unit,) = adapter.units.values()
    vectors = unit.get_parameter("embeds").detach()
    fields = {
        "peft_type": "PROMPT_TUNING",
        "task_type": CAUSAL,
        "num_virtual_tokens": vectors.shape[0],
        "token_dim": vectors.shape[1],
        "num_transformer_submodules": 1,
    }
    return {KEY: vectors}, fields


def _misplaced(slots: tuple[Slot, ...], blueprint: Blueprint, file: str) -> list[Problem]:
    """Why this model has not the one place where PEFT puts a prompt: among the embedded tokens."""
    if len(blueprint.stacks) != 1 or len(slots) != 1:
        message = "prompts of PEFT are read and written for models of one stack"
        return [Problem("peft-prompt", message, ", ".join(blueprint.stacks), file=file)]
    if slots[0].role != "tokens":
        return [Problem("peft-prompt", "this model takes no embedded tokens", slots[0].address, file=file)]
    return []
