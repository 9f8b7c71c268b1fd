"""Gradients of rows that are spread over ranks: their norm is that of the rows of all ranks.

`torch.nn.utils.clip_grad_norm_` adds up norms of gradients that are the same on every rank. A gradient of rows differs,
so it is a tensor whose norm is reduced over the ranks, each rank's rows counted once.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple, SupportsIndex

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _foreach_utils

from chunked_ce.parallel.collectives import Pending
from chunked_ce.sharded.rows import RowSharding, rows_in

__all__ = ["RowGradient", "mark", "sharding_of"]


def mark(module: nn.Module) -> None:
    """Let gradients of the sharded parameters of ``module`` be `RowGradient`; at each call, for parameters change."""
    for _, parameter, sharding in rows_in(module):
        is_plain = parameter.is_leaf and parameter.requires_grad and not sharding.has_dtensors
        if is_plain and sharding_of(parameter) is None:
            _allow_foreach()
            parameter.register_post_accumulate_grad_hook(_Reclassify(sharding))


@functools.cache
def _allow_foreach() -> None:
    """Let clipping take norms of all gradients at once, as it does where no gradient is of a class of its own."""
    supported = getattr(_foreach_utils, "_foreach_supported_types", None)
    if isinstance(supported, list):
        supported.append(RowGradient)


def sharding_of(parameter: Tensor) -> RowSharding | None:
    """How the rows of a marked parameter are spread over ranks; None for another one."""
    hooks = parameter._post_accumulate_grad_hooks or {}
    return next((hook.sharding for hook in hooks.values() if isinstance(hook, _Reclassify)), None)


class _Reclassify(NamedTuple):
    """Runs after a backward has added to the gradient of a parameter, in place if there was one."""

    sharding: RowSharding

    def __call__(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        if gradient is not None and not isinstance(gradient, RowGradient):
            parameter.grad = RowGradient.of(gradient, self.sharding)


class RowGradient(Tensor):
    """The gradient of this rank's rows; norms of it, and whether it is finite, are those of all ranks' rows."""

    _sharding: RowSharding

    @classmethod
    def of(cls, gradient: Tensor, sharding: RowSharding) -> RowGradient:
        found = gradient.as_subclass(cls)
        found._sharding = sharding
        return found

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            special = _SPECIAL.get(function)
            if special is not None:
                return special(*args, **kwargs)
            found = function(*args, **kwargs)
            if function in _KEPT and type(found) is Tensor and isinstance(args[0], cls):
                return cls.of(found, args[0]._sharding)
            return found

    def __deepcopy__(self, memo: dict[int, Any]) -> RowGradient:
        copied: RowGradient | None = memo.get(id(self))
        if copied is None:
            copied = memo[id(self)] = self.of(self.clone(), self._sharding)
        return copied

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


# What code does to gradients before it takes their norm.
_KEPT = {
    *(getattr(Tensor, name) for name in ("detach", "to", "float", "double", "half", "bfloat16", "cpu", "mul", "div")),
    *(getattr(Tensor, name) for name in ("__mul__", "__rmul__", "__truediv__")),
    *(torch.detach, torch.mul, torch.div, inspect.getattr_static(Tensor, "data").__get__),
}


# ---- norms ----


def _norms(gradients: list[Tensor], order: float, norms: list[Tensor]) -> list[Tensor]:
    """``norms`` of ``gradients``, those of rows reduced over their ranks with one collective a group."""
    found = list(norms)
    places: dict[RowSharding, list[int]] = {}
    for place, gradient in enumerate(gradients):
        if isinstance(gradient, RowGradient):
            places.setdefault(gradient._sharding, []).append(place)
    for sharding, mine in places.items():
        reduced = _reduced(torch.stack([norms[place] for place in mine]), order, sharding)
        for place, norm in zip(mine, reduced.unbind(), strict=True):
            found[place] = norm
    return found


def _with_rows(gradient: Tensor, order: float) -> Tensor:
    """A stand-in for a gradient without rows, of which torch takes no maximum, that changes no rank's norm."""
    if not isinstance(gradient, RowGradient) or gradient.numel():
        return gradient
    return gradient.new_full((1,), math.inf if order == -math.inf else 0.0)


