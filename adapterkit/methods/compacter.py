"""Compacter: bottlenecks whose matrices are sums of Kronecker products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from adapterkit.errors import ConfigError, Problem
from adapterkit.methods.base import Shared
from adapterkit.methods.bottleneck import BottleneckConfig, Reduction
from adapterkit.model.blueprint import Slot
from adapterkit.model.branches import Branch


class CompacterConfig(BottleneckConfig):
    """Compacter and Compacter++ (Mahabadi et al. 2021, arXiv:2106.04647)."""

    method: ClassVar[str] = "compacter"
    passing = BottleneckConfig.passing | {"phm_init_range"}

    reduction_factor: Reduction = Field(
        default=32.0,
        description="D / bottleneck width: one, or by stack, layer ('encoder.3'; a number where there is one "
        "stack), branch and 'default'",
    )
    non_linearity: str = Field(default="gelu", description="activation in the bottleneck")
    phm_dim: int = Field(default=4, ge=1, description="number n of Kronecker products; divides both widths")
    phm_rank: int = Field(default=1, ge=1, description="rank of the factors W_i")
    phm_bias: bool = Field(default=True, description="a bias behind each matrix")
    shared_phm_rule: bool = Field(default=True, description="one set of rules for the whole model")
    factorized_phm_rule: bool = Field(default=False, description="rules of rank 1")
    shared_W_phm: bool = Field(default=False, description="one set of factors for the whole model")  # noqa: N815
    factorized_phm_W: bool = Field(default=True, description="factors of rank `phm_rank`")  # noqa: N815
    phm_init_range: float = Field(
        default=0.0001, gt=0, description="standard deviation of the rules at first"
    )

    def check(self, slots: Sequence[Slot]) -> None:
        super().check(slots)
        problems = []
        for slot in slots:
            if isinstance(slot, Branch):
                for width in ((slot.shape or (1, 1))[0], self.width(slot)):
                    if width % self.phm_dim:
                        message = f"width {width} is not divisible by phm_dim {self.phm_dim}"
                        problems.append(
                            Problem("bad-width", message, slot.address, "another reduction_factor or phm_dim")
                        )
        if self.shared_W_phm and len({(s.shape, self.width(s)) for s in slots if isinstance(s, Branch)}) > 1:
            message = "shared_W_phm needs the same widths at every branch"
            problems.append(Problem("bad-width", message, expected="shared_W_phm=False"))
        if problems:
            raise ConfigError(problems)

    def share(self, slots: Sequence[Slot], generator: torch.Generator | None) -> Shared | None:
        if not (self.shared_phm_rule or self.shared_W_phm):
            return None
        first = slots[0]
        assert isinstance(first, Branch)
        return SharedPHM(self, (first.shape or (1, 1))[0], self.width(first), generator)

    def projections(
        self, branch: Branch, shared: Shared | None, generator: torch.Generator | None
    ) -> tuple[nn.Module, nn.Module]:
        d_model, width = (branch.shape or (1, 1))[0], self.width(branch)
        own = shared if isinstance(shared, SharedPHM) else None
        return (
            PHMLinear(d_model, width, self, own.rule if own else None, own.down if own else None, generator),
            PHMLinear(width, d_model, self, own.rule if own else None, own.up if own else None, generator),
        )


class Rule(nn.Module):
    """The n rules A_i (n, n, n), or their factors of rank 1."""

    def __init__(self, config: CompacterConfig, generator: torch.Generator | None) -> None:
        super().__init__()
        n = config.phm_dim
        shapes = (
            {"left": (n, n, 1), "right": (n, 1, n)} if config.factorized_phm_rule else {"rule": (n, n, n)}
        )
        for name, shape in shapes.items():
            tensor = torch.empty(shape).normal_(std=config.phm_init_range, generator=generator)
            self.register_parameter(name, nn.Parameter(tensor))

    def forward(self) -> torch.Tensor:
        found: Any = self._parameters
        return found["rule"] if "rule" in found else found["left"] @ found["right"]  # type: ignore[no-any-return]


class Factors(nn.Module):
    """The n factors W_i (n, D_in / n, D_out / n), or their factors of rank `phm_rank`."""

    def __init__(
        self, d_in: int, d_out: int, config: CompacterConfig, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        n, rank = config.phm_dim, config.phm_rank
        whole = (n, d_in // n, d_out // n)
        split = {"left": (n, d_in // n, rank), "right": (n, rank, d_out // n)}
        for name, shape in (split if config.factorized_phm_W else {"W": whole}).items():
            bound = (6 / (shape[1] + shape[2])) ** 0.5  # Glorot and Bengio 2010, for each of the n matrices
            self.register_parameter(
                name, nn.Parameter(torch.empty(shape).uniform_(-bound, bound, generator=generator))
            )

    def forward(self) -> torch.Tensor:
        found: Any = self._parameters
        return found["W"] if "W" in found else found["left"] @ found["right"]  # type: ignore[no-any-return]


class SharedPHM(Shared):
    """Rules and factors that all branches use."""

    def __init__(
        self, config: CompacterConfig, d_model: int, width: int, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        self.rule = Rule(config, generator) if config.shared_phm_rule else None
        self.down = Factors(d_model, width, config, generator) if config.shared_W_phm else None
        self.up = Factors(width, d_model, config, generator) if config.shared_W_phm else None


class PHMLinear(nn.Module):
    """y = x H + b with H = sum_i kron(A_i, W_i).

    Source: Mahabadi et al. 2021, arXiv:2106.04647, eq. 3-6; Zhang et al. 2021, arXiv:2102.08597.
    Shapes: x (..., D_in) -> (..., D_out); A (n, n, n), W (n, D_in / n, D_out / n), H (D_in, D_out).
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        config: CompacterConfig,
        rule: Rule | None,
        factors: Factors | None,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        # what is shared is registered at its owner alone
        self.shared = (rule, factors)
        if rule is None:
            self.rule = Rule(config, generator)
        if factors is None:
            self.factors = Factors(d_in, d_out, config, generator)
        self.bias = nn.Parameter(torch.zeros(d_out)) if config.phm_bias else None

    @property
    def weight(self) -> torch.Tensor:
        """H transposed: (D_out, D_in), as in nn.Linear."""
        rule, factors = (self.shared[0] or self.rule)(), (self.shared[1] or self.factors)()
        return torch.einsum("iac,ipq->cqap", rule, factors).flatten(2, 3).flatten(0, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias)
