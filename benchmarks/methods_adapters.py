"""The same ratios for AdapterHub's `adapters`, in an environment of its own. Needs nothing of adapterkit.

Run there: python benchmarks/methods_adapters.py [--rounds 9] [--sizes 4x256,12x768] [--methods lora,ia3,...]
    [--examples 2]
"""

import argparse
import copy
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import adapters
import torch
import transformers
from adapters import AdapterPlusConfig
from transformers import BertConfig, BertModel

from benchmarks.measure import interleaved, paired_ratio, show

warnings.filterwarnings("ignore")
BATCHES = {"2x32": (4, 16), "4x256": (4, 64), "12x768": (8, 128)}
REPEATS = {"2x32": 20, "4x256": 3, "12x768": 1}
METHODS = {
    "lora": "lora",
    "ia3": "ia3",
    "vera": "vera",
    "dora": "dora",
    "dvora": "dvora",
    "seq_bn": "seq_bn",
    "double_seq_bn": "double_seq_bn",
    "par_bn": "par_bn",
    "adapterplus": AdapterPlusConfig(stochastic_depth=0.0),
    "compacter": "compacter[reduction_factor=32]",
    "compacter++": "compacter++[reduction_factor=32]",
    "seq_bn_inv": "seq_bn_inv",
    "prefix_tuning_flat": "prefix_tuning_flat",
    "prefix_tuning": "prefix_tuning",
    "prompt_tuning": "prompt_tuning",
    "loreft": "loreft",
    "mam": "mam",
    "unipelt": "unipelt",
}


def bare(size: str) -> BertModel:
    layers, width = (int(part) for part in size.split("x"))
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(width // 64, 2),
        intermediate_size=4 * width,
        vocab_size=1000,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertModel(config, add_pooling_layer=False)


def inputs(size: str, examples: int | None) -> dict:
    batch, length = BATCHES[size]
    ids = torch.randint(0, 1000, (examples or batch, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def forward(model, batch):
    model.eval()

    @torch.no_grad()
    def call():
        return model(**batch)

    return call


def step(model, batch):
    model.train()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-6)

    def call():
        model(**batch).last_hidden_state.square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()

    return call


def measure(size: str, methods: list[str], rounds: int, examples: int | None) -> list[dict]:
    plain, batch, rows = bare(size), inputs(size, examples), []
    for name in methods:
        config = METHODS[name]
        model = copy.deepcopy(plain)
        adapters.init(model)
        found = {"size": size, "method": name}
        try:
            model.add_adapter("a", config=config)
            model.train_adapter("a")
            for what, make in (("forward", forward), ("step", step)):
                calls = {"bare": make(copy.deepcopy(plain), batch), "adapted": make(model, batch)}
                for call in calls.values():
                    call()
                times = interleaved(calls, rounds, REPEATS[size])
                low, middle, high = paired_ratio(times["adapted"], times["bare"])
                found[what] = f"{middle:.3f} [{low:.3f}, {high:.3f}]"
        except Exception as error:
            found["forward"] = found["step"] = f"{type(error).__name__}"
        rows.append(found)
        print(*found.values(), flush=True)  # a run that is cut short has told what it knows
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sizes", default="4x256,12x768")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--examples", type=int)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(
        {
            "adapters": adapters.__version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        }
    )
    for size in given.sizes.split(","):
        show(
            f"adapters methods {size}", measure(size, given.methods.split(","), given.rounds, given.examples)
        )
