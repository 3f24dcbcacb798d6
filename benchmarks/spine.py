"""LoRA on BERT against PEFT and the bare model: attach, forward, train step, disabled.

Run: python -m benchmarks.spine [--rounds 15] [--sizes 2x32,4x256,12x768] [--parts attach,forward,step]
Reports median and quartiles of the time, and of the ratio round by round, over interleaved rounds.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertModel

import adapterkit as ak
from benchmarks.measure import Times, environment, interleaved, paired_ratio, show

warnings.filterwarnings("ignore")
BATCHES = {"2x32": (4, 16), "4x256": (4, 64), "12x768": (8, 128)}
REPEATS = {"2x32": 20, "4x256": 3, "12x768": 1}


def bare(size: str) -> BertModel:
    """A BERT with `layers x width`, on the GPU if there is one."""
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
    return BertModel(config, add_pooling_layer=False).to(device())


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronised(call: Callable[[], object]) -> Callable[[], object]:
    """The call, waited for where the device runs ahead."""

    def run() -> object:
        result = call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return result

    return run


def inputs(size: str, examples: int | None = None) -> dict[str, torch.Tensor]:
    """A batch of random tokens without padding, of as many examples as wanted."""
    batch, length = BATCHES[size]
    ids = torch.randint(0, 1000, (examples or batch, length), generator=torch.Generator().manual_seed(0)).to(
        device()
    )
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def with_peft(model: nn.Module) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=8, target_modules=["query", "value"]))


def with_adapterkit(model: nn.Module) -> ak.Kit:
    return ak.attach(model, "lora[r=8]")


def row(
    name: str, size: str, times: dict[str, Times], ratios: tuple[tuple[str, str], ...]
) -> dict[str, object]:
    found: dict[str, object] = {"what": name, "size": size}
    for contestant, time in times.items():
        low, high = time.quartiles
        found[f"{contestant} ms"] = f"{time.median * 1e3:.3f} [{low * 1e3:.3f}, {high * 1e3:.3f}]"
    for a, b in ratios:
        low, middle, high = paired_ratio(times[a], times[b])
        found[f"{a}/{b}"] = f"{middle:.3f} [{low:.3f}, {high:.3f}]"
    return found


def attach(size: str, rounds: int) -> dict[str, object]:
    """Time to attach to a fresh model. Both libraries are warm: each has attached once before."""
    model = bare(size)
    with_peft(copy.deepcopy(model))
    with_adapterkit(copy.deepcopy(model))
    fresh: dict[str, nn.Module] = {}

    def prepare(name: str) -> Callable[[], object]:
        return lambda: fresh.__setitem__(name, copy.deepcopy(model))

    times = interleaved(
        {
            "adapterkit": synchronised(lambda: with_adapterkit(fresh["adapterkit"])),
            "peft": synchronised(lambda: with_peft(fresh["peft"])),
        },
        rounds,
        before={"adapterkit": prepare("adapterkit"), "peft": prepare("peft")},
    )
    return row("attach", size, times, (("peft", "adapterkit"),))


def models(size: str) -> tuple[nn.Module, nn.Module, nn.Module, ak.Kit]:
    """Bare, adapterkit's and PEFT's model with the same weights."""
    plain, ours, theirs = bare(size), bare(size), bare(size)
    return plain, ours, with_peft(theirs), with_adapterkit(ours)


def forward(size: str, rounds: int) -> list[dict[str, object]]:
    plain, ours, theirs, _ = models(size)
    batch, repeat = inputs(size), REPEATS[size]
    off = copy.deepcopy(ours)
    ak.of(off).activate(None)
    for model in (plain, ours, theirs, off):
        model.eval()

    def run(model: nn.Module) -> Callable[[], object]:
        @torch.no_grad()
        def call() -> object:
            return model(**batch)

        for _ in range(3):
            call()
        return synchronised(call)

    times = interleaved(
        {"bare": run(plain), "adapterkit": run(ours), "peft": run(theirs), "disabled": run(off)},
        rounds,
        repeat,
    )
    pairs = (("adapterkit", "bare"), ("adapterkit", "peft"), ("disabled", "bare"))
    return [row("forward", size, times, pairs)]


def step(size: str, rounds: int) -> dict[str, object]:
    """Forward, backward and optimiser step."""
    _, ours, theirs, _ = models(size)
    batch, repeat = inputs(size), REPEATS[size]

    def run(model: nn.Module) -> Callable[[], object]:
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimiser = torch.optim.SGD(trained, lr=1e-4)

        def call() -> None:
            loss = model(**batch).last_hidden_state.square().mean()
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()

        for _ in range(3):
            call()
        return synchronised(call)

    times = interleaved({"adapterkit": run(ours), "peft": run(theirs)}, rounds, repeat)
    return row("train step", size, times, (("adapterkit", "peft"),))


def epilogue(rounds: int, width: int = 768, rank: int = 8) -> dict[str, object]:
    """The q and v projections of one layer alone, with and without LoRA: what the update costs."""
    hosts = nn.ModuleList(nn.Linear(width, width) for _ in range(2)).to(device()).requires_grad_(False)
    plain, ours, theirs = (copy.deepcopy(hosts) for _ in range(3))
    spec = {
        "adapterkit": 1,
        "stacks": {
            "encoder": {
                "layers": "layers",
                "attention": {"core": ".", "q": "q", "v": "v", "out": "."},
            }
        },
    }

    class Pair(nn.Module):
        def __init__(self, pair: nn.ModuleList) -> None:
            super().__init__()
            layer = nn.Module()
            layer.q, layer.v = pair[0], pair[1]
            self.layers = nn.ModuleList([layer])

    ak.attach(Pair(ours), ak.LoRAConfig(r=rank), interface=spec)
    wrapped = get_peft_model(
        theirs, LoraConfig(r=rank, lora_alpha=rank, target_modules=["0", "1"])
    ).base_model.model
    x = torch.randn(8, 128, width, device=device())

    def run(pair: nn.Module) -> Callable[[], object]:
        q, v = pair[0], pair[1]

        @torch.no_grad()
        def call() -> object:
            return q(x), v(x)

        for _ in range(3):
            call()
        return synchronised(call)

    times = interleaved({"bare": run(plain), "adapterkit": run(ours), "peft": run(wrapped)}, rounds, 5)
    return row("q+v epilogue", str(width), times, (("adapterkit", "bare"), ("peft", "bare")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sizes", default="2x32,4x256,12x768")
    parser.add_argument("--parts", default="attach,forward,step,epilogue")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(environment())
    sizes, parts = given.sizes.split(","), given.parts.split(",")
    if "attach" in parts:
        show("attach", [attach(size, max(given.rounds, 9)) for size in sizes])
    if "forward" in parts:
        show("forward", [found for size in sizes for found in forward(size, given.rounds)])
    if "step" in parts:
        show("train step", [step(size, given.rounds) for size in sizes])
    if "epilogue" in parts:
        show("epilogue", [epilogue(given.rounds)])


if __name__ == "__main__":
    main()
