"""Cross-entropy, from hidden states and a head or from logits."""

from __future__ import annotations

from typing import Literal, cast

from torch import Tensor
from typing_extensions import Unpack, overload

from chunked_ce.engine.loss_stats import LossStats
from chunked_ce.invocation import Arguments, loss_of
from chunked_ce.keywords import (
    CrossEntropyKeywords,
    LinearCrossEntropyKeywords,
    PerToken,
    PerTokenNumbers,
    Reduction,
    Tokens,
)
from chunked_ce.objectives import CrossEntropy
from chunked_ce.options import ChunkOptions
from chunked_ce.parallel.vocab import VocabShard
from chunked_ce.torch_options import TorchOptions, chunk_options

__all__ = ["cross_entropy", "linear_cross_entropy"]


@overload
def linear_cross_entropy(
    input: PerToken,
    linear_weight: Tensor,
    target: PerToken,
    *,
    reduction: Literal["mean", "sum"] = "mean",
    return_stats: Literal[False] = False,
    **keywords: Unpack[LinearCrossEntropyKeywords],
) -> Tensor: ...


@overload
def linear_cross_entropy(
    input: PerToken,
    linear_weight: Tensor,
    target: PerToken,
    *,
    reduction: Literal["mean", "sum"] = "mean",
    return_stats: Literal[True],
    **keywords: Unpack[LinearCrossEntropyKeywords],
) -> tuple[Tensor, LossStats]: ...


@overload
def linear_cross_entropy(
    input: Tokens,
    linear_weight: Tensor,
    target: PerToken,
    *,
    reduction: Literal["none"],
    return_stats: Literal[False] = False,
    **keywords: Unpack[LinearCrossEntropyKeywords],
) -> Tokens: ...


@overload
def linear_cross_entropy(
    input: Tokens,
    linear_weight: Tensor,
    target: PerToken,
    *,
    reduction: Literal["none"],
    return_stats: Literal[True],
    **keywords: Unpack[LinearCrossEntropyKeywords],
) -> tuple[Tokens, LossStats]: ...


