"""Several adapters in one batch, against PEFT's `adapter_names`, separate forwards and the bare model.

Run: python -m benchmarks.multi [--rounds 15] [--adapters 1,2,4,8,32] [--sizes 28x64] [--steps prefill,decode]
    [--targets qv,all] [--batch 32]
A decoder with `layers x width`, LoRA of rank 8 on q and v or on all seven maps of a layer; every adapter has
as many examples of the batch.
`one` is a single adapter for the whole batch, `groups` BatchSplit (what Parallel runs), `route` free rows in
mixed order, `separate` one forward for each adapter. Prefill has 16 tokens for each example, decode one token
behind a cache of 16. Reports medians of processor time (on a GPU, of the time until it is done), and medians
of ratios round by round.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaModel

import adapterkit as ak
from benchmarks.measure import environment, interleaved, paired_ratio, show
from benchmarks.spine import device, synchronised

warnings.filterwarnings("ignore")
LENGTH = 16
TARGETS = {
    "qv": ("lora[r=8,init=gaussian]", ["q_proj", "v_proj"]),
    "all": (
        "lora[r=8,init=gaussian,targets=all]",
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    ),
}


def bare(size: str) -> LlamaModel:
    layers, width = (int(part) for part in size.split("x"))
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(width // 64, 4),
        num_key_value_heads=max(width // 64, 4),
        intermediate_size=2 * width,
        vocab_size=1000,
    )
    return LlamaModel(config).eval().to(device())


def with_adapterkit(model: nn.Module, number: int, targets: str) -> ak.Kit:
    for index in range(number):
        kit = ak.attach(
            model, TARGETS[targets][0], name=f"a{index}", seed=index, activate=False, trainable=False
        )
        fill(kit[f"a{index}"].parameters(), index)
    return kit


def with_peft(model: nn.Module, number: int, targets: str) -> Any:
    config = LoraConfig(r=8, lora_alpha=8, target_modules=TARGETS[targets][1])
    wrapped = get_peft_model(model, config, adapter_name="a0")
    for index in range(1, number):
        wrapped.add_adapter(f"a{index}", config)
    fill((p for name, p in wrapped.named_parameters() if "lora_" in name), 0)
    return wrapped.eval()


@torch.no_grad()
def fill(parameters: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def step(model: Any, ids: torch.Tensor, decode: bool, **more: Any) -> Callable[[], Any]:
    """One forward pass; a decoding step writes over the same place of its cache every time."""
    if not decode:
        return lambda: model(input_ids=ids, use_cache=False, **more)
    cache = DynamicCache()
    model(input_ids=ids, past_key_values=cache, use_cache=True, **more)
    last = ids[:, -1:]

    def run() -> Any:
        out = model(input_ids=last, past_key_values=cache, use_cache=True, **more)
        cache.crop(-1)
        return out

    return run


@torch.no_grad()
def measure(
    size: str, number: int, batch: int, decode: bool, targets: str, rounds: int, repeat: int
) -> dict[str, object]:
    model = bare(size)
    ids = torch.randint(0, 1000, (batch, LENGTH), generator=torch.Generator().manual_seed(0)).to(device())
    names = [f"a{index}" for index in range(number)]
    mixed = [names[index % number] for index in range(batch)]
    each = batch // number
    kit = with_adapterkit(copy.deepcopy(model), number, targets)
    wrapped = with_peft(copy.deepcopy(model), number, targets)

    def under(block: Callable[[], Any], run: Callable[[], Any]) -> Callable[[], Any]:
        def call() -> Any:
            with block():
                return run()

        return call

    contestants: dict[str, Callable[[], Any]] = {"bare": step(model, ids, decode)}
    blocks: dict[str, Callable[[], Any]] = {
        "one": lambda: kit.using("a0"),
        "groups": lambda: kit.using(ak.BatchSplit(*names, batch_sizes=each)),
        "route": lambda: kit.using(ak.Route(*names), rows=mixed),
    }
    for name, block in blocks.items():
        with block():
            own = step(kit.model, ids, decode)
        contestants[name] = under(block, own)
    parts = []
    for index, name in enumerate(names):
        with kit.using(name):
            parts.append((name, step(kit.model, ids[index * each : (index + 1) * each], decode)))

    def separate() -> None:
        for name, run in parts:
            with kit.using(name):
                run()

    contestants["separate"] = separate
    contestants["peft"] = step(wrapped, ids, decode, adapter_names=mixed)
    contestants = {name: synchronised(call) for name, call in contestants.items()}
    for call in contestants.values():
        call()
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    times = interleaved(contestants, rounds, repeat, clock=clock)
    found: dict[str, object] = {"size": size, "step": "decode" if decode else "prefill", "batch": batch}
    found |= {"targets": targets, "adapters": number}
    found |= {f"{name} ms": f"{time.median * 1e3:.2f}" for name, time in times.items()}
    for name, other in (
        ("groups", "one"),
        ("groups", "bare"),
        ("route", "bare"),
        ("peft", "bare"),
        ("peft", "route"),
    ):
        found[f"{name}/{other}"] = f"{paired_ratio(times[name], times[other])[1]:.2f}"
    print(*found.values(), flush=True)  # a run that is cut short has told what it knows
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--adapters", default="1,2,4,8,32")
    parser.add_argument("--sizes", default="28x64")
    parser.add_argument("--steps", default="prefill,decode")
    parser.add_argument("--targets", default="qv,all")
    parser.add_argument("--batch", type=int, default=32)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("environment", environment())
    rows = [
        measure(size, int(number), given.batch, kind == "decode", targets, given.rounds, given.repeat)
        for targets in given.targets.split(",")
        for size in given.sizes.split(",")
        for kind in given.steps.split(",")
        for number in given.adapters.split(",")
    ]
    show("several adapters in one batch", rows)


if __name__ == "__main__":
    main()
