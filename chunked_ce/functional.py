"""The functions: check the arguments, flatten the tokens, run the chunks, reduce."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from chunked_ce.arguments import check_flag, plain_integer
from chunked_ce.checks import (
    check_accumulation,
    check_backend,
    check_keywords,
    check_num_tokens,
    check_options,
    check_tensors,
)
from chunked_ce.distributed.checksum import checksum
from chunked_ce.distributed.dtensors import local_arguments
from chunked_ce.distributed.vocab import WEIGHT_VALUES, WHOLE_WEIGHT, VocabShard
from chunked_ce.engine import logits_ops, ops, plain
from chunked_ce.engine.device_memory import free_bytes
from chunked_ce.engine.linear import Head, Settings
from chunked_ce.engine.rows import Wanted, work_dtype
from chunked_ce.engine.stats_ops import loss_stats, plain_loss_stats
from chunked_ce.engine.tracing import has_values, is_recorded
from chunked_ce.objective import Logits, Objective, RowStatistics
from chunked_ce.options import ChunkOptions
from chunked_ce.plan import budget_within

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
    vocab: VocabShard | None = None,
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
        vocab: this rank's rows of a head sharded over ranks (`VocabShard`), which ``linear_weight`` and ``linear_bias``
            then hold; ``weight`` may hold this rank's words or the whole vocabulary. A DTensor sharded on dim 0 by
            tensor parallelism needs none.
        options: how to compute (`ChunkOptions`); None chooses well.
        return_stats: return ``(loss, LossStats)``.

    Returns:
        The loss in float32 (float64 for float64 input): 0-d, or in the shape of ``target`` for ``"none"``, 0 where
        ignored. If no token counts it is 0, attached to the graph.

    Raises:
        ValueError, TypeError: an argument is not as described above.
        IndexError: a target is outside [0, V) and not ``ignore_index`` (on a GPU: a device-side assertion).

    >>> import torch
    >>> hidden, head = torch.eye(3, 4, requires_grad=True), torch.eye(5, 4)
    >>> linear_cross_entropy(hidden, head, torch.tensor([0, 4, -100])).item()
    1.4048...
    """
    linear_weight, vocab, given = local_arguments(
        "linear_weight",
        linear_weight,
        vocab,
        input=input,
        target=target,
        linear_bias=linear_bias,
        weight=weight,
        token_weight=token_weight,
        num_tokens=num_tokens,
    )
    input, target, linear_bias = given["input"], given["target"], given["linear_bias"]
    weight, token_weight, num_tokens = given["weight"], given["token_weight"], given["num_tokens"]
    maths = {
        "reduction": reduction,
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "num_tokens": num_tokens,
    }
    tensors = (input, linear_weight, target, linear_bias, weight, token_weight)
    options = _enter("linear_cross_entropy", tensors, maths, options, vocab, return_stats=return_stats)
    ignore_index = plain_integer(ignore_index)
    settings = _settings(input, options, linear_weight, vocab)
    weights = _Weights.of(target, ignore_index, weight, token_weight, vocab, work_dtype(settings.compute_dtype))
    head = _head(linear_weight, linear_bias, softcap, logit_scale, weights.classes, vocab)
    objective = Objective(float(label_smoothing), float(z_loss), _vocab_size(linear_weight.shape[0], vocab))
    wanted = Wanted(label_smoothing > 0, mean=return_stats, correct=return_stats)
    needed = _needed(input, linear_weight, linear_bias)
    hidden = input.reshape(-1, input.shape[-1])
    coefficient = weights.coefficient(reduction, num_tokens)

    if reduction != "none" and not options.in_backward and any(needed) and not _transformed(vocab):
        loss, rows = ops.linear_loss(
            hidden,
            head,
            weights.target,
            coefficient,
            objective,
            ignore_index,
            wanted,
            needed,
            settings,
            None if vocab is None else vocab.plain(),
        )
    else:
        rows = _linear_statistics(hidden, head, weights.target, ignore_index, wanted, settings, vocab)
        losses = weights.losses(objective, rows, coefficient)
        loss = losses.view(target.shape) if reduction == "none" else losses.sum()
        loss = loss.to(weights.dtype)
    return (loss, weights.stats(objective, rows, vocab)) if return_stats else loss


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
    vocab: VocabShard | None = None,
    options: ChunkOptions | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, LossStats]:
    """`linear_cross_entropy` of logits that exist, (..., V): a few rows at a time, without an fp32 copy of them.

    The arguments, the result and the errors are those of `linear_cross_entropy`. Of the options only ``backend`` has
    an effect: there are no products to cut into chunks, so that nothing is filtered by ``gradient_filter`` and there is
    no head for ``accumulate_into``.

    >>> import torch
    >>> cross_entropy(torch.zeros(2, 8), torch.tensor([3, -100]))
    tensor(2.0794)
    """
    logits, vocab, given = local_arguments(
        "logits", logits, vocab, target=target, weight=weight, token_weight=token_weight, num_tokens=num_tokens
    )
    target, weight, token_weight = given["target"], given["weight"], given["token_weight"]
    num_tokens = given["num_tokens"]
    maths = {
        "reduction": reduction,
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "num_tokens": num_tokens,
    }
    tensors = (logits, None, target, None, weight, token_weight)
    options = _enter("cross_entropy", tensors, maths, options, vocab, input_name="logits", return_stats=return_stats)
    ignore_index = plain_integer(ignore_index)
    weights = _Weights.of(target, ignore_index, weight, token_weight, vocab, work_dtype(logits.dtype))
    objective = Objective(float(label_smoothing), float(z_loss), _vocab_size(logits.shape[-1], vocab))
    wanted = Wanted(label_smoothing > 0, mean=return_stats, correct=return_stats)
    here = logits if vocab is None else logits[..., : vocab.rows]
    arguments = (
        here.reshape(target.numel(), here.shape[-1]),
        weights.target,
        weights.classes,
        Logits(float(logit_scale), _float(softcap)),
        ignore_index,
        wanted,
    )
    if _transformed(vocab):
        rows = plain.logits_statistics(*arguments)
    else:
        rows = logits_ops.logits_statistics(*arguments, options.backend, None if vocab is None else vocab.plain())
    losses = weights.losses(objective, rows, weights.coefficient(reduction, num_tokens))
    loss = (losses.view(target.shape) if reduction == "none" else losses.sum()).to(weights.dtype)
    return (loss, weights.stats(objective, rows, vocab)) if return_stats else loss


