"""The functions: check the arguments, flatten the tokens, run the chunks, reduce."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from chunked_ce.checks import check_keywords, check_options, check_tensors
from chunked_ce.engine import ops, plain
from chunked_ce.engine.linear import Head, Settings
from chunked_ce.engine.rows import Wanted, work_dtype
from chunked_ce.objective import Logits, Objective, RowStatistics
from chunked_ce.options import ChunkOptions

__all__ = ["LossStats", "cross_entropy", "linear_cross_entropy", "linear_logprobs"]


class LossStats(NamedTuple):
    """What a loss counted, as detached 0-d float32 tensors on the device.

    Ranks, chunks and micro-batches combine by SUM, ``lse_max`` by MAX. Predictions, entropies and log-sum-exps are of
    the tokens that count, each counted once whatever its weight.
    """

    loss_sum: Tensor
    """Sum of the losses, token weights in."""
    num_tokens: Tensor
    """This call's share of the mean's denominator: the sum of ``token_weight * weight[target]``."""
    num_correct: Tensor
    """Tokens whose target has the largest logit (the first of equals)."""
    entropy_sum: Tensor
    """Sum of the entropies of the predicted distributions, in nats."""
    lse_max: Tensor
    """The largest log-sum-exp, -inf if no token counts."""


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    token_weight: Tensor | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    num_tokens: float | Tensor | None = None,
    vocab: None = None,
    options: ChunkOptions | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, LossStats]:
    """Cross-entropy of ``logit_scale * (input @ linear_weight.T + linear_bias)``, whose logits never exist as a whole.

    With ``z`` the logits of a token (softcapped: ``softcap * tanh(z / softcap)``), ``w`` the class weights and ``lse``
    the log-sum-exp of ``z``, the loss of a token is ``token_weight`` times::

        (1 - label_smoothing) * w[y] * (lse - z[y]) + label_smoothing / V * sum_v w[v] * (lse - z[v]) + z_loss * lse**2

    the first line as in `torch.nn.functional.cross_entropy`, the z-loss as in PaLM (arXiv:2204.02311, section 5), the
    softcap as in Gemma 2 (arXiv:2408.00118, section 2). A token whose target is ``ignore_index`` contributes exactly 0
    to the value and to every gradient, whatever its hidden state holds, and on the CPU costs nothing.

    Args:
        input: hidden states (..., D), floating point; one unbatched token (D,) too.
        linear_weight: the head (V, D). Its dtype may differ from the input's; products run in the autocast dtype if
            autocast is on, else in the input's dtype.
        target: class indices (...), int32 or int64.
        linear_bias: (V,).
        weight: class weights (V,), constant.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``. The mean divides by the sum of ``token_weight * w[y]`` over the
            tokens that count, or by ``num_tokens``.
        ignore_index: the target of tokens that do not count.
        label_smoothing: in [0, 1].
        token_weight: a weight for each token, in the shape of ``target``, constant.
        z_loss: factor of ``lse**2``, >= 0.
        softcap: > 0, or None for none.
        logit_scale: a factor of the logits.
        num_tokens: the mean's denominator, a number or a tensor of one element, >= 0, such as the tokens of all ranks;
            0 makes the loss 0.
        options: how to compute (`ChunkOptions`); None chooses well.
        return_stats: return ``(loss, LossStats)``.

    Returns:
        The loss in float32 (float64 for float64 input): 0-d, or in the shape of ``target`` for ``"none"``, 0 where
        ignored. If no token counts it is 0, attached to the graph.

    Raises:
        ValueError, TypeError: an argument is not as described above.
        IndexError: a target is outside [0, V) and not ``ignore_index`` (on a GPU: a device-side assertion).

    >>> hidden, head = torch.eye(3, 4, requires_grad=True), torch.eye(5, 4)
    >>> linear_cross_entropy(hidden, head, torch.tensor([0, 4, -100]))
    tensor(1.4048, grad_fn=<MulBackward0>)
    """
    check_tensors(input, linear_weight, target, linear_bias, weight, token_weight)
    check_keywords(
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        logit_scale=logit_scale,
        num_tokens=num_tokens,
        vocab=vocab,
    )
    options = check_options(options, reduction)
    hidden = input.reshape(-1, input.shape[-1])
    settings = _settings(input, options)
    weights = _Weights.of(target, ignore_index, weight, token_weight, work_dtype(settings.compute_dtype))
    head = Head(linear_weight, linear_bias, Logits(float(logit_scale), _float(softcap)), weights.classes)
    objective = Objective(float(label_smoothing), float(z_loss), linear_weight.shape[0])
    wanted = Wanted(label_smoothing > 0, mean=return_stats, correct=return_stats)
    needed = _needed(input, linear_weight, linear_bias)
    upstream = weights.upstream(reduction, num_tokens)

    if reduction != "none" and options.gradients != "backward" and any(needed) and not _transformed():
        prepared = upstream if settings.compute_dtype != torch.float16 else torch.frexp(upstream).mantissa
        prepared = prepared.where(prepared != 0, 1)
        loss_sum, rows = ops.linear_loss(
            hidden,
            head,
            weights.target,
            weights.tokens,
            prepared,
            objective,
            ignore_index,
            wanted,
            needed,
            settings,
        )
        loss = loss_sum * upstream
    else:
        compute = plain.linear_statistics if _transformed() else ops.linear_statistics
        last = settings.compute_dtype if _transformed() else settings
        rows = compute(hidden, head, weights.target, ignore_index, wanted, last)
        losses = weights.losses(objective, rows)
        loss_sum = losses.sum()
        loss = losses.view(target.shape) if reduction == "none" else loss_sum * upstream
    return (loss, weights.stats(loss_sum, rows)) if return_stats else loss


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    token_weight: Tensor | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    num_tokens: float | Tensor | None = None,
    vocab: None = None,
    options: ChunkOptions | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, LossStats]:
    """`linear_cross_entropy` of logits that exist, (..., V): a few rows at a time, without an fp32 copy of them.

    The arguments, the result and the errors are those of `linear_cross_entropy`.

    >>> cross_entropy(torch.zeros(2, 8), torch.tensor([3, -100]))
    tensor(2.0794)
    """
    check_tensors(logits, None, target, None, weight, token_weight, input_name="logits")
    check_keywords(
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        logit_scale=logit_scale,
        num_tokens=num_tokens,
        vocab=vocab,
    )
    check_options(options, reduction)
    weights = _Weights.of(target, ignore_index, weight, token_weight, work_dtype(logits.dtype))
    objective = Objective(float(label_smoothing), float(z_loss), logits.shape[-1])
    wanted = Wanted(label_smoothing > 0, mean=return_stats, correct=return_stats)
    compute = plain.logits_statistics if _transformed() else ops.logits_statistics
    rows = compute(
        logits.reshape(-1, logits.shape[-1]),
        weights.target,
        weights.classes,
        Logits(float(logit_scale), _float(softcap)),
        ignore_index,
        wanted,
    )
    losses = weights.losses(objective, rows)
    loss_sum = losses.sum()
    loss = losses.view(target.shape) if reduction == "none" else loss_sum * weights.upstream(reduction, num_tokens)
    return (loss, weights.stats(loss_sum, rows)) if return_stats else loss


def linear_logprobs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab: None = None,
    options: ChunkOptions | None = None,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The log-probability of each token's target, differentiable per token, in the shape of ``target``.

    The arguments and errors are those of `linear_cross_entropy`. With ``return_entropy`` the result is
    ``(logprobs, entropy)``, the entropies in nats and differentiable too. Both are 0 where ignored, in float32
    (float64 for float64 input). Logits are formed again in the backward, one block of the vocabulary at a time.

    >>> linear_logprobs(torch.zeros(2, 4), torch.eye(8, 4), torch.tensor([3, -100]))
    tensor([-2.0794,  0.0000])
    """
    check_tensors(input, linear_weight, target, linear_bias, None, None)
    check_keywords(ignore_index=ignore_index, softcap=softcap, logit_scale=logit_scale, vocab=vocab)
    options = check_options(options, "none")
    settings = _settings(input, options)
    head = Head(linear_weight, linear_bias, Logits(float(logit_scale), _float(softcap)), None)
    hidden = input.reshape(-1, input.shape[-1])
    compute = plain.linear_statistics if _transformed() else ops.linear_statistics
    last = settings.compute_dtype if _transformed() else settings
    rows = compute(hidden, head, target.reshape(-1).long(), ignore_index, Wanted(mean=return_entropy), last)
    logprobs = (-rows.nll).view(target.shape)
    return (logprobs, rows.entropy.view(target.shape)) if return_entropy else logprobs


