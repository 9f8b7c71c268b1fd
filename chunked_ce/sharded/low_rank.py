"""LoRA on a sharded head: its product is part of the lazy logits, each rank with its rows of the second factor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from chunked_ce.parallel.vocab import VocabShard

__all__ = ["LowRankHead"]


class LowRankHead:
    """Goes before PEFT's LoRA layer around a sharded `LMHead`; PEFT's own code would form the logits.

    Adapters are whole on every rank, and engines average their gradients as those of any other parameter.
    """

    base_layer: Any

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or args or kwargs or not names:
            return super().forward(x, *args, **kwargs)
        for name in names:
            if name in self.lora_variant or self.lora_B[name].bias is not None:
                raise NotImplementedError(
                    f"adapter {name!r} on a sharded head must be plain LoRA without a bias: one that is not needs the "
                    "logits of all words. LMHead.unwrap(model), on every rank, makes the head whole"
                )
        vocab = self.base_layer.vocab
        hidden = [self._scaled_hidden(name, x) for name in names]
        weights = [_OwnRows.apply(self.lora_B[name].weight, vocab) for name in names]
        return self.base_layer.with_low_rank(x, torch.cat(hidden, -1), torch.cat(weights, -1))

    def _scaled_hidden(self, name: str, x: Tensor) -> Tensor:
        """``scaling * A dropout(x)`` (..., r) of an adapter."""
        factor = self.lora_A[name]
        return factor(self.lora_dropout[name](self._cast_input_dtype(x, factor.weight.dtype))) * self.scaling[name]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What merging adds to this rank's rows (V_r, D)."""
        vocab = self.base_layer.vocab
        return super().get_delta_weight(adapter)[vocab.start : vocab.stop]


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
