"""Every claim of the interfaces outside the table holds in tiny models; a slice of structures by default."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from packaging.version import Version

from adapterkit.versions import TRANSFORMERS_TESTED
from tests.authoring import sweep
from tests.models import further

pytestmark = [
    # an old version of one source file is scripted when it is imported, another calls what is to be renamed
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.input_embeds. is deprecated:FutureWarning"),
]

SINCE = Version(TRANSFORMERS_TESTED[1])
OLDER = {
    "gemma3n_text": "layers that take the keys of an earlier one have matrices for them, which nothing calls",
    "jamba": "a matrix of the state space is called there, of which newer versions use the weight alone",
}
"""Types of which older versions do something else; they resolve there."""
SLICE = (
    "altclip",  # two towers, with a norm behind one
    "clap",  # a tower that has no interface
    "falcon_h1",  # two modules whose sum is the branch
    "gemma3n_text",  # several streams
    "layoutlmv3",  # arguments that are not given
    "minimax",  # a stream that is normed itself
    "qwen3_vl_vision",  # no rows of examples
    "speech-encoder-decoder",  # made of models
    "timesformer",  # a stream in parts
    "wav2vec2-conformer",  # more than two sublayers
)


def types() -> list[Any]:
    return [pytest.param(t, marks=[] if t in SLICE else [pytest.mark.full]) for t in further.types()]


@pytest.mark.parametrize("model_type", types())
def test_every_claim_holds(model_type: str) -> None:
    if model_type in OLDER and Version(transformers.__version__) < SINCE:
        pytest.skip(OLDER[model_type])
    record = sweep.look((sweep.TYPE, model_type), methods=False)
    assert (record["state"], record["facts"]) == ("holds", [])
