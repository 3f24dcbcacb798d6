"""Law of generation: with a cache and without it the same tokens come out."""

from __future__ import annotations

from typing import Any

import torch

from tests.laws.matrix import Case

TOKENS = 5


def test_generate_gives_the_same_with_and_without_a_cache(generating_case: Case) -> None:
    case = generating_case
    model, inputs = case.attached().model, case.inputs()

    def generate(use_cache: bool) -> Any:
        return model.generate(
            **inputs,
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            do_sample=False,
            use_cache=use_cache,
            return_dict_in_generate=True,
            output_logits=True,
        )

    cached, whole = generate(True), generate(False)
    assert len(cached.logits) == TOKENS
    assert torch.equal(cached.sequences, whole.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(whole.logits), rtol=1e-4, atol=1e-5)
    base = case.model().generate(
        **inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    assert not torch.allclose(base.logits[0], cached.logits[0], atol=1e-3), "the adapter took no part"
