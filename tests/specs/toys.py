"""Hand-made models, each with the one structure that its spec file is about. They are resolved, never run."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

from torch import Tensor, nn


class Attention(nn.Module):
    """Separate projections; four query heads of width 2, as many key/value heads as are asked for."""

    def __init__(self, kv_heads: int = 4) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = 4, kv_heads
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 2 * kv_heads), nn.Linear(8, 2 * kv_heads)
        self.o = nn.Linear(8, 8)
        self.drop = nn.Dropout()


class Fused(nn.Module):
    """One projection for four query heads and `kv_heads` key/value heads of width 2."""

    def __init__(self, kv_heads: int = 4, rows: int | None = None) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = 4, kv_heads
        self.qkv = nn.Linear(8, rows or 2 * (4 + 2 * kv_heads))
        self.o = nn.Linear(8, 8)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.drop = nn.Dropout()


class Gated(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 12)


class Block(nn.Module):
    def __init__(self, attn: nn.Module, mlp: nn.Module, **more: nn.Module) -> None:
        super().__init__()
        self.attn, self.mlp = attn, mlp
        self.ln = nn.LayerNorm(8)
        for name, module in more.items():
            self.add_module(name, module)


class Toy(nn.Module):
    """Embeddings, blocks, a norm. The config holds what is passed by name."""

    def __init__(self, *blocks: nn.Module, **config: object) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.drop = nn.Dropout()
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(8)
        self.config = SimpleNamespace(**config)


def plain() -> nn.Module:
    return Toy(*(Block(Attention(), Mlp()) for _ in range(2)), gated=False, num_heads=4)


def gated() -> nn.Module:
    return Toy(*(Block(Attention(), Gated()) for _ in range(2)), gated=True)


def ragged() -> nn.Module:
    """The second layer alone has a further linear map in its attention."""
    attentions = [Attention(), Attention()]
    attentions[1].add_module("pos", nn.Linear(8, 8))
    return Toy(*(Block(attention, Mlp()) for attention in attentions))


def short() -> nn.Module:
    """The second layer lacks its output projection."""
    broken = Attention()
    broken.o = None  # type: ignore[assignment]
    return Toy(Block(Attention(), Mlp()), Block(broken, Mlp()))


def multihead() -> nn.Module:
    """PyTorch's own attention, which never calls its output projection."""
    return Toy(*(Block(nn.MultiheadAttention(8, 4), Mlp()) for _ in range(2)))


def fused() -> nn.Module:
    return Toy(*(Block(Fused(), Mlp()) for _ in range(2)))


def grouped() -> nn.Module:
    return Toy(*(Block(Fused(kv_heads=2), Mlp()) for _ in range(2)))


def uneven() -> nn.Module:
    """Rows that do not divide among the heads."""
    return Toy(*(Block(Fused(rows=25), Mlp()) for _ in range(2)))


def hybrid() -> nn.Module:
    """A layer of attention, a layer without."""
    return Toy(Block(Attention(), Mlp()), Block(nn.Identity(), Mlp()), layer_types=["attention", "plain"])


def nested() -> nn.Module:
    """Layers in groups, the way that models share them."""
    groups = [nn.ModuleList([Block(Attention(), Mlp()), Block(Attention(), Mlp())]) for _ in range(2)]
    toy = Toy()
    toy.groups = nn.ModuleList([Group(members) for members in groups])
    return toy


class Group(nn.Module):
    def __init__(self, members: nn.ModuleList) -> None:
        super().__init__()
        self.members = members


def parallel() -> nn.Module:
    return Toy(*(Block(Attention(), Mlp()) for _ in range(2)))


def towers() -> nn.Module:
    """Two stacks, one below the other's root, of which the second reads the first."""
    toy = nn.Module()
    toy.left, toy.right = plain(), Toy(*(Block(Attention(), Mlp(), cross=Attention(2)) for _ in range(3)))
    toy.project = nn.Linear(8, 8)
    toy.config = SimpleNamespace(right_config=SimpleNamespace(crossed=True), left_config=SimpleNamespace())  # type: ignore[assignment]
    return toy


def bank() -> nn.Module:
    """A branch without the usual roles, with a module of the model's own behind the residual add."""
    return Toy(*(Block(Attention(), nn.Bilinear(8, 8, 8), own=nn.Linear(8, 8)) for _ in range(2)))


class Renamed(Toy):
    """Its forward has an argument of an older name."""

    def forward(self, tokens: Tensor, seen: Tensor, steps: Tensor) -> Tensor:
        raise NotImplementedError


def renamed() -> nn.Module:
    return Renamed(Block(Attention(), Mlp()))


TOYS: dict[str, Callable[[], nn.Module]] = {
    make.__name__: make
    for make in (
        plain,
        gated,
        ragged,
        short,
        multihead,
        fused,
        grouped,
        uneven,
        hybrid,
        nested,
        parallel,
        towers,
        bank,
        renamed,
    )
}
