"""Forward and train step of every method as a ratio to the bare model.

Forward is that of a frozen adapter, as one is loaded to be used.

Run: python -m benchmarks.methods [--rounds 9] [--sizes 4x256,12x768] [--methods lora,seq_bn,...]
    [--examples 2]
With AdapterHub's `adapters` 1.3.0 in an environment of its own, `python benchmarks/methods_adapters.py`
measures the same models and methods there against its own bare model; only ratios are compared.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable, Mapping

import torch
from torch import nn

import adapterkit as ak
from adapterkit.methods.names import METHODS, PRESETS
from benchmarks.measure import environment, interleaved, paired_ratio, show
from benchmarks.spine import REPEATS, bare, inputs, synchronised

warnings.filterwarnings("ignore")
DEFAULTS = (
    "lora,ia3,vera,dora,dvora,seq_bn,double_seq_bn,par_bn,adapterplus,compacter,compacter++,seq_bn_inv,"
    "prefix_tuning_flat,prefix_tuning,prompt_tuning,loreft,mam,unipelt"
)


def forward(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> Callable[[], object]:
    model.eval()

    @torch.no_grad()
    def call() -> object:
        return model(**batch)

    return synchronised(call)


def step(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> Callable[[], object]:
    """Forward, backward and optimiser step over what is trained: in the bare model all behind its input."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(trained, lr=1e-6)

    def call() -> None:
        model(**batch).last_hidden_state.square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()

    return synchronised(call)


def measure(
    size: str, methods: list[str], rounds: int, examples: int | None = None
) -> list[dict[str, object]]:
    """One row for each method: ratio of the medians' rounds to the bare model's."""
    plain, batch = bare(size), inputs(size, examples)
    rows = []
    for method in methods:
        model = copy.deepcopy(plain)
        kit = ak.attach(model, method, seed=0)
        found: dict[str, object] = {"size": size, "method": method}
        for what, make, change in (("forward", forward, kit.freeze), ("step", step, kit.train)):
            change()
            calls = {"bare": make(copy.deepcopy(plain), batch), "adapted": make(model, batch)}
            for call in calls.values():
                call()
            times = interleaved(calls, rounds, REPEATS[size])
            low, middle, high = paired_ratio(times["adapted"], times["bare"])
            found[what] = f"{middle:.3f} [{low:.3f}, {high:.3f}]"
        rows.append(found)
        print(*found.values(), flush=True)  # a run that is cut short has told what it knows
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sizes", default="4x256,12x768")
    parser.add_argument("--methods", default=DEFAULTS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--examples", type=int, help="examples in a batch; default: 4, at 12x768 8")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(environment())
    known = {*METHODS, *PRESETS}
    wanted = [name for name in given.methods.split(",") if name.split("[")[0] in known]
    for size in given.sizes.split(","):
        show(f"methods {size}", measure(size, wanted, given.rounds, given.examples))


if __name__ == "__main__":
    main()
