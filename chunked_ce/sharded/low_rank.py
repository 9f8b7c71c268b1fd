"""LoRA and DoRA on an `LMHead`: their product is part of the lazy logits, on a sharded head each rank with its rows."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from chunked_ce.lazy.head import LazyHead, is_whole
from chunked_ce.lazy.obstacles import Obstacle
from chunked_ce.lazy.peft_layers import LoraLayer
from chunked_ce.parallel.dtensors import is_dtensor
from chunked_ce.parallel.vocab import VocabShard
from chunked_ce.rows.logits import Logits

__all__ = ["LowRankHead", "formed"]

_OTHER_KINDS = (
    "Adapt the head by plain LoRA, or by DoRA as its only adapter, without a bias and with parameters that no engine "
    "keeps elsewhere; or leave it out of target_modules"
)
_NORM_ELEMENTS = 2**22  # elements of the head's rows whose norms are taken at a time


class LowRankHead(LoraLayer):
    """Goes before PEFT's LoRA layer around an `LMHead`; PEFT's own code would form the logits.

    Adapters of a sharded head are whole on every rank, and engines average their gradients as those of any other
    parameter.
    """

    base_layer: Any

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not names:
            return super().forward(x, *args, **kwargs)
        if args or kwargs:
            return formed(self.base_layer, super().forward, x, *args, **kwargs)
        vocab, others = self.base_layer.vocab, [name for name in names if name in self.lora_variant]
        if others and vocab is not None:
            raise NotImplementedError(
                f"adapter {others[0]!r} on a sharded head must be plain LoRA: one that is not needs the whole head. "
                "LMHead.unwrap(model), on every rank, makes the head whole"
            )
        if not self.base_layer.can_add_low_rank(x):
            return formed(self.base_layer, super().forward, x)
        if others and not self._is_dora(names):
            kind = _name_of(self.lora_variant[others[0]])
            obstacle = Obstacle(f"adapter {others[0]!r} on it is no plain LoRA ({kind})", _OTHER_KINDS)
            with _computing_at_once(self.base_layer, obstacle):
                return formed(self.base_layer, super().forward, x)
        pairs = [self._dora(names[0], x)] if others else [self._lora(name, x) for name in names]
        hidden, weights = zip(*pairs, strict=True)
        both = pairs[0] if len(pairs) == 1 else (torch.cat(hidden, -1), torch.cat(weights, -1))
        return self.base_layer.with_low_rank(x, *both)

    def _lora(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """The factors (..., r) and (V, r) of an adapter, whose bias is one column more."""
        x = self.lora_dropout[name](self._cast_input_dtype(x, self.lora_A[name].weight.dtype))
        hidden, weight = self.lora_A[name](x) * self.scaling[name], self._weight_with_bias(name)
        if weight.shape[1] > hidden.shape[-1]:
            hidden = torch.cat([hidden, torch.full_like(hidden[..., :1], self.scaling[name])], -1)
        return hidden, weight

    def _weight_with_bias(self, name: str) -> Tensor:
        """A copy of B (V, r), beside its bias if it has one: an engine may take it back before a loss comes."""
        factor, vocab = self.lora_B[name], self.base_layer.vocab
        if vocab is None and (hasattr(factor.weight, "ds_id") or is_dtensor(factor.weight)):
            return _by_a_call(factor)
        parts = [factor.weight] if factor.bias is None else [factor.weight, factor.bias.unsqueeze(1)]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        if vocab is None:
            return whole.clone()
        rows: Tensor = _OwnRows.apply(whole, vocab)  # type: ignore[no-untyped-call]
        return rows

    def _is_dora(self, names: list[str]) -> bool:
        """Whether there is one adapter, a DoRA whose parameters are all at hand."""
        kind, variant = sys.modules["peft.tuners.lora.variants"].DoraLinearVariant, self.lora_variant[names[0]]
        if len(names) > 1 or not (variant is kind or isinstance(variant, kind)):
            return False
        factors = (self.lora_B[names[0]], self.lora_A[names[0]], self.lora_magnitude_vector[names[0]])
        whole = self.base_layer.own_parameters()[0]
        weights = [whole, *(dict.get(one._parameters, "weight") for one in factors)]
        if any(weight is None or hasattr(weight, "ds_id") or is_dtensor(weight) for weight in weights):
            return False
        return whole is not None and is_whole(whole) and self.lora_B[names[0]].bias is None

    def _dora(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """What DoRA adds to the product ``x W^T``, as factors (..., D + r) and (V, D + r).

        With ``s = m / |W + c B A|``, a number for each word whose norm is a constant (arXiv:2402.09353, section 4.3),
        it is ``(s - 1) x W^T + s c x A^T B^T``. The two products stay apart: their sum rounded to the head's dtype
        would lose most of an adapter that is small beside it.
        """
        down, up, weight = self.lora_A[name].weight, self.lora_B[name].weight, self.base_layer.own_parameters()[0]
        x = self.lora_dropout[name](self._cast_input_dtype(x, down.dtype))
        scale = self.lora_magnitude_vector[name].weight / _norms(weight, down, up, self.scaling[name])
        scale = scale.unsqueeze(1)
        factors = ((scale - 1) * weight).to(weight.dtype), (scale * up).to(weight.dtype)
        return torch.cat([x, self.lora_A[name](x) * self.scaling[name]], -1), torch.cat(factors, -1)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What merging adds to the rows of the head, or to this rank's (V_r, D)."""
        whole, vocab = super().get_delta_weight(adapter), self.base_layer.vocab
        return whole if vocab is None else whole[vocab.start : vocab.stop]