def linear_logprobs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab: VocabShard | None = None,
    options: ChunkOptions | None = None,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The log-probability of each token's target, differentiable per token, in the shape of ``target``.

    The arguments and errors are those of `linear_cross_entropy`. With ``return_entropy`` the result is
    ``(logprobs, entropy)``, the entropies in nats and differentiable too. Both are 0 where ignored, in float32
    (float64 for float64 input). Logits are formed again in the backward, one block of the vocabulary at a time.

    >>> import torch
    >>> linear_logprobs(torch.zeros(2, 4), torch.eye(8, 4), torch.tensor([3, -100]))
    tensor([-2.0794,  0.0000])
    """
    linear_weight, vocab, given = local_arguments(
        "linear_weight", linear_weight, vocab, input=input, target=target, linear_bias=linear_bias
    )
    input, target, linear_bias = given["input"], given["target"], given["linear_bias"]
    maths = {"reduction": "none", "ignore_index": ignore_index, "softcap": softcap, "logit_scale": logit_scale}
    tensors = (input, linear_weight, target, linear_bias, None, None)
    options = _enter("linear_logprobs", tensors, maths, options, vocab, return_entropy=return_entropy)
    ignore_index = plain_integer(ignore_index)
    head = _head(linear_weight, linear_bias, softcap, logit_scale, None, vocab)
    hidden = input.reshape(-1, input.shape[-1])
    wanted = Wanted(mean=return_entropy)
    rows = _linear_statistics(
        hidden,
        head,
        target.reshape(-1).long(),
        ignore_index,
        wanted,
        _settings(input, options, linear_weight, vocab),
        vocab,
    )
    logprobs = (rows.target - rows.log_sum).view(target.shape)
    return (logprobs, rows.entropy.view(target.shape)) if return_entropy else logprobs


def _enter(
    function: str,
    tensors: tuple[Tensor | None, ...],
    maths: dict[str, Any],
    options: ChunkOptions | None,
    vocab: VocabShard | None,
    input_name: str = "input",
    **returned: bool,
) -> ChunkOptions:
    """Check the arguments of a call, on every rank that takes part in it."""

    def check() -> ChunkOptions:
        check_tensors(*tensors, vocab, input_name=input_name)
        keywords = dict(maths)
        num_tokens = keywords.pop("num_tokens", None)
        check_keywords(**keywords)
        for name, value in returned.items():
            check_flag(name, value)
        compute_dtype = _compute_dtype(tensors[0], input_name)
        check_num_tokens(num_tokens, work_dtype(compute_dtype))
        checked = check_options(options, maths["reduction"])
        check_backend(checked, tensors[0].device, compute_dtype)
        check_accumulation(checked, tensors[1], vocab, transformed=_transformed(None))
        return checked

    if vocab is None:
        return check()
    try:
        options = check()
        error = None
    except (TypeError, ValueError) as found:
        if not isinstance(vocab, VocabShard):
            raise
        error = found
    if torch.compiler.is_compiling():
        if error is not None:
            raise error
        return options
    _transformed(vocab)
    on_cpu = not isinstance(tensors[0], Tensor) or tensors[0].device.type == "cpu"
    call = {}
    if error is None and vocab.compares(on_cpu=on_cpu):
        try:  # reads values of the device, and takes memory
            call = {"function": function} | _shared(tensors, maths, options, vocab) | returned
        except Exception as found:
            error = found
    vocab.agree(call, error, on_cpu=on_cpu)
    return options


def _shared(
    tensors: tuple[Tensor | None, ...],
    maths: dict[str, Any],
    options: ChunkOptions,
    vocab: VocabShard,
) -> dict[str, Any]:
    """What must be the same on every rank of a vocabulary group."""
    input, linear_weight, target, linear_bias, weight, token_weight = tensors
    facts = {"target": tuple(target.shape), "input dtype": input.dtype}
    if target.device.type != "meta":
        facts["target's values (a checksum)"] = checksum(target)
    if linear_weight is not None:
        facts |= {
            "input's last dimension": input.shape[-1],
            "linear_weight dtype": linear_weight.dtype,
            "linear_weight.requires_grad": linear_weight.requires_grad,
            "autocast": _compute_dtype(input),
        }
    facts |= {
        "input.requires_grad": input.requires_grad,
        "grad mode": torch.is_grad_enabled(),
        "weight": weight is not None,
        WHOLE_WEIGHT: weight is not None and weight.numel() == vocab.total,
        "token_weight": token_weight is not None,
        "linear_bias": linear_bias is not None,
        "options": options,
        "check": vocab.check,
        "input_grad": vocab.input_grad,
        "reduce_dtype": vocab.reduce_dtype,
    }
    number = maths.get("num_tokens")
    facts |= maths | {"num_tokens": float(number) if number is not None else None}
    return facts | _shared_values(input, linear_weight, weight, token_weight, vocab)


def _shared_values(
    input: Tensor, linear_weight: Tensor | None, weight: Tensor | None, token_weight: Tensor | None, vocab: VocabShard
) -> dict[str, int]:
    """Checksums of the values that every rank of a vocabulary group must have alike."""
    values = {}
    if linear_weight is not None and vocab.input_grad != "sequence":
        values["input's values (a checksum): dropout with a seed of each rank's own makes them differ"] = input
    if token_weight is not None:
        values["token_weight's values (a checksum)"] = token_weight.double()
    if weight is not None and weight.numel() == vocab.total:
        values[WEIGHT_VALUES] = weight.double()
    return {name: checksum(tensor) for name, tensor in values.items() if tensor.device.type != "meta"}


def _head(
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    classes: Tensor | None,
    vocab: VocabShard | None,
) -> Head:
    bias = None if linear_bias is None else _unpadded(linear_bias, vocab)
    return Head(_unpadded(linear_weight, vocab), bias, Logits(float(logit_scale), _float(softcap)), classes)


def _unpadded(values: Tensor, vocab: VocabShard | None) -> Tensor:
    """``values`` (rows, ...) without those of padding, which so never get probability."""
    return values if vocab is None or len(values) == vocab.rows else values[: vocab.rows]


def _vocab_size(rows: int, vocab: VocabShard | None) -> int:
    return rows if vocab is None else vocab.total


def _linear_statistics(
    hidden: Tensor,
    head: Head,
    target: Tensor,
    ignore_index: int,
    wanted: Wanted,
    settings: Settings,
    vocab: VocabShard | None,
) -> RowStatistics:
    if _transformed(vocab):
        return plain.linear_statistics(hidden, head, target, ignore_index, wanted, settings.compute_dtype)
    shard = None if vocab is None else vocab.plain()
    return ops.linear_statistics(hidden, head, target, ignore_index, wanted, settings, shard)


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
        vocab: VocabShard | None,
        dtype: torch.dtype,
    ) -> _Weights:
        classes = None if weight is None else weight.to(dtype)
        if classes is not None and vocab is not None:
            classes = vocab.whole_vocabulary(classes)
        return cls(
            target.reshape(-1).long(),
            ignore_index,
            classes,
            None if token_weight is None else token_weight.reshape(-1).to(dtype),
            dtype,
        )

    def losses(self, objective: Objective, rows: RowStatistics, coefficient: Tensor) -> Tensor:
        """The losses of all tokens times ``coefficient``, (N,) float64, which has the range for a weight's inverse."""
        rows = rows.map(Tensor.double)
        return objective.token_losses(rows, self.target, self.ignore_index, self.classes, coefficient)

    def shares(self) -> Tensor:
        """The weight of every token, (N,) float64, that of ignored ones too."""
        if self.tokens is None:
            return torch.ones_like(self.target, dtype=torch.float64)
        return self.tokens.double()

    def count(self) -> Tensor:
        """The sum of ``token_weight * weight[target]`` over the tokens that count, () float64."""
        counted = self.target != self.ignore_index
        share = self.shares().where(counted, 0)
        if self.classes is not None:
            # A target out of range is reported by the chunks; here it only must not be read.
            here = counted & (self.target >= 0) & (self.target < self.classes.shape[0])
            share = share * self.classes[self.target.where(here, 0)]
        return share.sum()

    def coefficient(self, reduction: str, num_tokens: float | Tensor | None) -> Tensor:
        """What the value that ``reduction`` asks for multiplies each token's loss by, (N,) float64."""
        if reduction != "mean":
            return self.shares()
        denominator = self.count() if num_tokens is None else _on_device(num_tokens, torch.float64, self.target.device)
        return torch.where(denominator == 0, 0.0, self.shares() / denominator)

    def stats(self, objective: Objective, rows: RowStatistics, vocab: VocabShard | None) -> LossStats:
        rows = rows.map(Tensor.detach)
        counted = self.target != self.ignore_index
        loss_sum = self.losses(objective, rows, self.shares()).sum()
        stats_of = plain_loss_stats if _transformed(vocab) else loss_stats
        return LossStats(*stats_of(loss_sum, self.count(), rows.lse, rows.correct, rows.entropy, counted))


