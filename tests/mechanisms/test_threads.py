"""Which adapter acts is decided for each thread; 16 threads compute the bits that one thread computes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event, Thread, current_thread
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

import adapterkit as ak
from tests.mechanisms.scene import attach, run
from tests.models import tiny

THREADS, ROUNDS = 16, 8


def in_threads(model: Callable[..., object], kit: ak.Kit, given: dict[str, Tensor], names: list[str]) -> list:
    """Outputs by thread; thread i uses adapter names[i], and all of them run at the same time."""
    barrier = Barrier(THREADS)

    def work(name: str) -> list[Tensor]:
        barrier.wait(timeout=60)  # else one that fails before it would leave the others waiting
        found = []
        # torch sometimes compiles a graph anew when threads look for theirs at once, without adapters too;
        # its settings are those of one thread
        with torch._dynamo.config.patch(recompile_limit=256):
            for _ in range(ROUNDS):
                with kit.using(name):
                    found.append(run(model, given))
                    assert kit.active == name
        return found

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(work, names))


def prepared(row: str, number: int) -> tuple[nn.Module, ak.Kit, dict[str, Tensor], dict[str, Tensor]]:
    """A model with adapters a0, a1, ... of three methods, and what each gives in one thread."""
    model, given = tiny.build(row), tiny.inputs(row)
    for i in range(number):
        kit = attach(model, ("lora[r=2]", "ia3", "dora[r=2]")[i % 3], f"a{i}", seed=i, activate=False)
    serial = {}
    for name in kit:
        kit.activate(name)
        serial[name] = run(model, given)
    kit.activate(None)
    return model, kit, given, serial


@pytest.mark.parametrize("row", ["bert", "gpt2"])
def test_threads_with_different_adapters(row: str) -> None:
    model, kit, given, serial = prepared(row, THREADS)
    assert len({tuple(value.tolist()) for value in serial.values()}) == THREADS
    bare = run(model, given)
    for name, found in zip(kit, in_threads(model, kit, given, list(kit)), strict=True):
        assert all(torch.equal(each, serial[name]) for each in found), name
    assert kit.active is None and torch.equal(run(model, given), bare)


def test_threads_that_share_a_compiled_model() -> None:
    torch._dynamo.reset()
    model, kit, given, _ = prepared("bert", 4)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    serial = {}
    for name in kit:  # each plan is compiled once before serving
        with kit.using(name):
            serial[name] = run(compiled, given)
    names = [f"a{i % 4}" for i in range(THREADS)]
    for name, found in zip(names, in_threads(compiled, kit, given, names), strict=True):
        assert all(torch.equal(each, serial[name]) for each in found), name
    torch._dynamo.reset()


def test_a_fresh_thread_sees_the_default() -> None:
    model, kit, given, serial = prepared("bert", 2)
    kit.activate("a0")
    seen = []

    def work() -> None:
        seen.append((kit.active, run(model, given)))

    with kit.using("a1"):
        thread = Thread(target=work)
        thread.start()
        thread.join()
        assert kit.active == "a1" and torch.equal(run(model, given), serial["a1"])
    assert seen[0][0] == "a0" and torch.equal(seen[0][1], serial["a0"])


def test_blocks_nest_and_exceptions_restore() -> None:
    model, kit, given, serial = prepared("bert", 3)
    kit.activate("a0")
    with pytest.raises(KeyError, match="inside"), kit.using("a1"):
        with kit.using("a2"):
            assert torch.equal(run(model, given), serial["a2"])
        assert torch.equal(run(model, given), serial["a1"])
        with pytest.raises(ak.errors.NotAttachedError), kit.using("nobody"):
            pass
        assert kit.active == "a1"
        with kit.disabled():
            assert kit.active is None
        raise KeyError("inside")
    assert kit.active == "a0" and torch.equal(run(model, given), serial["a0"])


def test_blocks_of_generators_that_lie_across_each_other_are_refused() -> None:
    """The first to be closed said again what had been before it, and the last left its adapter for good."""
    model, kit, given, serial = prepared("bert", 3)
    kit.activate("a0")

    def waits(name: str) -> Iterator[None]:
        with kit.using(name):
            yield

    one, two = waits("a1"), waits("a2")
    next(one)
    next(two)
    with pytest.raises(ak.errors.CompositionError) as error:
        one.close()
    assert error.value.code == "interleaved-blocks"
    assert torch.equal(run(model, given), serial["a2"])
    two.close()
    assert kit.active == "a0" and torch.equal(run(model, given), serial["a0"])


def test_blocks_of_tasks_that_lie_across_each_other_are_refused() -> None:
    model, kit, given, serial = prepared("bert", 3)
    kit.activate("a0")

    async def serve(name: str, waits: float) -> torch.Tensor:
        with kit.using(name):
            await asyncio.sleep(waits)
            return run(model, given)

    async def both() -> list[Any]:
        return await asyncio.gather(serve("a1", 0.01), serve("a2", 0), return_exceptions=True)

    found, refused = asyncio.run(both())
    assert torch.equal(found, serial["a1"]), "the first has what it asked for, not what the second did"
    assert isinstance(refused, ak.errors.CompositionError) and refused.code == "interleaved-blocks"
    with kit.using("a2"):  # one around the loop is no other task's
        assert torch.equal(asyncio.run(serve("a1", 0)), serial["a1"])
    assert kit.active == "a0" and torch.equal(run(model, given), serial["a0"])


def test_an_adapter_that_is_activated_inside_a_block_acts_after_it() -> None:
    model, kit, given, serial = prepared("bert", 3)
    kit.activate("a0")
    with kit.using("a1"):
        kit.activate("a2")
        assert torch.equal(run(model, given), serial["a1"])
    assert torch.equal(run(model, given), serial["a2"])


def test_two_models_do_not_share_a_block() -> None:
    _, kit, given, _ = prepared("bert", 2)
    other, second, _, serial = prepared("bert", 2)
    kit.activate("a0")
    second.activate("a0")
    with kit.using("a1"):
        assert torch.equal(run(other, given), serial["a0"])


def test_an_override_with_gradients_trains_what_it_names() -> None:
    model, kit, given, _ = prepared("bert", 2)
    kit.activate("a0")
    with kit.using("a1"):
        tiny.output(model(**given)).square().sum().backward()
    assert all(p.grad is not None for p in kit["a1"].parameters())
    assert all(p.grad is None for p in kit["a0"].parameters())


# ---------------------------------------------------------------------------- changes in the midst of a pass


class Halted:
    """Another thread that stops within a layer of its pass until it is let go."""

    def __init__(self, call: Callable[[], Tensor], module: nn.Module) -> None:
        self.call, self.found, self.failed = call, [], []
        self.reached, self.go_on = Event(), Event()
        self.hook = module.register_forward_pre_hook(self.wait)
        self.thread = Thread(target=self.work)

    def wait(self, module: nn.Module, args: Any) -> None:
        if current_thread() is self.thread:
            self.reached.set()
            assert self.go_on.wait(60)

    def work(self) -> None:
        try:
            self.found.append(self.call())
        except BaseException as error:
            self.failed.append(error)

    def __enter__(self) -> Halted:
        self.thread.start()
        assert self.reached.wait(60)
        return self

    def __exit__(self, *error: Any) -> None:
        self.go_on.set()
        self.thread.join(60)
        self.hook.remove()
        assert not self.failed


CHANGES: dict[str, Callable[[ak.Kit], Any]] = {
    "detach": lambda kit: kit.detach("a0"),
    "detach all": lambda kit: kit.detach(),
    "activate": lambda kit: kit.activate("a1"),
    "replace": lambda kit: kit.attach("lora[r=2]", name="a0", replace=True),
    "attach": lambda kit: kit.attach("lora[r=2]", name="new"),
    "merge": lambda kit: kit.merge("a0"),
    "merge_and_detach": lambda kit: kit.merge_and_detach("a0"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_acts_is_not_changed_under_a_pass_of_another_thread(change: str) -> None:
    """It had a KeyError, or half a pass of each."""
    model, kit, given, serial = prepared("bert", 2)
    kit.activate("a0")
    keys = list(model.state_dict())
    with Halted(lambda: run(model, given), model.encoder.layer[1]) as other:
        with pytest.raises(ak.errors.PlanError) as error:
            CHANGES[change](kit)
        assert error.value.code == "in-use" and "another thread" in str(error.value)
        assert kit.active == "a0" and list(kit) == ["a0", "a1"] and list(model.state_dict()) == keys
        kit.activate("a0")  # as it is
    assert torch.equal(other.found[0], serial["a0"])
    CHANGES[change](kit)


@pytest.mark.parametrize("change", ["detach", "detach all", "replace", "merge", "merge_and_detach"])
def test_nor_is_it_taken_from_under_a_block_of_another_thread(change: str) -> None:
    model, kit, given, serial = prepared("bert", 2)

    def work() -> Tensor:
        with kit.using("a0"):
            return run(model, given)

    with Halted(work, model.encoder.layer[1]) as other:
        with pytest.raises(ak.errors.PlanError) as error:
            CHANGES[change](kit)
        assert error.value.code == "in-use" and "kit.using('a0')" in str(error.value)
    assert torch.equal(other.found[0], serial["a0"])
    CHANGES[change](kit)


def test_what_no_pass_uses_can_be_changed_in_the_midst_of_it() -> None:
    model, kit, given, serial = prepared("bert", 3)

    def work() -> Tensor:
        with kit.using("a0"):
            return run(model, given)

    with Halted(work, model.encoder.layer[1]) as other:
        kit.detach("a1")
        kit.activate("a2")
        kit.attach("lora[r=2]", name="new", activate=False)
    assert torch.equal(other.found[0], serial["a0"]) and kit.active == "a2"


def test_a_pass_of_another_model_is_no_concern() -> None:
    model, kit, given, serial = prepared("bert", 2)
    _, other_kit, _, _ = prepared("bert", 2)
    kit.activate("a0")
    with Halted(lambda: run(model, given), model.encoder.layer[1]) as other:
        other_kit.activate("a1")
        other_kit.detach()
    assert torch.equal(other.found[0], serial["a0"])


def test_a_pass_of_a_wrapper_and_of_generate() -> None:
    """Between the steps of `generate`, and in what is around the model, it is still one pass."""
    model, kit, given, _ = prepared("bert", 2)
    kit.activate("a0")
    halt = nn.Identity()
    around = nn.Sequential(halt, model)
    with Halted(lambda: around(given["input_ids"]).last_hidden_state, halt):
        with pytest.raises(ak.errors.PlanError):
            kit.detach("a0")
    row, cls = "gpt2", "GPT2LMHeadModel"
    model, given = tiny.build(row, cls), tiny.inputs(row, cls)
    kit = attach(model, "lora[r=2]", "a0")

    class Pause(LogitsProcessor):
        def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
            halt(ids)
            return scores

    with Halted(lambda: model.generate(**given, max_new_tokens=2, logits_processor=[Pause()]), halt):
        with pytest.raises(ak.errors.PlanError):
            kit.detach("a0")
    kit.detach("a0")


def test_a_block_of_a_thread_that_has_ended_holds_nothing() -> None:
    _, kit, _, _ = prepared("bert", 2)
    held = []

    def work() -> None:
        block = kit.using("a0")
        block.__enter__()
        held.append(block)

    thread = Thread(target=work)
    thread.start()
    thread.join()
    kit.detach("a0")
    with pytest.raises(ak.errors.CompositionError):
        held[0].__exit__(None, None, None)
