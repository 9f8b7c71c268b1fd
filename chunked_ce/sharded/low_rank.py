"""LoRA on an `LMHead`: its product is part of the lazy logits, on a sharded head each rank with its rows of B."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from chunked_ce.parallel.vocab import VocabShard

__all__ = ["LowRankHead"]


class LowRankHead:
    """Goes before PEFT's LoRA layer around an `LMHead`; PEFT's own code would form the logits.

    Adapters of a sharded head are whole on every rank, and engines average their gradients as those of any other
    parameter.
    """

    base_layer: Any

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or args or kwargs or not names:
            return super().forward(x, *args, **kwargs)
        vocab = self.base_layer.vocab
        others = [name for name in names if name in self.lora_variant or self.lora_B[name].bias is not None]
        if others and vocab is not None:
            raise NotImplementedError(
                f"adapter {others[0]!r} on a sharded head must be plain LoRA without a bias: one that is not needs the "
                "logits of all words. LMHead.unwrap(model), on every rank, makes the head whole"
            )
        is_released = any(hasattr(self.lora_B[name].weight, "ds_id") for name in names)  # before the loss, by ZeRO-3
        if others or not self.base_layer.can_add_low_rank(x) or (is_released and vocab is None):
            return super().forward(x)
        hidden = [self._scaled_hidden(name, x) for name in names]
        weights = [self.lora_B[name].weight for name in names]
        # Copies: an engine may take a weight back after this forward, and a loss comes later.
        weights = [weight.clone() if vocab is None else _OwnRows.apply(weight, vocab) for weight in weights]
        both = (hidden[0], weights[0]) if len(names) == 1 else (torch.cat(hidden, -1), torch.cat(weights, -1))
        return self.base_layer.with_low_rank(x, *both)

    def _scaled_hidden(self, name: str, x: Tensor) -> Tensor:
        """``scaling * A dropout(x)`` (..., r) of an adapter."""
        factor = self.lora_A[name]
        return factor(self.lora_dropout[name](self._cast_input_dtype(x, factor.weight.dtype))) * self.scaling[name]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What merging adds to the rows of the head, or to this rank's (V_r, D)."""
        whole, vocab = super().get_delta_weight(adapter), self.base_layer.vocab
        return whole if vocab is None else whole[vocab.start : vocab.stop]


class _OwnRows(torch.autograd.Function):
    """This rank's rows of a weight (V, r) whose gradient an engine averages over the ranks later."""

    @staticmethod
    def forward(ctx, weight: Tensor, vocab: VocabShard) -> Tensor:
        ctx.vocab, ctx.shape = vocab, weight.shape
        return weight[vocab.start : vocab.stop].clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        whole = grad.new_zeros(ctx.shape)
        whole[ctx.vocab.start : ctx.vocab.stop] = grad * ctx.vocab.size  # the rows' gradient is divided by it already
        return whole, None
