"""Prefixes in attention that is written out: everything a forward calls is watched.

softmax([q K_p^T, S]) [V_p; V], where S are the scores as the model makes them, with its own scales, biases
and masks: the columns of the prefix are computed beside, follow what happens to all columns alike, and are
never masked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.overrides import TorchFunctionMode

from adapterkit.inject.prefix import Prefix

Function = Callable[..., Any]
T = torch.Tensor

_MATMUL = frozenset({torch.matmul, T.matmul, T.__matmul__, torch.bmm, T.bmm})
_BADDBMM = frozenset({torch.baddbmm, T.baddbmm})
_SOFTMAX = frozenset({F.softmax, torch.softmax, T.softmax})
_SCALE = frozenset(
    {torch.mul, T.mul, T.mul_, T.__mul__, T.__rmul__, T.__imul__}
    | {torch.div, T.div, T.div_, T.__truediv__, T.__itruediv__, torch.true_divide, T.true_divide}
)
_ADD = frozenset(
    {
        torch.add,
        T.add,
        T.add_,
        T.__add__,
        T.__radd__,
        T.__iadd__,
        torch.sub,
        T.sub,
        T.sub_,
        T.__sub__,
        T.__isub__,
    }
)
_SAME = frozenset({torch.tanh, T.tanh, T.tanh_, F.dropout, torch.dropout, T.neg, torch.neg})
"""Element-wise, no matter where an element stands."""
_MASK = frozenset(
    {
        torch.masked_fill,
        T.masked_fill,
        T.masked_fill_,
        torch.where,
        T.where,
        torch.max,
        T.max,
        torch.maximum,
        T.maximum,
    }
    | {torch.clamp, T.clamp, T.clamp_, T.nan_to_num, torch.nan_to_num}
)
_CAST = frozenset({T.to, T.type, T.type_as, T.float, T.half, T.bfloat16, T.double})
_VIEW = frozenset({T.view, T.reshape, torch.reshape, T.unsqueeze, torch.unsqueeze, T.squeeze, torch.squeeze})
_VIEW |= {T.contiguous, T.clone, torch.clone, T.flatten, torch.flatten, torch.unflatten}
_TURN = frozenset({T.transpose, torch.transpose, T.permute, torch.permute, T.swapaxes})
_FOLLOWED = _SCALE | _ADD | _SAME | _MASK | _CAST | _VIEW | _TURN


class _Beside:
    """What belongs to a tensor of the model: a factor of keys, or the prefix's columns of scores."""

    def __init__(self, kind: str, tensor: torch.Tensor, value: Any) -> None:
        self.kind = kind
        self.tensor = tensor
        self.value = value


def _turned(tensor: torch.Tensor, axes: str, wanted: list[str]) -> torch.Tensor:
    """A tensor with named axes in another order; the tensor itself if that is the order it has."""
    if list(axes) == wanted:
        return tensor
    return tensor.permute(*(axes.index(axis) for axis in wanted))