def _reduced(norms: Tensor, order: float, sharding: RowSharding) -> Tensor:
    """The norms of rows of which every rank has the norms of its own."""
    wide = norms.to(torch.float32 if norms.device.type == "mps" else torch.float64)
    if math.isinf(order):  # a maximum of which a NaN is no part, so that it travels beside
        sign = math.copysign(1.0, order)
        parts = torch.stack([(sign * wide).masked_fill(wide.isnan(), -math.inf), wide.isnan().to(wide.dtype)])
        largest, is_nan = _all_reduced(parts, dist.ReduceOp.MAX, sharding).unbind()
        total = (sign * largest).masked_fill(is_nan > 0, math.nan)
    elif order == 0:  # it counts
        total = _all_reduced(wide, dist.ReduceOp.SUM, sharding)
    else:
        total = _all_reduced(wide.pow(order), dist.ReduceOp.SUM, sharding).pow(1 / order)
    return total.to(norms.dtype)


def _all_reduced(values: Tensor, operation: Any, sharding: RowSharding) -> Tensor:
    work = dist.all_reduce(values, operation, group=sharding.vocab.group, async_op=True)
    return Pending(values, work, "chunked_ce: the norm of gradients").wait()


def _order(order: Any) -> float:
    return 2.0 if order in (None, "fro") else float(order)


def _vector_norm(
    x: Tensor,
    ord: Any = 2,
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    norm: Tensor
    if not isinstance(x, RowGradient) or dim is not None or keepdim:  # of each row, perhaps
        norm = torch.linalg.vector_norm(x, ord, dim, keepdim, dtype=dtype, out=out)
        return norm
    norm = torch.linalg.vector_norm(_with_rows(x, _order(ord)), ord, dtype=dtype)
    norm = _norms([x], _order(ord), [norm])[0]
    return norm if out is None else out.copy_(norm)


def _foreach_norm(tensors: list[Tensor], ord: Any = 2, dtype: torch.dtype | None = None) -> list[Tensor]:
    keywords = {} if dtype is None else {"dtype": dtype}
    norms = torch._foreach_norm([_with_rows(one, _order(ord)) for one in tensors], ord, **keywords)  # pyright: ignore[reportPrivateImportUsage]
    return _norms(list(tensors), _order(ord), list(norms))


def _norm(
    x: Tensor,
    p: Any = "fro",
    dim: Any = None,
    keepdim: bool = False,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    return _vector_norm(x, _order(p), dim, keepdim, dtype=dtype, out=out)


def _linalg_norm(
    x: Tensor,
    ord: Any = None,
    dim: Any = None,
    keepdim: bool = False,
    *,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    if ord is not None and x.dim() != 1:  # the norm of a matrix
        norm: Tensor = torch.linalg.norm(x, ord, dim, keepdim, out=out, dtype=dtype)
        return norm
    return _vector_norm(x, _order(ord), dim, keepdim, dtype=dtype, out=out)


# ---- a scaler's check ----


def _unscale(gradients: list[Tensor], found_inf: Tensor, inverse_scale: Tensor) -> None:
    """Every rank skips the step if one of them has to."""
    torch._amp_foreach_non_finite_check_and_unscale_(gradients, found_inf, inverse_scale)  # pyright: ignore[reportPrivateImportUsage]
    for group in {one._sharding.vocab.group for one in gradients if isinstance(one, RowGradient)}:
        work = dist.all_reduce(found_inf, dist.ReduceOp.MAX, group=group, async_op=True)
        Pending(found_inf, work, "chunked_ce: whether gradients are finite").wait()


_SPECIAL: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.linalg.vector_norm: _vector_norm,
    torch.linalg.norm: _linalg_norm,
    torch._foreach_norm: _foreach_norm,  # pyright: ignore[reportPrivateImportUsage]
    torch.norm: _norm,
    torch.functional.norm: _norm,
    Tensor.norm: _norm,
    torch._amp_foreach_non_finite_check_and_unscale_: _unscale,  # pyright: ignore[reportPrivateImportUsage]
}
