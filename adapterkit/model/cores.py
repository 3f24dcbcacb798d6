"""Attention cores: the modules that compute attention from q, k and v, as slots."""

from __future__ import annotations

from dataclasses import dataclass

from adapterkit.model.blueprint import Blueprint, Slot
from adapterkit.spec.schema import Kernel

_SUBLAYERS = ("attention", "cross_attention")


@dataclass(frozen=True, kw_only=True)
class Core(Slot):
    """The core of one attention sublayer; `shape` is (K (E_k + E_v), D): keys and values of one token."""

    kv_heads: int
    """K key/value heads. A size that nothing shows is 0, here and below."""
    key_dim: int
    value_dim: int
    width: int
    """D, the width of the stream that is asked from."""
    kernel: Kernel | None
    eager: str | None
    bias: str | None = None
    """Method of the module that makes a bias of relative positions, (queries, keys, ...) -> (1, H, Q, T)."""

    @property
    def location(self) -> str:
        """The same for all layers: 'encoder.attention'."""
        return f"{self.stack}.{self.sublayer}"


def cores(blueprint: Blueprint) -> dict[str, Core]:
    """Every attention core of the model by its address, `<stack>.<layer>.<sublayer>.core`."""
    found = {}
    for stack in blueprint.stacks.values():
        for index in range(stack.num_layers):
            for sublayer in _SUBLAYERS:
                place = blueprint.places.get(f"{stack.address}.{index}.{sublayer}.core")
                if place is not None:
                    found[place.address] = _core(blueprint, place)
    return found


def apart(blueprint: Blueprint, slot: Slot) -> Slot | None:
    """The core that treats examples apart, where a slot in it is called with something that has no row for
    each; None if that cannot be told from the interface.
    """
    if slot.batch != "none":
        return None
    core = blueprint.places.get(f"{slot.stack}.{slot.layer}.{slot.sublayer}.core")
    inside = core is not None and core.batch == "first" and slot.path.startswith(f"{core.path}.")
    return core if inside and whole_arguments(blueprint, slot.stack) else None


def whole_arguments(blueprint: Blueprint, stack: str) -> frozenset[str]:
    """Arguments of the modules of a stack that have no row for each example."""
    said = blueprint.stacks[stack].inputs.batch
    return frozenset(name for name, axis in said.items() if axis == "none")


def _core(blueprint: Blueprint, place: Slot) -> Core:
    sublayer, info = str(place.sublayer), blueprint.stacks[place.stack]
    _, kv_heads = info.sizes.get(place.sublayer_address, (None, None))
    said = info.head_dims.get(place.sublayer_address, (None, None))
    roles = [
        blueprint.slots.get(f"{place.sublayer_address}.{role}") for role in ("k", "v", "o", "q", "fused")
    ]
    key, value, out, *inputs = ((slot.shape if slot is not None else None) for slot in roles)
    rows, dim = (value, said[1]) if value else (key, said[0])
    if rows and dim and rows[0] != (kv_heads or 0) * dim:
        kv_heads = rows[0] // dim  # layers of one stack may have different numbers of heads
    shown = [shape[0] // kv_heads if shape and kv_heads else 0 for shape in (key, value)]
    dims = [dim or seen for dim, seen in zip(said, shown, strict=True)]
    # what is given back to the stream has its width; a query may be asked from less
    width = out[0] if out else next((shape[1] for shape in (*inputs, key) if shape), 0)
    return Core(
        address=place.address,
        role="core",
        stack=place.stack,
        layer=place.layer,
        sublayer=place.sublayer,
        module=place.module,
        path=place.path,
        shape=((kv_heads or 0) * sum(dims), width),
        batch=place.batch,
        was=place.was,
        kv_heads=kv_heads or 0,
        key_dim=dims[0],
        value_dim=dims[1],
        width=width,
        kernel=info.kernels.get(sublayer),
        eager=info.eager.get(sublayer),
        bias=_bias(blueprint, place),
    )


def _bias(blueprint: Blueprint, place: Slot) -> str | None:
    """What the interface says of the bias, where the class in this version has it."""
    stack = blueprint.stacks[place.stack].interface.stacks[place.stack.rpartition("/")[2]]
    said = getattr(getattr(stack, str(place.sublayer), None), "bias", None)
    return said if said is not None and hasattr(place.module, said) else None
