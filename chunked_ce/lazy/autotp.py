"""Heads that are layers of DeepSpeed's AutoTP."""

from __future__ import annotations

import dataclasses
import functools
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chunked_ce.lazy.layout import LayoutWithForward
from chunked_ce.lazy.logits import Lazy
from chunked_ce.parallel.vocab import VocabShard

__all__ = ["AutoTP", "autotp_of", "is_autotp"]


@dataclasses.dataclass(frozen=True, eq=False)
class AutoTP(LayoutWithForward):
    """A ``VocabParallelLinear``, or a ``LinearLayer`` that gathers its output."""

    group: Any
    sizes: tuple[int, ...]  # rows of each rank
    in_features: int
    gathers: bool  # the layer's own output
    vocab: VocabShard | None

    @property
    def has_all_words(self) -> bool:
        return self.gathers or self.vocab is None

    @property
    def rows(self) -> int:
        return sum(self.sizes) if self.vocab is None else self.vocab.rows

    def takes(self, hidden: Any) -> bool:
        return type(hidden) in (Tensor, nn.Parameter) and hidden.shape[-1:] == (self.in_features,)

    def forward(self, head: nn.Module, input: Tensor) -> Tensor:
        found: Tensor = _layers().LinearLayer.forward(head, input)
        return found

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        found = F.linear(_layers().ColumnParallel.apply(self.group, hidden), weight, bias)
        whole: Tensor = _layers().GatherFromTensorParallelRegion.apply(self.group, found, self.sizes)
        return whole

    def __deepcopy__(self, _memo: dict[int, Any]) -> AutoTP:
        return self  # a process group cannot be copied


def is_autotp(module: nn.Module) -> bool:
    return _layers() is not None and isinstance(module, _layers().TensorParallel_Layer)


def autotp_of(module: nn.Module) -> AutoTP | None:
    """How AutoTP has sharded a head, if it has, and if its losses can be taken from its rows."""
    if not is_autotp(module) or type(module) not in (_layers().VocabParallelLinear, _layers().LinearLayer):
        return None
    layer: Any = module
    gathers = type(module) is _layers().LinearLayer
    if (gathers and not layer.gather_output) or "forward" in vars(module):
        return None
    sizes: tuple[int, ...] = tuple(layer._partition_sizes)
    vocab = None
    if layer.is_tp_parallel:
        start = sum(sizes[: layer.tp_index])
        vocab = VocabShard(layer.mp_group, start, start + sizes[layer.tp_index], sum(sizes))
    if not gathers:
        _take_losses()
    return AutoTP(layer.mp_group, sizes, layer._orig_weight_shape[1], gathers, vocab)


def _layers() -> Any:
    # No such layer exists before somebody has imported its module, which is slow.
    return sys.modules.get("deepspeed.module_inject.layers")


@functools.cache
def _take_losses() -> None:
    """Let the loss that AutoTP gives to a model with a ``VocabParallelLinear`` take lazy logits too.

    AutoTP sets it after the layers, and checks that the model has it: only its class can be told.
    """
    from deepspeed.sequence.cross_entropy import VocabParallelCausalLMLoss

    of_shards = VocabParallelCausalLMLoss.__call__

    @functools.wraps(of_shards)
    def call(
        self: Any,
        logits: Tensor,
        labels: Tensor | None = None,
        vocab_size: int | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        **kwargs: Any,
    ) -> Any:
        if not isinstance(logits, Lazy) or logits.is_computed:
            given = {"labels": labels, "vocab_size": vocab_size, "shift_labels": shift_labels}
            return of_shards(self, logits, **given, num_items_in_batch=num_items_in_batch, **kwargs)
        if shift_labels is None:
            if labels is None:
                raise ValueError("labels or shift_labels must be given")
            logits, shift_labels = logits[..., :-1, :], labels[..., 1:]
        if self.sp_group is not None:
            raise NotImplementedError(
                "VocabParallelCausalLMLoss with an sp_group takes no lazy logits: LMHead.unwrap(model), or leave the "
                "sum over sequence-parallel ranks to the engine"
            )
        reduction = "mean" if num_items_in_batch is None else "sum"
        flat = logits.reshape(-1, logits.shape[-1]), shift_labels.reshape(-1)
        loss = F.cross_entropy(*flat, ignore_index=self.ignore_index, reduction=reduction)
        if num_items_in_batch is None:
            return loss
        return loss / torch.as_tensor(num_items_in_batch, device=loss.device, dtype=loss.dtype).clamp_min(1)

    VocabParallelCausalLMLoss.__call__ = call
