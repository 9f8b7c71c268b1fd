"""Liger's cross-entropies by their own names, for its version 0.8.5, and all of its losses that are here.

They take what those of ``liger_kernel.transformers`` take, in the same order, and return the same, on every device.
docs/other_names.md says what becomes of each argument, and what differs. The losses of ``liger_kernel.chunked_loss``
can be imported from here as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chunked_ce import functional
from chunked_ce.arguments import check_flag, described, integer
from chunked_ce.checks import check_class_weight
from chunked_ce.integrations.liger_distillation import (
    LigerFusedLinearJSD,
    LigerFusedLinearJSDLoss,
    liger_fused_linear_jsd,
)
from chunked_ce.integrations.liger_options import Options, chunk_options
from chunked_ce.integrations.liger_policy import LigerFusedLinearGRPOLoss
from chunked_ce.integrations.liger_preference import (
    LigerFusedLinearCPOLoss,
    LigerFusedLinearDPOLoss,
    LigerFusedLinearKTOLoss,
    LigerFusedLinearORPOLoss,
    LigerFusedLinearSimPOLoss,
)
from chunked_ce.narrowing import not_none
from chunked_ce.objectives import CrossEntropy
from chunked_ce.objectives.base import Tokens
from chunked_ce.objectives.cross_entropy import check_z_loss
from chunked_ce.rows.statistics import RowStatistics

__all__ = [
    "CrossEntropyOutput",
    "LigerCrossEntropyLoss",
    "LigerFusedLinearCPOLoss",
    "LigerFusedLinearCrossEntropyLoss",
    "LigerFusedLinearDPOLoss",
    "LigerFusedLinearGRPOLoss",
    "LigerFusedLinearJSD",
    "LigerFusedLinearJSDLoss",
    "LigerFusedLinearKTOLoss",
    "LigerFusedLinearORPOLoss",
    "LigerFusedLinearSimPOLoss",
    "liger_cross_entropy",
    "liger_fused_linear_cross_entropy",
    "liger_fused_linear_jsd",
]


@dataclasses.dataclass
class CrossEntropyOutput:
    """A loss and what was asked for beside it, which has no gradient."""

    loss: Tensor
    z_loss: Tensor | None = None
    """The z-loss alone, which ``loss`` contains, reduced as it is."""
    token_accuracy: Tensor | None = None
    """The share of tokens that count whose target has the largest logit; 1.0 or 0.0 per token for ``"none"``."""
    predicted_tokens: Tensor | None = None
    """The id of the largest logit of each token, the first of equals, int64; -1 where ignored."""


@dataclasses.dataclass(frozen=True)
class _Loss(CrossEntropy):
    """The cross-entropy, perhaps times the target's probability, a constant, and the sum of the z-losses beside it."""

    scaled: bool = False

    def loss(self, rows: RowStatistics, tokens: Tokens) -> Tensor:
        loss = super().loss(rows, tokens)
        return loss * rows.logprob.detach().exp() if self.scaled else loss

    def slopes(self, rows: RowStatistics, tokens: Tokens) -> RowStatistics:
        slopes = super().slopes(rows, tokens)
        return slopes.scaled(rows.logprob.exp()) if self.scaled else slopes

    def sums(self, rows: RowStatistics, tokens: Tokens) -> dict[str, Tensor]:
        z_loss = self.z_loss * rows.lse.square()
        return {"z_loss": z_loss * rows.logprob.exp() if self.scaled else z_loss}


@dataclasses.dataclass(frozen=True)
class _ZLoss(_Loss):
    """The z-loss alone."""

    def loss(self, rows: RowStatistics, tokens: Tokens) -> Tensor:
        return self.sums(rows, tokens)["z_loss"]