def linear_cross_entropy(
    input: PerToken,
    linear_weight: Tensor,
    target: PerToken,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    token_weight: PerTokenNumbers | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | PerTokenNumbers = 1.0,
    linear_adapter: tuple[PerToken, Tensor] | None = None,
    num_tokens: float | Tensor | None = None,
    vocab: VocabShard | None = None,
    options: ChunkOptions | TorchOptions | None = None,
    return_stats: bool = False,
) -> PerToken | tuple[PerToken, LossStats]:
    """Cross-entropy of ``logit_scale * (input @ linear_weight.T + linear_bias)``, whose logits never exist as a whole.

    With ``z`` the logits of a token (softcapped: ``softcap * tanh(z / softcap)``), ``w`` the class weights and ``lse``
    the log-sum-exp of ``z``, the loss of a token is ``token_weight`` times::

        (1 - label_smoothing) * w[y] * (lse - z[y]) + label_smoothing / V * sum_v w[v] * (lse - z[v])
        + z_loss * lse**2

    The first line is that of `torch.nn.functional.cross_entropy`; the z-loss is as in PaLM (arXiv:2204.02311, section
    5), the softcap as in Gemma 2 (arXiv:2408.00118, section 2). A token whose target is ``ignore_index`` contributes
    exactly 0 to the value and to every gradient, whatever its hidden state holds, and on the CPU costs nothing.

    For several depths of multi-token prediction on one head, ``input``, ``target``, ``linear_adapter[0]`` and whatever
    else is per token are lists, one entry for each depth; those of ``token_weight`` and ``temperature`` may be numbers.
    The loss is that of the tokens of all depths, whose hidden states are not copied into one tensor; ``"none"`` returns
    a list.

    Args:
        input: hidden states (..., D), floating point; one unbatched token (D,) too.
        linear_weight: the head (V, D). Its dtype may differ from the input's; products run in the autocast dtype if
            autocast is on, else in the input's dtype.
        target: class indices (...), int32 or int64; on a CPU, the host need not wait for an accelerator to learn which
            tokens count (see ``options.ignored``).
        linear_bias: (V,).
        weight: class weights (V,), constant.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``. The mean divides by the sum of ``token_weight * w[y]`` over the
            tokens that count, or by ``num_tokens``.
        ignore_index: the target of tokens that do not count; None, the default of torch's function, is -100.
        label_smoothing: in [0, 1].
        token_weight: a weight for each token, in the shape of ``target``, constant.
        z_loss: factor of ``lse**2``, >= 0.
        softcap: > 0, or None for none.
        logit_scale: a factor of the logits.
        temperature: > 0, a number or a tensor in the shape of ``target``, constant: the logits, after scale and
            softcap, are divided by it.
        linear_adapter: ``(input_r, weight_r)``, of shapes (..., r) and (V, r): ``input_r @ weight_r.T`` is added to
            the logits before bias and scale, as by LoRA on the head (arXiv:2106.09685, section 4.1). Both get
            gradients; ``gradient_filter`` has no effect beside it.
        num_tokens: the mean's denominator, a number or a tensor of one element, >= 0, such as the tokens of all ranks;
            0 makes the loss 0.
        vocab: this rank's rows of a head sharded over ranks (`VocabShard`), which ``linear_weight`` and ``linear_bias``
            then hold; ``weight`` may hold the class weights of these rows or of the whole vocabulary. A DTensor sharded
            on dim 0 by tensor parallelism needs none.
        options: how to compute (`ChunkOptions`); None chooses well. Torch's ``LinearCrossEntropyOptions`` are taken as
            the `ChunkOptions` that mean the same, or refused by name.
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
    tensors = {
        "input": input,
        "linear_weight": linear_weight,
        "target": target,
        "linear_bias": linear_bias,
        "weight": weight,
        "token_weight": token_weight,
        "linear_adapter": linear_adapter,
    }
    keywords = {
        "reduction": reduction,
        "ignore_index": -100 if ignore_index is None else ignore_index,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "temperature": temperature,
        "num_tokens": num_tokens,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
    }
    call = Arguments.of(
        "linear_cross_entropy", tensors, keywords, vocab, chunk_options(options), {"return_stats": return_stats}
    )
    return loss_of(lambda: CrossEntropy(label_smoothing, z_loss), call)


@overload
def cross_entropy(
    logits: Tensor, target: Tensor, *, return_stats: Literal[False] = False, **keywords: Unpack[CrossEntropyKeywords]
) -> Tensor: ...


@overload
def cross_entropy(
    logits: Tensor, target: Tensor, *, return_stats: Literal[True], **keywords: Unpack[CrossEntropyKeywords]
) -> tuple[Tensor, LossStats]: ...


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    token_weight: Tensor | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    num_tokens: float | Tensor | None = None,
    vocab: VocabShard | None = None,
    options: ChunkOptions | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, LossStats]:
    """`linear_cross_entropy` of logits that exist, (..., V): a few rows at a time, without an fp32 copy of them.

    The arguments, the result and the errors are those of `linear_cross_entropy`. Of the options only ``backend`` has
    an effect: there are no products to cut into chunks, so that nothing is filtered by ``gradient_filter``, there is no
    head for ``accumulate_into``, and logits rounded before are not made exact by ``logits_dtype``.

    >>> import torch
    >>> cross_entropy(torch.zeros(2, 8), torch.tensor([3, -100]))
    tensor(2.0794)
    """
    tensors = {
        "logits": logits,
        "target": target,
        "weight": weight,
        "token_weight": token_weight,
    }
    keywords = {
        "reduction": reduction,
        "ignore_index": ignore_index,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "temperature": temperature,
        "num_tokens": num_tokens,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
    }
    call = Arguments.of("cross_entropy", tensors, keywords, vocab, options, {"return_stats": return_stats})
    loss = loss_of(lambda: CrossEntropy(label_smoothing, z_loss), call)
    return cast("Tensor | tuple[Tensor, LossStats]", loss)  # logits have no depths