def _settings(input: Tensor, options: ChunkOptions, linear_weight: Tensor, vocab: VocabShard | None) -> Settings:
    chunk_size = None if options.chunk_size == "auto" else options.chunk_size
    memory_budget = options.memory_budget
    # Ranks that share a plan have not the same free.
    if memory_budget is None and chunk_size is None and vocab is None and has_values(*linear_weight.shape):
        free = free_bytes(input.device)
        if free is not None:
            memory_budget = budget_within(free, *linear_weight.shape, sums_head=linear_weight.requires_grad)
    dtype = _compute_dtype(input)
    return Settings(
        dtype,
        options.accumulate_dtype,
        chunk_size,
        memory_budget,
        options.backend,
        options.filter_threshold(dtype),
        options.accumulate_into,
        _head_sum_dtype(dtype, options, input, linear_weight),
    )


def _head_sum_dtype(
    compute_dtype: torch.dtype, options: ChunkOptions, input: Tensor, linear_weight: Tensor
) -> torch.dtype | None:
    """What a recorded graph, which may be one for any number of tokens, sums the head's gradients in; else None: the
    plan knows the sizes."""
    recorded = is_recorded() or not has_values(*input.shape, *linear_weight.shape)
    return torch.promote_types(options.accumulate_dtype, compute_dtype) if recorded else None