def liger_fused_linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ce_weight: Tensor | None = None,
    ignore_index: int = -100,
    lse_square_scale: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    return_z_loss: bool = False,
    accum_dtype: torch.dtype | None = None,
    use_token_scaling: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
    chunk_mem_const: int = 1,
) -> Tensor | CrossEntropyOutput:
    """The cross-entropy of the logits ``input @ weight.T + bias``: `chunked_ce.linear_cross_entropy` has the formula.

    The loss is in float32 (float64 for float64 input), 0 where ignored and where no token counts; the z-loss beside it
    has the dtype of ``input``.

    Args:
        input: hidden states (..., D).
        weight: the head (V, D).
        target: class indices (...).
        bias: (V,).
        ce_weight: class weights (V,), which weigh the cross-entropy, but not the z-loss: the mean of the first divides
            by the sum of ``ce_weight[target]``, that of the second by the number of tokens that count, for which the
            host waits if the loss has both.
        lse_square_scale: the factor of the z-loss, >= 0.
        ignore_index, label_smoothing, reduction, softcap: as there.
        accum_dtype: in which the gradient of the head is summed; None is float32 here, whatever the head's dtype.
        use_token_scaling: multiply the loss of each token by the probability of its target, as a constant.
        return_z_loss, return_token_accuracy, return_predicted_tokens: return a `CrossEntropyOutput`. Predicted tokens,
            and for ``"none"`` the other two, take one more product of 2 N V D operations.
        chunk_mem_const: an integer >= 1, has no effect: `chunked_ce.plan` chooses the chunks.

    Raises:
        ValueError, TypeError: an argument is not as described. Tensors are reported with the names of
            `chunked_ce.linear_cross_entropy`: ``linear_weight`` and ``linear_bias`` are these here.
        IndexError: a target is outside [0, V) and not ``ignore_index`` (on a GPU: a device-side assertion).

    >>> import torch
    >>> output = liger_fused_linear_cross_entropy(
    ...     torch.eye(2, 4), torch.eye(8, 4), torch.tensor([0, 5]), lse_square_scale=0.1, return_z_loss=True
    ... )
    >>> output.loss, output.z_loss
    (tensor(2.2911), tensor(0.5171))
    """
    if integer("chunk_mem_const", chunk_mem_const) < 1:
        raise ValueError(f"chunk_mem_const must be >= 1, was {described(chunk_mem_const)}")
    check_flag("use_token_scaling", use_token_scaling)
    tensors = input, weight, target
    linear_loss: Callable[..., Any] = functional.linear_loss
    keywords: dict[str, Any] = {"linear_bias": bias, "ignore_index": ignore_index, "softcap": softcap}
    keywords["options"] = chunk_options(accum_dtype)
    call = _Call(
        lambda objective, **more: linear_loss(objective, *tensors, **keywords, **more),
        lambda: not_none(functional.linear_statistics(*tensors, outputs=("predicted",), **keywords).predicted),
        target,
        ignore_index,
        reduction,
    )
    objective, call = call.with_terms(ce_weight, lse_square_scale, label_smoothing, use_token_scaling)
    found = call.result(objective, return_z_loss, return_token_accuracy, return_predicted_tokens)
    if not isinstance(found, Tensor) and found.z_loss is not None:
        found.z_loss = found.z_loss.to(input.dtype)
    return found


def liger_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: None = None,
    ignore_index: int = -100,
    reduce: None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    return_z_loss: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
) -> Tensor | CrossEntropyOutput:
    """`liger_fused_linear_cross_entropy` of logits ``input`` (..., V) that exist, which stay as they are.

    Loss and z-loss are rounded to the logits' dtype, as those of Liger and of torch are.
    ``weight`` are the class weights (V,). ``size_average`` and ``reduce``, which torch has given up, must be None.

    >>> import torch
    >>> liger_cross_entropy(torch.zeros(2, 8), torch.tensor([3, -100]))
    tensor(2.0794)
    """
    for name, value in (("size_average", size_average), ("reduce", reduce)):
        if value is not None:
            raise ValueError(f"{name} must be None, was {described(value)}: reduction says it")
    keywords: dict[str, Any] = {"ignore_index": ignore_index, "softcap": softcap}
    call = _Call(
        lambda objective, **more: functional.logits_loss(objective, input, target, **keywords, **more),
        lambda: input.argmax(-1).where(target != ignore_index, -1),
        target,
        ignore_index,
        reduction,
    )
    objective, call = call.with_terms(weight, lse_square_scale, label_smoothing)
    found = call.result(objective, return_z_loss, return_token_accuracy, return_predicted_tokens)
    if isinstance(found, Tensor):
        return found.to(input.dtype)
    found.loss = found.loss.to(input.dtype)
    if found.z_loss is not None:
        found.z_loss = found.z_loss.to(input.dtype)
    return found