class Intercept(TorchFunctionMode):
    """Lets the attention that is computed inside take a prefix.

    Args: rows: B, which tensors (B H, Q, E) do not show.
    """

    def __init__(self, prefix: Prefix, rows: int) -> None:
        super().__init__()
        self.prefix = prefix
        self.rows = rows
        self.known: list[_Beside] = []

    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._sdpa(*args, **kwargs)
        if func in _MATMUL:
            return self._matmul(func, *args, **kwargs)
        if func in _BADDBMM:
            return self._baddbmm(func, *args, **kwargs)
        if func in _SOFTMAX:
            return self._softmax(func, args, kwargs)
        if func is torch.einsum and len(args) == 3 and isinstance(args[0], str):
            return self._einsum(*args)
        if func is T.unflatten:
            func = torch.unflatten  # the method calls `super`, which the compiler cannot trace from here
        out = func(*args, **kwargs)
        if func in _FOLLOWED and isinstance(out, torch.Tensor):
            self._follow(func, args, kwargs, out)
        return out

    # -- attention as one function

    def _sdpa(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        own = self.prefix.unmasked(key.shape[-2], torch.bool)
        if is_causal:
            attn_mask = causal_lower_right(query.shape[-2], self.prefix.length + key.shape[-2])
            if own is not None:
                shape = (query.shape[-2], self.prefix.length + key.shape[-2])
                whole = torch.ones(shape, dtype=torch.bool, device=key.device)
                attn_mask = whole.tril(shape[1] - shape[0]) & own
        else:
            attn_mask = own if attn_mask is None else self.prefix.extended(attn_mask)
        key, value = self.prefix.before(key, value)
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, False, **kwargs)

    # -- attention by matmul, softmax, matmul

    def _matmul(self, func: Function, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = func(left, right)
        beside = self._of(left)
        if beside is not None and beside.kind == "probabilities":
            self.prefix.hits += 1
            added: torch.Tensor = beside.value @ self._like(self.prefix.value, left)
            return out + added
        scores = self._scores(left, right)
        if scores is not None:
            self.known.append(_Beside("scores", out, scores))
        return out

    def _baddbmm(
        self, func: Function, added: torch.Tensor, batch1: torch.Tensor, batch2: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        out: torch.Tensor = func(added, batch1, batch2, **kwargs)
        scores = self._scores(batch1, batch2)
        if scores is not None:
            self.known.append(_Beside("scores", out, scores * kwargs.get("alpha", 1)))
        return out

    def _einsum(self, equation: str, *operands: torch.Tensor) -> torch.Tensor:
        """A product of two operands as a matmul, where two axes are of the batch and one is summed over."""
        left, right = operands
        names, _, out = equation.replace(" ", "").partition("->")
        first, _, second = names.partition(",")
        beside = self._of(right)
        if beside is not None and beside.kind == "probabilities":
            left, right, first, second = right, left, second, first
        batch = [axis for axis in first if axis in second and axis in out]
        summed = [axis for axis in first if axis in second and axis not in out]
        rows = [axis for axis in first if axis not in second]
        columns = [axis for axis in second if axis not in first]
        if [len(axes) for axes in (batch, summed, rows, columns)] != [2, 1, 1, 1] or len(out) != 4:
            return torch.einsum(equation, *operands)
        product = self._matmul(
            torch.matmul,
            _turned(left, first, [*batch, *rows, *summed]),
            _turned(right, second, [*batch, *summed, *columns]),
        )
        return _turned(product, "".join([*batch, *rows, *columns]), list(out))

    def _scores(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
        """The scores of the prefix (..., Q, P) if these are queries (..., Q, E) and keys (..., E, T)."""
        if query.ndim not in (3, 4) or key.ndim != query.ndim:
            return None
        if not query.shape[-1] == key.shape[-2] == self.prefix.key.shape[-1]:
            return None
        own = self._like(self.prefix.key, query)
        if own is None:
            return None
        scores: torch.Tensor = query @ own.transpose(-1, -2)
        beside = self._of(key)
        return scores * beside.value if beside is not None and beside.kind == "factor" else scores

    def _like(self, own: torch.Tensor, query: torch.Tensor) -> Any:
        """(1 or B, K, P, E) for queries (B, H, Q, E) or (B H, Q, E); None if they are something else."""
        heads = query.shape[1] if query.ndim == 4 else query.shape[0] // self.rows
        repeats, rest = divmod(heads, own.shape[1])
        if rest or not repeats:
            return None
        own = own.to(query.dtype)
        if repeats > 1:
            own = own.repeat_interleave(repeats, dim=1)
        return own if query.ndim == 4 else own.expand(self.rows, -1, -1, -1).flatten(0, 1)

    def _softmax(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        scores, *rest = args
        beside = self._of(scores)
        if beside is None or beside.kind != "scores":
            return func(*args, **kwargs)  # type: ignore[no-any-return]
        own = beside.value.expand(*scores.shape[:-1], -1)
        if self.prefix.bias is not None:
            own = own + self.prefix.bias.to(own.dtype)
        visible = self.prefix.visible
        if visible is not None:
            seen = visible if scores.ndim == 4 else visible.repeat_interleave(scores.shape[0] // self.rows, 0)
            hidden = ~seen.view(-1, *[1] * (scores.ndim - 2), self.prefix.length)
            own = own.masked_fill(hidden, -torch.inf)
        both: torch.Tensor = func(torch.cat([own, scores], dim=-1), *rest, **kwargs)
        own, real = both[..., : self.prefix.length], both[..., self.prefix.length :].contiguous()
        self.known = [_Beside("probabilities", real, own)]
        return real

    # -- what happens to scores and probabilities on their way

    def _of(self, tensor: Any) -> _Beside | None:
        for beside in reversed(self.known):
            if beside.tensor is tensor:
                return beside
        return None

    def _follow(
        self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor
    ) -> None:
        """Do to the columns of the prefix what `func` has done to the others."""
        place = next((i for i, item in enumerate(args) if self._of(item) is not None), None)
        beside = None if place is None else self._of(args[place])
        if beside is None:
            if func in _SCALE and _is_number(args[-1]):
                self.known.append(_Beside("factor", out, func(torch.ones((), device=out.device), *args[1:])))
            return
        if beside.kind == "factor":
            value = beside.value if func in _CAST | _VIEW | _TURN else None
            if func in _SCALE and _is_number(args[-1]):
                value = func(beside.value, *args[1:])
        else:
            value = self._replayed(func, args, kwargs, beside, out)
        if value is not None:
            self.known.remove(beside)
            self.known.append(_Beside(beside.kind, out, value))

    def _replayed(self, func: Function, args: Any, kwargs: Any, beside: _Beside, out: torch.Tensor) -> Any:
        """The columns of the prefix behind `func`, None where that cannot be said."""
        own, source = beside.value, beside.tensor
        if out.shape[-1:] != source.shape[-1:]:
            return None
        if func in _SAME:
            return func(own, *args[1:], **kwargs)
        if func in _CAST:
            return own.to(out.dtype)
        if func in _MASK:
            return own
        if func in _SCALE or func in _ADD:
            other = args[1] if args[0] is source else args[0]
            if _is_number(other) or (other.shape[-1:] == (1,) and source.shape[-1] != 1):
                return func(own, other, **kwargs) if args[0] is source else func(other, own, **kwargs)
            return own  # a bias or mask of the real columns
        if func in _VIEW:
            return own.expand(*source.shape[:-1], -1).reshape(*out.shape[:-1], -1)
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, torch.Tensor) and value.ndim == 0)
