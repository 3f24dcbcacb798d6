"""Two real processes over gloo: data parallel, and fully sharded layer by layer."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed import TCPStore

import adapterkit as ak
from tests.mechanisms import workers
from tests.models import tiny

pytestmark = pytest.mark.full  # two fresh interpreters for each test


def spawn(work: Callable[..., None], method: str, directory: Path) -> list[Any]:
    """What every process has found."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # any free port
    arguments = (store.port, str(directory), method)
    context = mp.start_processes(work, arguments, workers.WORLD, join=False, start_method="spawn")
    limit = time.monotonic() + workers.LIMIT
    while not context.join(timeout=5):
        if time.monotonic() > limit:
            for process in context.processes:
                process.kill()
            pytest.fail(f"not done after {workers.LIMIT} s")
    return [torch.load(directory / f"{rank}.pt") for rank in range(workers.WORLD)]


def alone(method: str) -> tuple[list[float], dict[str, Tensor | None], dict[str, Tensor]]:
    """The same training in this process, on all examples at once."""
    model, given = workers.prepared(method)
    losses = workers.optimise(model, given)
    own = dict(ak.of(model)["a"].named_parameters())
    return losses, {key: p.grad for key, p in own.items()}, {key: p.detach() for key, p in own.items()}


def bare() -> Tensor:
    _, given = workers.prepared("lora")
    with torch.no_grad():
        return tiny.build("bert", workers.CLS)(**given)["logits"]


def compare(found: list[Any], method: str) -> None:
    """Every process has the gradients and tensors that one process has; the losses have its loss as mean."""
    losses, gradients, tensors = alone(method)
    mean = torch.tensor([each[0] for each in found]).mean(0)
    assert torch.allclose(mean, torch.tensor(losses), atol=1e-5)
    for each in found:
        assert each[1].keys() == gradients.keys()
        for key, gradient in gradients.items():
            if gradient is None:
                assert each[1][key] is None, key
            else:
                assert gradient.any() and torch.allclose(each[1][key], gradient, atol=1e-5), key
            assert torch.allclose(each[2][key], tensors[key], atol=1e-5), key
        assert torch.allclose(each[3], bare(), atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "vera[r=4]"])
def test_data_parallel(method: str, tmp_path: Path) -> None:
    compare(spawn(workers.data_parallel, method, tmp_path), method)


@pytest.mark.parametrize("method", ["lora", "ia3", "dora"])
def test_fully_sharded(method: str, tmp_path: Path) -> None:
    """Detaching would take tensors out of their groups: it is refused."""
    found = spawn(workers.sharded, method, tmp_path)
    compare([each[:4] for each in found], method)
    assert [each[4] for each in found] == ["sharded"] * workers.WORLD


def test_adapters_that_come_late(tmp_path: Path) -> None:
    """Nothing would keep them equal: each process trained its own, without a word."""
    found = spawn(workers.attached_late, "lora", tmp_path)
    assert found == [["replicated-before"] * 2 + ["sharded-before"] * 2] * workers.WORLD


def test_an_adapter_that_comes_late_and_is_not_trained(tmp_path: Path) -> None:
    """Refused where it is trained, also by one process; else it needs nobody."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model, given = workers.prepared("lora")
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        with pytest.raises(ak.errors.PlanError) as error:
            ak.attach(wrapped, "lora", name="late")
        assert error.value.code == "replicated-before" and list(ak.of(model)) == ["a"]
        ak.attach(wrapped, "lora", name="late", trainable=False)
        assert ak.of(model).active == "late" and torch.isfinite(wrapped(**given)["loss"])
    finally:
        torch.distributed.destroy_process_group()


def test_shared_tensors_that_are_sharded_with_one_layer(tmp_path: Path) -> None:
    found = spawn(workers.sharded_apart, "vera[r=4]", tmp_path)
    assert found == ["shared-apart"] * workers.WORLD


def test_shards_are_not_written_as_an_adapter(tmp_path: Path) -> None:
    """A full checkpoint holds the whole tensors; heads that come late would belong to no group."""
    found = spawn(workers.sharded_files, "lora", tmp_path)
    for codes, kept, _ in found:
        assert codes == ["sharded"] * 4 + ["sharded-before"] * 2 + [""]
        assert kept
    kit = ak.load(tiny.build("bert", workers.CLS), tmp_path / "checkpoint")
    tensors = {key: p.detach() for key, p in kit["a"].named_parameters()}
    assert tensors.keys() == found[0][2].keys()
    assert all(torch.equal(tensors[key], value) for key, value in found[0][2].items())
    losses, _, trained = alone("lora")
    assert len(losses) and all(torch.allclose(tensors[key], trained[key], atol=1e-5) for key in trained)


@pytest.mark.parametrize(
    "method", ["lora", "dora", "seq_bn", "noreft[dropout=0.0]", "prefix_tuning_flat", "prompt_tuning"]
)
def test_flattened_shards(method: str, tmp_path: Path) -> None:
    """Their tensors are empty in one process and another's in the next, and are no DTensors."""
    found = spawn(workers.flattened, method, tmp_path)
    losses, _, tensors = alone(method)
    assert torch.allclose(torch.tensor([each[0] for each in found]).mean(0), torch.tensor(losses), atol=1e-5)
    for _, codes, logits, saved in found:
        assert codes == ["sharded"] * 4 + ["sharded-before"] and not saved
        assert torch.allclose(logits, bare(), atol=1e-5)
    kit = ak.load(tiny.build("bert", workers.CLS), tmp_path / "checkpoint")
    trained = dict(kit["a"].named_parameters())
    assert trained.keys() == tensors.keys()
    assert all(torch.allclose(trained[key], value, atol=1e-5) for key, value in tensors.items())


def test_shards_are_not_merged_or_replaced(tmp_path: Path) -> None:
    """In one group a pass leaves all tensors whole; what is done to them then is lost with them."""
    for codes, moved in spawn(workers.sharded_verbs, "lora", tmp_path):
        assert codes == ["sharded"] * 20
        assert moved == [0.0, 0.0]


@pytest.mark.parametrize("method", ["prefix_tuning", "unipelt"])
def test_what_layers_share_is_sharded_with_one_of_them(method: str, tmp_path: Path) -> None:
    assert spawn(workers.sharded_prefix, method, tmp_path) == [["shared-apart", ""]] * workers.WORLD


def test_the_loss_of_a_fusion_that_is_sharded(tmp_path: Path) -> None:
    model = tiny.build("bert", workers.CLS).train()
    kit = workers.fused(model)
    given = tiny.inputs("bert", workers.CLS, batch=workers.BATCH, padded=False, labels=True)
    losses, expected = [], []
    for own in (False, True):
        model.zero_grad()
        loss = kit.fusion_loss()
        losses.append(loss.item())
        (loss + model(**given)["loss"] if own else loss).backward()
        expected.append({key: p.grad for key, p in kit["a+b"].named_parameters()})
    for found, gradients in spawn(workers.sharded_fusion, "", tmp_path):
        assert found == pytest.approx(losses, abs=1e-6)
        for there, here in zip(gradients, expected, strict=True):
            for key, gradient in here.items():
                if gradient is None:
                    assert there[key] is None or not there[key].any(), key
                else:
                    assert torch.allclose(there[key], gradient, atol=1e-5), key