class LigerFusedLinearCrossEntropyLoss(Options):
    """`liger_fused_linear_cross_entropy` as a module, called with the head first.

    >>> import torch
    >>> LigerFusedLinearCrossEntropyLoss()(torch.eye(8, 4), torch.zeros(2, 4), torch.tensor([3, -100]))
    tensor(2.0794)
    """

    def __init__(
        self,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> None:
        super().__init__(locals())
        check_class_weight(ce_weight, "ce_weight")
        check_z_loss(lse_square_scale, "lse_square_scale")

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor | CrossEntropyOutput:
        return liger_fused_linear_cross_entropy(_input, lin_weight, target, bias, **self.options())


class LigerCrossEntropyLoss(Options):
    """`liger_cross_entropy` as a module.

    >>> import torch
    >>> LigerCrossEntropyLoss(reduction="sum")(torch.zeros(2, 8), torch.tensor([3, 4]))
    tensor(4.1589)
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> None:
        super().__init__(locals())
        check_class_weight(weight)
        check_z_loss(lse_square_scale, "lse_square_scale")

    def forward(self, _input: Tensor, target: Tensor) -> Tensor | CrossEntropyOutput:
        return liger_cross_entropy(_input, target, **self.options())


class _Call(NamedTuple):
    """One call, of a head or of logits."""

    loss_of: Callable[..., Any]  # of an objective, and keywords of `chunked_ce.linear_loss`
    predicted: Callable[[], Tensor]
    target: Tensor
    ignore_index: int
    reduction: str

    def counted(self) -> Tensor:
        return self.target != self.ignore_index

    def with_terms(
        self, class_weight: Tensor | None, lse_square_scale: float, label_smoothing: float, scaled: bool = False
    ) -> tuple[_Loss, _Call]:
        """The objective, and the call with the reduction that it needs."""
        objective = _Loss(label_smoothing, lse_square_scale, class_weight, scaled)
        if not objective.z_loss or class_weight is None or self.reduction != "mean":
            return objective, self
        # A mean over class weights and one over tokens are one sum.
        counted = self.counted()
        weights = class_weight.double()
        weights = weights / weights[self.target.where(counted, 0)].where(counted, 0).sum()
        z_loss = objective.z_loss / max(int(counted.sum()), 1)
        return dataclasses.replace(objective, class_weight=weights, z_loss=z_loss), self._replace(reduction="sum")

    def result(self, objective: _Loss, z_loss: bool, accuracy: bool, predicted: bool) -> Tensor | CrossEntropyOutput:
        flags = {"return_z_loss": z_loss, "return_token_accuracy": accuracy, "return_predicted_tokens": predicted}
        for name, flag in flags.items():
            check_flag(name, flag)
        per_token = self.reduction == "none"
        if per_token or not (z_loss or accuracy):
            output = CrossEntropyOutput(self.loss_of(objective, reduction=self.reduction))
        else:
            loss, stats = self.loss_of(objective, reduction=self.reduction, return_stats=True)
            divisor = 1 if self.reduction == "sum" else stats.num_tokens.where(stats.num_tokens != 0, 1)
            output = CrossEntropyOutput(loss, z_loss=stats.z_loss / divisor if z_loss else None)
            if accuracy:
                output.token_accuracy = stats.num_correct / self.counted().sum().clamp(min=1)
        if not any(flags.values()):
            return output.loss
        with torch.no_grad():
            ids = self.predicted() if predicted or (accuracy and per_token) else None
            if z_loss and per_token:
                alone = _ZLoss(z_loss=objective.z_loss, scaled=objective.scaled)
                output.z_loss = self.loss_of(alone, reduction="none")
            if accuracy and per_token:
                output.token_accuracy = (self.counted() & (ids == self.target)).float()
        output.predicted_tokens = ids if predicted else None
        return output
