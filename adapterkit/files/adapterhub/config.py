"""Configs of the LoRA family in AdapterHub's words, and in ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from adapterkit.errors import FileFormatError, Problem, did_you_mean
from adapterkit.methods.base import MethodConfig
from adapterkit.methods.dora import DoRAConfig, DVoRAConfig
from adapterkit.methods.ia3 import IA3Config
from adapterkit.methods.lora import LoRAConfig
from adapterkit.methods.mtl_lora import MTLLoRAConfig
from adapterkit.methods.vera import VeRAConfig
from adapterkit.model.blueprint import Slot

Kind = Literal["lora", "ia3", "vera", "dora", "dvora", "mtl_lora"]


class LoRAFile(BaseModel):
    """`config` of an adapter_config.json; fields and defaults of adapters 1.3.0, adapter_config.py."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    architecture: Literal["lora", "mtl_lora"]
    selfattn_lora: bool = True
    intermediate_lora: bool = False
    output_lora: bool = False
    leave_out: tuple[int, ...] = ()
    r: int = 8
    alpha: float = 8
    dropout: float = 0.0
    attn_matrices: tuple[Literal["q", "k", "v", "o"], ...] = ("q", "v")
    composition_mode: Literal["add", "scale"] = "add"
    init_weights: str = ""
    init_weights_seed: int | None = None
    use_gating: bool = False
    use_dora: bool = False
    vera_d: float | None = None
    vera_b: float | None = None
    dtype: str | None = None
    n_up_projection: int = 1
    weights_sharpness: float = 0.05
    task_specific_matrix_type: str = "singular_values"

    @property
    def kind(self) -> Kind:
        """Our name of the method, in the order of their tests (methods/lora.py, LoRALayer.add_adapter)."""
        if self.composition_mode == "scale":
            return "ia3"
        if self.architecture == "mtl_lora":
            return "mtl_lora"
        if self.vera_d is not None or self.vera_b is not None:
            return "dvora" if self.use_dora else "vera"
        return "dora" if self.use_dora else "lora"

    @property
    def shares(self) -> bool:
        """Whether all units read the same frozen matrices."""
        return self.kind in ("vera", "dvora")

    def refusals(self) -> Iterator[Problem]:
        """Options that we have no method for together; most do not run in `adapters` either."""
        told = "{} together with {} is not supported"
        if self.use_gating and self.kind not in ("lora", "ia3"):
            yield Problem("unsupported-option", told.format("use_gating", self.kind), "use_gating")
        if self.use_dora and self.kind in ("ia3", "mtl_lora"):
            yield Problem("unsupported-option", told.format("use_dora", self.kind), "use_dora")
        if self.kind == "mtl_lora" and self.task_specific_matrix_type != "singular_values":
            message = f"a task matrix of type {self.task_specific_matrix_type!r} is not supported"
            yield Problem("unsupported-option", message, "task_specific_matrix_type", "'singular_values'")

    def method(
        self, slots: Sequence[Slot], leave_out: tuple[str, ...], times: Mapping[str, int]
    ) -> MethodConfig:
        """Our config. `times`: address -> by how much rank and alpha are multiplied there."""
        targets = tuple(dict.fromkeys(f"{slot.sublayer}.{slot.role}" for slot in slots))
        roles = dict.fromkeys((slot.role for slot in slots if slot.address not in times), 1)
        where: dict[str, Any] = {"targets": targets, "leave_out": leave_out}
        if self.kind == "ia3":
            # theirs scales outputs everywhere, where the paper scales the input of the last matrix
            sides = {"down": "output"} if "down" in roles else {}
            return IA3Config(**where, alpha=self.alpha, gating=self.use_gating, sides=sides)
        for name, value in (("r", self.r), ("alpha", self.alpha)):
            where[name] = {at: n * value for at, n in {**roles, **times}.items()} if times else value
        where["dropout"] = self.dropout
        # their magnitude: the norm does not see alpha / r, and the bias is scaled with the weight
        magnitude = {"norm_scaled": False, "scale_bias": True}
        match self.kind:
            case "lora":
                return LoRAConfig(**where, gating=self.use_gating)
            case "dora":
                return DoRAConfig(**where, **magnitude)
            case "vera":
                return VeRAConfig(**where)
            case "dvora":
                return DVoRAConfig(**where, **magnitude)
        return MTLLoRAConfig(**where, n_up=self.n_up_projection, sharpness=self.weights_sharpness)


T = TypeVar("T", bound=BaseModel)


def validated(model: type[T], config: Mapping[str, Any]) -> T:
    """A config of theirs as this model.

    Raises: FileFormatError: options that are unknown or wrong.
    """
    try:
        return model.model_validate(config)
    except ValidationError as error:
        raise FileFormatError(_problem(model, item) for item in error.errors(include_url=False)) from None


def _problem(model: type[BaseModel], item: Any) -> Problem:
    where = str(item["loc"][0]) if item["loc"] else ""
    if item["type"] == "extra_forbidden":
        hint = did_you_mean(where, model.model_fields)
        return Problem("unknown-option", f"the config has an unknown option {where!r}", where, "", hint)
    return Problem("bad-option", f"{item['input']!r} does not fit {where!r}", where, item["msg"])
