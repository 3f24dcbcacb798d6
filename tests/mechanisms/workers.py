"""What the processes of the distributed tests run. A module of its own, since spawned processes import it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import adapterkit as ak
from tests.mechanisms.scene import attach
from tests.models import tiny

CLS, WORLD, BATCH, STEPS, RATE = "BertForSequenceClassification", 2, 4, 3, 0.1
LIMIT = 240  # seconds
Given = dict[str, Tensor]


def prepared(method: str) -> tuple[nn.Module, Given]:
    """The same adapted model and the same batch in every process."""
    model = tiny.build("bert", CLS).train()
    attach(model, method)
    return model, tiny.inputs("bert", CLS, batch=BATCH, padded=False, labels=True)


def share(given: Given, rank: int) -> Given:
    """The examples of one process."""
    size = BATCH // WORLD
    return {key: value[rank * size : (rank + 1) * size] for key, value in given.items()}


def optimise(model: nn.Module, given: Given) -> list[float]:
    """A few steps of plain gradient descent. Returns the losses."""
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    losses = []
    for _ in range(STEPS):
        optimiser.zero_grad()
        loss = model(**given)["loss"]
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def join(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=LIMIT)
    )


def finish(rank: int, directory: str, found: Any) -> None:
    torch.save(found, Path(directory) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def whole(tensor: Tensor | None) -> Tensor | None:
    """A sharded tensor from all processes together."""
    found = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return None if found is None else found.detach().clone()


def data_parallel(rank: int, port: int, directory: str, method: str) -> None:
    join(rank, port)
    model, given = prepared(method)
    wrapped = DistributedDataParallel(model)
    kit = ak.of(wrapped)
    losses = optimise(wrapped, share(given, rank))
    with kit.disabled(), torch.no_grad():
        bare = wrapped(**given)["logits"]
    gradients = {key: p.grad for key, p in kit["a"].named_parameters()}
    finish(rank, directory, (losses, gradients, kit["a"].state_dict(), bare))


def attached_late(rank: int, port: int, directory: str, method: str) -> None:
    """What comes behind the wrapper or the shards, which would be another one in each process."""
    join(rank, port)
    codes = []
    for late in (DistributedDataParallel, shard):
        model, _ = prepared(method)
        wrapped = late(model) or model
        for first in (True, False):
            if first:
                bare = tiny.build("bert", CLS).train()
                wrapped, kept = late(bare) or bare, wrapped
            try:
                ak.attach(wrapped, method, name="late", head=False)
                codes.append("")
            except ak.errors.PlanError as error:
                codes.append(error.code)
            wrapped = kept
    finish(rank, directory, codes)


def shard(model: nn.Module) -> None:
    """Each layer for itself, the rest together."""
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def sharded_apart(rank: int, port: int, directory: str, method: str) -> None:
    join(rank, port)
    model, given = prepared(method)
    shard(model)
    code = ""
    try:
        model(**given)
    except ak.errors.PlanError as error:
        code = error.code
    finish(rank, directory, code)


def sharded(rank: int, port: int, directory: str, method: str) -> None:
    join(rank, port)
    model, given = prepared(method)
    shard(model)
    assert any(isinstance(p, DTensor) for p in ak.of(model)["a"].parameters())
    losses = optimise(model, share(given, rank))
    kit = ak.of(model)
    gradients = {key: whole(p.grad) for key, p in kit["a"].named_parameters()}
    tensors = {key: whole(p) for key, p in kit["a"].named_parameters()}
    with kit.disabled(), torch.no_grad():
        bare = model(**given)["logits"]
    try:
        kit.detach()
        code = ""
    except ak.errors.PlanError as error:
        code = error.code
    finish(rank, directory, (losses, gradients, tensors, bare, code))


def code_of(call: Callable[[], Any]) -> str:
    """The code of an error of adapterkit, else what was raised, else nothing."""
    try:
        call()
    except ak.errors.AdapterkitError as error:
        return error.code
    except Exception as error:
        return repr(error)[:300]
    return ""


def sharded_files(rank: int, port: int, directory: str, method: str) -> None:
    """What cannot be written by one process alone, and the way around it; heads that come late."""
    join(rank, port)
    model, given = prepared(method)
    ak.of(model).save(Path(directory) / f"before{rank}")
    shard(model)
    kit = ak.of(model)
    optimise(model, share(given, rank))
    model.reshard()
    formats = ("adapterkit", "adapterhub", "peft")
    codes = [code_of(lambda form=form: kit.save(Path(directory) / form, format=form)) for form in formats]
    codes.append(code_of(lambda: kit.save(Path(directory) / "setup", setup="a")))
    kept = not any((Path(directory) / name).exists() for name in (*formats, "setup"))

    whole_state = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    tensors = {key: whole(p) for key, p in kit["a"].named_parameters()}
    if rank == 0:
        (Path(directory) / "checkpoint").mkdir()
        save_file(whole_state, Path(directory) / "checkpoint" / "model.safetensors")

    late = tiny.build("bert", CLS)
    shard(late)
    before = Path(directory) / f"before{rank}"
    codes.append(code_of(lambda: ak.load(late, before)))
    codes.append(code_of(lambda: ak.attach(late, "lora", trainable=False)))
    codes.append(code_of(lambda: ak.load(late, before, head=False)))
    finish(rank, directory, (codes, kept, tensors))


def sharded_verbs(rank: int, port: int, directory: str, method: str) -> None:
    """What reads or replaces tensors, while they are parted and while a pass has left them whole."""
    join(rank, port)
    before = Path(directory) / f"before{rank}"
    codes, moved = [], []
    for whole_for_a_while in (False, True):
        model, given = prepared(method)
        kit = ak.of(model)
        kit.save(before, "a")
        attach(model, method, "b", seed=1, head=False)
        kit.activate("a")
        fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
        with torch.no_grad():
            start = model(**given)["logits"]
        if not whole_for_a_while:
            model.reshard()
        codes += [
            code_of(lambda kit=kit: kit.merge("a")),
            code_of(lambda kit=kit: kit.merge_and_detach("a")),
            code_of(lambda kit=kit: kit.average(["a", "b"], name="c")),
            code_of(lambda kit=kit: kit.share("a", "b")),
            code_of(lambda kit=kit: kit.unshare("a")),
            code_of(lambda kit=kit: kit.swap("a", before)),
            code_of(lambda kit=kit, given=given: kit.verify(**given)),
            code_of(lambda kit=kit: kit.eject("a")),
            code_of(lambda kit=kit: kit.detach("b")),
            code_of(lambda kit=kit: kit.to("a", dtype="float64")),
        ]
        model.reshard()
        with torch.no_grad():
            moved.append((model(**given)["logits"] - start).abs().max().item())
    finish(rank, directory, (codes, moved))


def flattened(rank: int, port: int, directory: str, method: str) -> None:
    """The older kind of shards, a wrapper that puts the tensors of a module into one."""
    join(rank, port)
    model, given = prepared(method)
    layers = ModuleWrapPolicy({type(model.bert.encoder.layer[0])})
    wrapped = FullyShardedDataParallel(
        model, auto_wrap_policy=layers, use_orig_params=True, device_id=torch.device("cpu")
    )
    kit = ak.of(wrapped)
    losses = optimise(wrapped, share(given, rank))
    codes = [
        code_of(lambda: kit.save(Path(directory) / "saved")),
        code_of(lambda: kit.merge("a")),
        code_of(lambda: kit.average(["a"], name="b")),
        code_of(kit.detach),
        code_of(lambda: ak.attach(wrapped, method, name="late", head=False)),
    ]
    # with cpu_offload torch 2.13 crashes here, on a model without adapters too
    whole_state = get_model_state_dict(wrapped, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        (Path(directory) / "checkpoint").mkdir()
        save_file(whole_state, Path(directory) / "checkpoint" / "model.safetensors")
    with kit.disabled(), torch.no_grad():
        bare = wrapped(**given)["logits"]
    finish(rank, directory, (losses, codes, bare, (Path(directory) / "saved").exists()))


def sharded_prefix(rank: int, port: int, directory: str, method: str) -> None:
    """In a layer for itself the MLP of all is sharded where others ask for it; in one group it is not."""
    join(rank, port)
    codes = []
    for together in (False, True):
        model, given = prepared(method)
        if together:
            fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
        else:
            shard(model)
        codes.append(code_of(lambda model=model, given=given: model(**given)["loss"].backward()))
    finish(rank, directory, codes)


def fused(model: nn.Module) -> ak.Kit:
    """Two adapters, and a fusion of them that is trained."""
    for name, seed in (("a", 0), ("b", 1)):
        attach(model, "seq_bn", name, seed=seed, head=False)
    kit = ak.of(model)
    kit.freeze("a", "b")
    kit.fuse("a", "b", seed=0).activate(ak.Fuse("a", "b"))
    return kit


def sharded_fusion(rank: int, port: int, directory: str, method: str) -> None:
    """Value of the regularisation, and the gradient of it alone and with that of the model."""
    join(rank, port)
    model = tiny.build("bert", CLS).train()
    kit, given = fused(model), tiny.inputs("bert", CLS, batch=BATCH, padded=False, labels=True)
    shard(model)
    losses, found = [], []
    for own in (False, True):
        model.zero_grad()
        loss = kit.fusion_loss()
        losses.append(loss.item())
        (loss + model(**share(given, rank))["loss"] if own else loss).backward()
        found.append({key: whole(p.grad) for key, p in kit["a+b"].named_parameters()})
    finish(rank, directory, (losses, found))