class _Weights(NamedTuple):
    """The flattened targets and all that weighs them, in the work dtype."""

    target: Tensor  # (N,)
    ignore_index: int
    classes: Tensor | None  # (V,)
    tokens: Tensor | None  # (N,)
    dtype: torch.dtype

    @classmethod
    def of(
        cls,
        target: Tensor,
        ignore_index: int,
        weight: Tensor | None,
        token_weight: Tensor | None,
        dtype: torch.dtype,
    ) -> _Weights:
        return cls(
            target.reshape(-1).long(),
            ignore_index,
            None if weight is None else weight.to(dtype),
            None if token_weight is None else token_weight.reshape(-1).to(dtype),
            dtype,
        )

    def losses(self, objective: Objective, rows: RowStatistics) -> Tensor:
        return objective.token_losses(rows, self.target, self.ignore_index, self.classes, self.tokens)

    def count(self) -> Tensor:
        """The sum of ``token_weight * weight[target]`` over the tokens that count, ()."""
        counted = self.target != self.ignore_index
        share = counted.to(self.dtype) if self.tokens is None else self.tokens.where(counted, 0)
        if self.classes is not None:
            # A target out of range is reported by the chunks; here it only must not be read.
            here = counted & (self.target >= 0) & (self.target < len(self.classes))
            share = share * self.classes[self.target.where(here, 0)]
        return share.sum()

    def upstream(self, reduction: str, num_tokens: float | Tensor | None) -> Tensor:
        """What the reduction multiplies the sum of the losses by, ()."""
        if reduction != "mean":
            return torch.ones((), dtype=self.dtype, device=self.target.device)
        if num_tokens is None:
            denominator = self.count()
        else:
            denominator = torch.as_tensor(num_tokens, dtype=self.dtype, device=self.target.device)
            denominator = denominator.detach().reshape(())
        return torch.where(denominator == 0, 0.0, 1 / denominator)

    def stats(self, loss_sum: Tensor, rows: RowStatistics) -> LossStats:
        counted = self.target != self.ignore_index
        lse_max = torch.cat([rows.lse.new_full((1,), -torch.inf), rows.lse.where(counted, -torch.inf)]).amax()
        sums = (loss_sum, self.count(), rows.correct.sum(), rows.entropy.sum(), lse_max)
        return LossStats(*(value.detach().float() for value in sums))


def _settings(input: Tensor, options: ChunkOptions) -> Settings:
    device_type = input.device.type
    dtype = input.dtype
    if dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    chunk_size = None if options.chunk_size == "auto" else options.chunk_size
    return Settings(dtype, options.accumulate_dtype, chunk_size, options.memory_budget)


def _needed(*tensors: Tensor | None) -> tuple[bool, ...]:
    """Which tensors need a gradient."""
    return tuple(t is not None and t.requires_grad and torch.is_grad_enabled() for t in tensors)


def _transformed() -> bool:
    """Whether a transform of ``torch.func`` or forward-mode differentiation needs operations that it knows."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _float(value: float | None) -> float | None:
    return None if value is None else float(value)