def formed(head: LazyHead, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The logits of an adapter around ``head``, whose ``forward`` changes the head's product, as merging it does."""
    settings = head._settings
    if settings.logits == Logits():
        return forward(*args, **kwargs)
    vars(head)["_settings"] = settings.of_product()
    try:
        product = forward(*args, **kwargs)
    finally:
        vars(head)["_settings"] = settings
    return settings.logits(product)


@contextlib.contextmanager
def _computing_at_once(head: LazyHead, obstacle: Obstacle) -> Iterator[None]:
    """Let calls of the head compute ordinary logits, with one warning that says why."""
    head.record.tell("adapter", f"an LMHead computes its logits at once, because {obstacle.why}. {obstacle.remedy}")
    obstacle.put_on(head)
    try:
        yield
    finally:
        Obstacle.take_off(head)


def _name_of(variant: Any) -> str:
    return (variant if isinstance(variant, type) else type(variant)).__name__


@torch.no_grad()
def _norms(weight: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
    """The norms (V,) of the rows of ``weight + scaling * up @ down``, in float32 (float64)."""
    dtype = torch.promote_types(torch.promote_types(weight.dtype, up.dtype), torch.float32)
    size = max(1, _NORM_ELEMENTS // weight.shape[1])
    pairs = zip(weight.split(size), up.split(size), strict=True)
    down = down.to(dtype)
    return torch.cat([(rows.to(dtype) + scaling * (some.to(dtype) @ down)).norm(dim=1) for rows, some in pairs])


def _by_a_call(factor: Any) -> Tensor:
    """The weight (V, r) of a layer, beside its bias, as its call gives it: engines gather its parameters for that."""
    size = factor.in_features
    parameter = next(factor.parameters())
    unit = torch.eye(size, dtype=parameter.dtype, device=parameter.device)
    found: Tensor
    if factor.bias is None:
        found = factor(unit)
        return found.T
    found = factor(torch.cat([unit, unit.new_zeros(1, size)]))  # (r + 1, V)
    return torch.cat([found[:-1] - found[-1:], found[-1:]]).T


class _OwnRows(torch.autograd.Function):
    """This rank's rows of a weight (V, r) whose gradient an engine averages over the ranks later."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, vocab: VocabShard) -> Tensor:
        ctx.vocab, ctx.shape = vocab, weight.shape
        return weight[vocab.start : vocab.stop].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        whole = grad.new_zeros(ctx.shape)
        whole[ctx.vocab.start : ctx.vocab.stop] = grad * ctx.vocab.size  # the rows' gradient is divided by it already
        return whole, None