def _compute_dtype(input: Tensor, input_name: str = "input") -> torch.dtype:
    """The dtype of the products, or of logits that exist."""
    device_type = input.device.type
    if input_name == "logits" or input.dtype == torch.float64 or not torch.amp.is_autocast_available(device_type):
        return input.dtype
    if not torch.is_autocast_enabled(device_type):
        return input.dtype
    return torch.get_autocast_dtype(device_type)


def _needed(*tensors: Tensor | None) -> tuple[bool, ...]:
    """Which tensors need a gradient."""
    return tuple(t is not None and t.requires_grad and torch.is_grad_enabled() for t in tensors)


def _transformed(vocab: VocabShard | None) -> bool:
    """Whether a transform of ``torch.func`` or forward-mode differentiation needs operations that it knows."""
    if torch.compiler.is_compiling():
        return False
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    if transformed and vocab is not None:
        raise NotImplementedError("vocab: no torch.func transforms and no forward mode with a sharded vocabulary")
    return transformed


def _on_device(number: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number as a tensor () without waiting for the device."""
    if isinstance(number, Tensor):
        return number.detach().to(device, dtype, non_blocking=True).reshape(())
    # A product, unlike `torch.full`, may take a number that a compiler keeps as an input of its graph.
    return torch.ones((), dtype=dtype, device=device) * float(number)


def _float(value: float | None) -> float | None:
    return None if value is None else float(value)
