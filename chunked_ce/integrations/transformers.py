"""The loss functions of Transformers' language models, under their names and with their signatures.

A model whose head is an `LMHead` needs none of them: its own loss functions take lazy logits in chunks. These are for
models whose logits exist: they make neither an fp32 copy of the logits nor one of their gradient.

    from chunked_ce.integrations.transformers import LOSS_MAPPING

    model.loss_function = LOSS_MAPPING[model.loss_type]

The library ``kernels``, which Transformers asks for layers when ``use_kernels`` is set, knows the same loss by the name
``"ForCausalLMLoss"``; `KERNEL_MAPPING` gives it this one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from chunked_ce.functional import cross_entropy
from chunked_ce.lazy.logits import Lazy
from chunked_ce.narrowing import not_none

__all__ = ["KERNEL_MAPPING", "LOSS_MAPPING", "ForCausalLMLoss", "ForConditionalGenerationLoss", "ForMaskedLMLoss"]


def ForCausalLMLoss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """The cross-entropy of each token's logits with the label of the next token.

    Args:
        logits: (..., T, V), lazy or not, in any floating dtype.
        labels: (..., T), of which the first of each row is no label; not read if ``shift_labels`` is given.
        vocab_size: V.
        num_items_in_batch: what the sum of the losses is divided by; None for the number of labels that count.
        ignore_index: the label of tokens that do not count.
        shift_labels: (..., T), the label of each token's next one.
        kwargs: ignored, as by Transformers, whose models pass on what their forward was given.

    Returns:
        The loss in float32 (float64 for float64); 0 if no label counts.

    Raises:
        IndexError: a label is neither in [0, V) nor ``ignore_index``.
    """
    if shift_labels is None:
        shift_labels = F.pad(not_none(labels), (0, 1), value=ignore_index)[..., 1:]
    return ForMaskedLMLoss(logits, shift_labels, vocab_size, num_items_in_batch, ignore_index)


def ForMaskedLMLoss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    **kwargs: Any,
) -> Tensor:
    """The cross-entropy of each token's logits with its label; arguments, result and errors as in `ForCausalLMLoss`."""
    target = labels.reshape(-1).to(logits.device)
    loss_of: Callable[..., Tensor] = F.cross_entropy if isinstance(logits, Lazy) else cross_entropy
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = loss_of(logits.view(-1, vocab_size), target, ignore_index=ignore_index, reduction=reduction)
    if num_items_in_batch is None:
        return loss
    return loss / (num_items_in_batch.to(loss.device) if isinstance(num_items_in_batch, Tensor) else num_items_in_batch)


ForConditionalGenerationLoss = ForCausalLMLoss

# By the ``loss_type`` of a model, as in ``transformers.loss.loss_utils``.
LOSS_MAPPING = {
    "ForCausalLM": ForCausalLMLoss,
    "ForMaskedLM": ForMaskedLMLoss,
    "ForConditionalGeneration": ForConditionalGenerationLoss,
    "CsmForConditionalGeneration": ForConditionalGenerationLoss,
}


class ForCausalLMLossLayer(nn.Module):
    """`ForCausalLMLoss` as ``kernels`` wants it: a layer without state, whose forward has the function's signature."""

    can_torch_compile = True
    has_backward = True

    def forward(
        self,
        logits: Tensor,
        labels: Tensor | None,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        return ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels)


class _Installed:
    """A "repository" of ``kernels`` that is this package, so that nothing is downloaded."""

    def load(self) -> type[nn.Module]:
        return ForCausalLMLossLayer

    def __str__(self) -> str:
        return "chunked_ce"


# For `kernels.use_kernel_mapping` and `kernels.register_kernel_mapping`: by the name of the loss, and by device.
KERNEL_MAPPING = {"ForCausalLMLoss": dict.fromkeys(("cpu", "cuda", "rocm", "xpu"), _Installed())}
