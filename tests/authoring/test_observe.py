"""The recorder against a block whose dataflow is known by reading it, and what it must leave alone."""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapterkit.author.observe import Observation, observe
from tests.models import tiny


class Block(nn.Module):
    """Pre-norm attention with its softmax written out, then a post-norm gated MLP that writes in place."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm, self.last = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q, self.to_kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.proj, self.drop = nn.Linear(width, width), nn.Dropout(0.5)
        self.a, self.b, self.c = nn.Linear(width, 12), nn.Linear(width, 12), nn.Linear(12, width)
        self.ways = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        key, value = self.to_kv(h).chunk(2, -1)
        scores = torch.einsum("bqd,bkd->bqk", self.to_q(h) * 0.3, key)
        out = torch.bmm(F.dropout(scores.softmax(-1), 0.1, self.training), value)
        x = self.drop(self.proj(out)) + x
        branch = torch.empty_like(x)
        branch[...] = self.c(F.silu(self.a(x)) * self.b(x))
        x += self.ways(branch)
        return self.last(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(10, 8), nn.ModuleList(Block() for _ in range(3))

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return {"states": x}


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def paths(found: Any) -> list[str]:
    return [one.path for one in found]


def seen() -> Observation:
    return observe(Model(), {"ids": IDS})


def test_attention_written_out() -> None:
    found = seen().attentions
    assert [event.core.path for event in found] == ["blocks.0", "blocks.1", "blocks.2"]
    second = found[1]
    assert paths(second.q) == ["blocks.1.to_q"]
    assert paths(second.k) == paths(second.v) == ["blocks.1.to_kv"]
    assert paths(second.o) == ["blocks.1.proj"]


def test_the_stream_through_a_layer() -> None:
    (stack,) = seen().stacks
    assert (stack.path, len(stack.layers), stack.entry.path) == ("blocks", 3, "")
    assert paths(stack.tables) == paths(stack.arriving) == ["embed"]
    attention, mlp = stack.layers[1].branches
    assert (attention.kind, mlp.kind) == ("attention", "mlp")
    assert attention.before is not None
    assert attention.before.path == "blocks.1.norm"
    assert attention.source == attention.stream == stack.layers[0].gives
    assert attention.projection is not None
    assert attention.projection.path == "blocks.1.proj"
    assert [step.call.path for step in attention.steps] == ["blocks.1.drop"]
    assert attention.after_residual is None
    assert mlp.before is None
    assert paths(mlp.first) == ["blocks.1.a", "blocks.1.b"]
    assert [step.call.path for step in mlp.steps] == ["blocks.1.ways"]
    assert mlp.after_residual is not None
    assert mlp.after_residual.path == "blocks.1.last"
    assert mlp.stream == attention.add


def test_the_model_is_left_as_it_was() -> None:
    model = tiny.build("bart").train()
    model.encoder.layers[0].eval()  # type: ignore[index, union-attr, operator]
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    chance = torch.get_rng_state()
    observe(model, tiny.inputs("bart"))
    assert torch.equal(chance, torch.get_rng_state())
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_exception_leaves_no_hook() -> None:
    model = Model()
    try:
        observe(model, {"ids": IDS * 100})
    except IndexError:
        pass
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_another_thread_is_not_recorded() -> None:
    model, running, done = Model(), threading.Event(), threading.Event()

    def other() -> None:
        running.wait()
        model(IDS)
        done.set()

    def pause(states: Tensor) -> Tensor:
        running.set()
        assert done.wait(10)
        return states

    thread = threading.Thread(target=other)
    thread.start()
    found = observe(model, {"ids": IDS}, edits={model.blocks[1]: pause})
    thread.join()
    alone = observe(model, {"ids": IDS})
    assert [call.path for call in found.graph.calls] == [call.path for call in alone.graph.calls]
    assert found.graph.nodes == alone.graph.nodes


def test_an_edit_changes_numbers_and_not_the_graph() -> None:
    model = Model()
    plain = observe(model, {"ids": IDS})
    changed = observe(model, {"ids": IDS}, edits={model.blocks[1].get_submodule("to_q"): torch.zeros_like})
    assert plain.graph.nodes == changed.graph.nodes
    event = plain.attentions[1]
    assert not changed.tensors[event.query].any()
    assert torch.equal(changed.tensors[event.key], plain.tensors[event.key])


def test_pytorchs_own_attention_uses_weights_without_calling_their_module() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    found = observe(layer, {"src": torch.randn(2, 3, 8)})
    (event,) = found.attentions
    assert event.kind == "whole"
    uses = [one for one in found.graph.projections.values() if one.weight.startswith("self_attn")]
    assert uses
    assert all(one.call is None or "out_proj" not in one.path for one in uses)
