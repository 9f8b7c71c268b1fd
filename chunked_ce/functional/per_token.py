"""Log-probabilities and other statistics of each token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor
from typing_extensions import Unpack, overload

from chunked_ce.arguments import FLOATING, INDICES, check_tensor
from chunked_ce.checks import check_ids
from chunked_ce.depths import check_one_depth
from chunked_ce.engine import dispatch
from chunked_ce.invocation import Arguments, agreed_on, call_of
from chunked_ce.keywords import LogprobKeywords, PerToken, PerTokenNumbers, Tokens
from chunked_ce.options import ChunkOptions
from chunked_ce.parallel.vocab import VocabShard
from chunked_ce.rows.statistics import names_of
from chunked_ce.token_statistics import (
    TokenStatistics,
    asked_flags,
    check_outputs,
    has_ids,
    names_for,
    one_of_the_ids,
    statistics_over,
)

__all__ = ["linear_logprobs", "linear_statistics"]


@overload
def linear_logprobs(
    input: Tokens,
    linear_weight: Tensor,
    target: PerToken,
    *,
    return_entropy: Literal[False] = False,
    **keywords: Unpack[LogprobKeywords],
) -> Tokens: ...


@overload
def linear_logprobs(
    input: Tokens,
    linear_weight: Tensor,
    target: PerToken,
    *,
    return_entropy: Literal[True],
    **keywords: Unpack[LogprobKeywords],
) -> tuple[Tokens, Tokens]: ...


def linear_logprobs(
    input: PerToken,
    linear_weight: Tensor,
    target: PerToken,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | PerTokenNumbers = 1.0,
    linear_adapter: tuple[PerToken, Tensor] | None = None,
    vocab: VocabShard | None = None,
    options: ChunkOptions | None = None,
    return_entropy: bool = False,
) -> PerToken | tuple[PerToken, PerToken]:
    """The log-probability of each token's target, differentiable per token, in the shape of ``target``.

    The arguments and errors are those of `linear_cross_entropy`. With ``return_entropy`` the result is
    ``(logprobs, entropy)``, the entropies in nats and differentiable too. Both are 0 where ignored, in float32
    (float64 for float64 input). Logits are formed again in the backward, one block of the vocabulary at a time.

    >>> import torch
    >>> linear_logprobs(torch.zeros(2, 4), torch.eye(8, 4), torch.tensor([3, -100]))
    tensor([-2.0794,  0.0000])
    """
    tensors = {
        "input": input,
        "linear_weight": linear_weight,
        "target": target,
        "linear_bias": linear_bias,
        "weight": None,
        "token_weight": None,
        "linear_adapter": linear_adapter,
    }
    keywords = {
        "reduction": "none",
        "ignore_index": ignore_index,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "temperature": temperature,
    }
    flags = {"return_entropy": return_entropy}
    arguments = Arguments.of("linear_logprobs", tensors, keywords, vocab, options, flags).local()
    options, _ = agreed_on(lambda: None, arguments, {})
    arguments = arguments.joined()
    with arguments.shared_errors():
        call = call_of(arguments, options, None, names_of(("mean",) if return_entropy else ()))
    rows = dispatch.statistics(call)
    logprobs = arguments.shaped(rows.logprob)
    return (logprobs, arguments.shaped(rows.entropy)) if return_entropy else logprobs


def linear_statistics(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    outputs: Sequence[str] = ("logprob",),
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    linear_adapter: tuple[Tensor, Tensor] | None = None,
    support: Tensor | None = None,
    vocab: VocabShard | None = None,
    options: ChunkOptions | None = None,
) -> TokenStatistics:
    """Statistics of each token's predicted distribution, differentiable per token, without the full logits.

    With z the logits of a token, which ``temperature`` has divided, and p their softmax, ``outputs`` may name:

    - ``"logprob"``: z_y - lse for the target y
    - ``"entropy"``: -sum_v p_v log p_v
    - ``"lse"``: log sum_v exp(z_v)
    - ``"log_sum_sq_probs"``: log sum_v p_v^2
    - ``"mean_logit"``: (1 / V) sum_v z_v
    - ``"is_top1"``: 1.0 where the target has the largest logit, the first of equals; it has no gradient
    - ``"predicted"``: the id of the largest logit, the first of equals, in int64, -1 where ignored; it has no gradient

    Only what they need is computed. As in `linear_logprobs`, their short form, logits are formed again in the backward,
    one block of the vocabulary at a time.

    Args:
        target: class indices (...), or K of them per token (..., K): ``logprob`` is then (..., K), an id equal to
            ``ignore_index`` gives 0 there, a token counts if any of its ids does, and there is no ``is_top1``.
        outputs: a tuple of names.
        support: ids (..., S) padded with ``ignore_index``: probabilities are renormalised over a token's support, as
            when sampling from the most likely entries (top-p, top-k) is replayed. Targets outside of it count as
            members, duplicates once. It costs N S D operations, not N V D, and allows ``"logprob"``, ``"entropy"`` and
            ``"lse"``.

    All other arguments are those of `linear_cross_entropy`.

    Returns:
        `TokenStatistics`, None for what was not asked; float32 (float64 for float64 input), 0 where ignored.

    Raises:
        ValueError, TypeError: an argument is not as described above.
        IndexError: an id of ``target`` or ``support`` is outside [0, V) and not ``ignore_index`` (on a GPU: a
            device-side assertion).

    >>> import torch
    >>> hidden, head = torch.zeros(2, 4), torch.eye(8, 4)
    >>> linear_statistics(hidden, head, torch.tensor([3, -100]), outputs=("logprob", "log_sum_sq_probs"))
    TokenStatistics(logprob=tensor([-2.0794,  0.0000]), entropy=None, lse=None, log_sum_sq_probs=tensor([-2.0794, ...
    >>> linear_statistics(hidden, head, torch.tensor([[3, 5], [1, -100]])).logprob
    tensor([[-2.0794, -2.0794],
            [-2.0794,  0.0000]])
    >>> linear_statistics(hidden, head, torch.tensor([3, 5]), support=torch.tensor([[3, 4], [1, 2]])).logprob
    tensor([-0.6931, -1.0986])
    """
    given = {
        "input": input,
        "linear_weight": linear_weight,
        "target": target,
        "linear_bias": linear_bias,
        "weight": None,
        "token_weight": None,
        "linear_adapter": linear_adapter,
        **({} if support is None else {"support": support}),
    }
    keywords = {
        "reduction": "none",
        "ignore_index": ignore_index,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "temperature": temperature,
    }
    arguments = Arguments.of("linear_statistics", given, keywords, vocab, options, asked_flags(outputs)).local()
    tensors: dict[str, Any] = dict(arguments.tensors)
    with_ids = has_ids(tensors["input"], tensors["target"])
    if with_ids:
        tensors["target ids"] = tensors["target"]
        tensors["target"] = one_of_the_ids(tensors["target"], ignore_index)
        arguments = arguments._replace(tensors=tensors)

    def check() -> None:
        check_one_depth(tensors, "linear_statistics")
        check_tensor("input", tensors["input"], FLOATING)
        check_tensor("target", tensors["target"], INDICES)
        check_outputs(outputs, with_ids=with_ids, with_support=support is not None)
        is_sequence = isinstance(vocab, VocabShard) and vocab.input_grad == "sequence"
        shape = None if is_sequence else tensors["input"].shape[:-1]
        if with_ids:
            check_ids("target", tensors["target ids"], shape)
        if support is not None:
            check_ids("support", tensors["support"], tensors["target"].shape, least=0)

    agreed_options, _ = agreed_on(check, arguments, {})
    with arguments.shared_errors():
        call = call_of(arguments, agreed_options, None, names_for(outputs, with_ids=with_ids))
    ids = tensors["target ids"] if with_ids else None
    return statistics_over(call, outputs, ids, tensors.get("support"), tensors["target"].shape)
