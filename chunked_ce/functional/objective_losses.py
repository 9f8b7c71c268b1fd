"""Losses of any objective, and of a teacher's divergence."""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor
from typing_extensions import Unpack, overload

from chunked_ce.arguments import is_dense, is_integer
from chunked_ce.checks import check_objective
from chunked_ce.engine.loss_stats import LossStats
from chunked_ce.invocation import Arguments, loss_of
from chunked_ce.keywords import DivergenceKeywords, PerToken, PerTokenNumbers, Reduction, Tokens
from chunked_ce.known_tokens import remember
from chunked_ce.objectives import Divergence, Objective, Teacher
from chunked_ce.options import ChunkOptions
from chunked_ce.parallel.vocab import VocabShard

__all__ = ["linear_divergence", "linear_loss", "logits_loss"]


@overload
def linear_loss(
    objective: Objective,
    input: PerToken,
    linear_weight: Tensor,
    target: PerToken,
    *,
    linear_bias: Tensor | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    ignore_index: int = -100,
    token_weight: PerTokenNumbers | None = None,
    num_tokens: float | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | PerTokenNumbers = 1.0,
    teacher: Teacher | None = None,
    linear_adapter: tuple[PerToken, Tensor] | None = None,
    vocab: VocabShard | None = None,
    options: ChunkOptions | None = None,
    return_stats: Literal[False] = False,
    **per_token_tensors: PerToken | None,
) -> Tensor: ...


@overload
def linear_loss(
    objective: Objective,
    input: PerToken,
    linear_weight: Tensor,
    target: PerToken,
    *,
    linear_bias: Tensor | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    ignore_index: int = -100,
    token_weight: PerTokenNumbers | None = None,
    num_tokens: float | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | PerTokenNumbers = 1.0,
    teacher: Teacher | None = None,
    linear_adapter: tuple[PerToken, Tensor] | None = None,
    vocab: VocabShard | None = None,
    options: ChunkOptions | None = None,
    return_stats: Literal[True],
    **per_token_tensors: PerToken | None,
) -> tuple[Tensor, LossStats]: ...


@overload
def linear_loss(
    objective: Objective,
    input: Tokens,
    linear_weight: Tensor,
    target: PerToken,
    *,
    linear_bias: Tensor | None = None,
    reduction: Literal["none"],
    ignore_index: int = -100,
    token_weight: PerTokenNumbers | None = None,
    num_tokens: float | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | PerTokenNumbers = 1.0,
    teacher: Teacher | None = None,
    linear_adapter: tuple[PerToken, Tensor] | None = None,
    vocab: VocabShard | None = None,
    options: ChunkOptions | None = None,
    return_stats: Literal[False] = False,
    **per_token_tensors: PerToken | None,
) -> Tokens: ...


@overload
def linear_loss(
    objective: Objective,
    input: Tokens,
    linear_weight: Tensor,
    target: PerToken,
    *,
    linear_bias: Tensor | None = None,
    reduction: Literal["none"],
    ignore_index: int = -100,
    token_weight: PerTokenNumbers | None = None,
    num_tokens: float | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | PerTokenNumbers = 1.0,
    teacher: Teacher | None = None,
    linear_adapter: tuple[PerToken, Tensor] | None = None,
    vocab: VocabShard | None = None,
    options: ChunkOptions | None = None,
    return_stats: Literal[True],
    **per_token_tensors: PerToken | None,
) -> tuple[Tokens, LossStats]: ...


def linear_loss(
    objective: Objective,
    input: PerToken,
    linear_weight: Tensor,
    target: PerToken,
    *,
    linear_bias: Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    token_weight: PerTokenNumbers | None = None,
    num_tokens: float | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | PerTokenNumbers = 1.0,
    teacher: Teacher | None = None,
    linear_adapter: tuple[PerToken, Tensor] | None = None,
    vocab: VocabShard | None = None,
    options: ChunkOptions | None = None,
    return_stats: bool = False,
    **per_token_tensors: PerToken | None,
) -> PerToken | tuple[PerToken, LossStats]:
    """Any `chunked_ce.objectives.Objective` of the logits of `linear_cross_entropy`, which never exist as a whole.

    The loss of a token is ``token_weight`` times the objective's. Whatever the objective, a sum or a mean is computed
    with its gradients in the forward, in 6 N V D operations.

    Args:
        objective: an objective of `chunked_ce.objectives`, or one of your own. Class weights are a field of it.
        teacher: the `chunked_ce.Teacher` that a `chunked_ce.objectives.Divergence` needs. The temperature divides its
            logits as well.
        per_token_tensors: the tensors that the objective takes for each token, by name, in the shape of ``target``,
            constant. Those that it calls optional may be None.

    All other arguments, the result and the errors are those of `linear_cross_entropy`.

    >>> import torch
    >>> from chunked_ce.objectives import CrossEntropy
    >>> linear_loss(CrossEntropy(z_loss=0.2), torch.zeros(2, 4), torch.eye(8, 4), torch.tensor([3, -100]))
    tensor(2.9443)
    """
    tensors = {
        "input": input,
        "linear_weight": linear_weight,
        "target": target,
        "linear_bias": linear_bias,
        "weight": getattr(objective, "class_weight", None),
        "token_weight": token_weight,
        "linear_adapter": linear_adapter,
    }
    keywords = {
        "reduction": reduction,
        "ignore_index": ignore_index,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "temperature": temperature,
        "num_tokens": num_tokens,
    }
    call = Arguments.of("linear_loss", tensors, keywords, vocab, options, {"return_stats": return_stats}, teacher)
    return loss_of(lambda: check_objective(objective), call, per_token_tensors)


@overload
def logits_loss(
    objective: Objective,
    logits: Tensor,
    target: Tensor,
    *,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    num_tokens: float | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    teacher: Teacher | None = None,
    vocab: VocabShard | None = None,
    options: ChunkOptions | None = None,
    return_stats: Literal[False] = False,
    **per_token_tensors: Tensor | None,
) -> Tensor: ...


@overload
def logits_loss(
    objective: Objective,
    logits: Tensor,
    target: Tensor,
    *,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    num_tokens: float | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    teacher: Teacher | None = None,
    vocab: VocabShard | None = None,
    options: ChunkOptions | None = None,
    return_stats: Literal[True],
    **per_token_tensors: Tensor | None,
) -> tuple[Tensor, LossStats]: ...


def logits_loss(
    objective: Objective,
    logits: Tensor,
    target: Tensor,
    *,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    num_tokens: float | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    teacher: Teacher | None = None,
    vocab: VocabShard | None = None,
    options: ChunkOptions | None = None,
    return_stats: bool = False,
    **per_token_tensors: Tensor | None,
) -> Tensor | tuple[Tensor, LossStats]:
    """`linear_loss` of logits that exist, (..., V), as `cross_entropy` is of `linear_cross_entropy`.

    >>> import torch
    >>> from chunked_ce.objectives import CrossEntropy
    >>> logits_loss(CrossEntropy(), torch.zeros(2, 8), torch.tensor([3, -100]))
    tensor(2.0794)
    """
    weight = getattr(objective, "class_weight", None)
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
    }
    call = Arguments.of("logits_loss", tensors, keywords, vocab, options, {"return_stats": return_stats}, teacher)
    loss = loss_of(lambda: check_objective(objective), call, per_token_tensors)
    return cast("Tensor | tuple[Tensor, LossStats]", loss)  # logits have no depths


@overload
def linear_divergence(
    input: Tensor,
    linear_weight: Tensor,
    teacher: Teacher,
    *,
    return_stats: Literal[False] = False,
    **keywords: Unpack[DivergenceKeywords],
) -> Tensor: ...


@overload
def linear_divergence(
    input: Tensor,
    linear_weight: Tensor,
    teacher: Teacher,
    *,
    return_stats: Literal[True],
    **keywords: Unpack[DivergenceKeywords],
) -> tuple[Tensor, LossStats]: ...


def linear_divergence(
    input: Tensor,
    linear_weight: Tensor,
    teacher: Teacher,
    *,
    target: Tensor | None = None,
    beta: float = 0.0,
    linear_bias: Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    num_tokens: float | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    linear_adapter: tuple[Tensor, Tensor] | None = None,
    vocab: VocabShard | None = None,
    options: ChunkOptions | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, LossStats]:
    """The divergence between a teacher's and a student's distributions, neither of whose logits exist as a whole.

    It is `linear_loss` of `chunked_ce.objectives.Divergence`, which has the formula: KL(teacher || student) for
    ``beta=0``, KL(student || teacher) for ``beta=1``, a Jensen-Shannon divergence between them.

    Args:
        input: the student's hidden states (..., D).
        linear_weight: the student's head (V, D).
        teacher: a `chunked_ce.Teacher` with the same tokens and the same vocabulary.
        target: (...), only says which tokens count: those that are not ``ignore_index``. None: all of them, and
            ``num_correct`` of the `LossStats` is 0.
        beta: in [0, 1].

    All other arguments, the result and the errors are those of `linear_cross_entropy`.

    >>> import torch
    >>> hidden = torch.eye(2, 4)
    >>> linear_divergence(hidden, torch.zeros(8, 4), Teacher(hidden, torch.eye(8, 4)))
    tensor(0.0851)
    """
    without_targets = target is None and is_dense(input)
    if without_targets:
        # An ignore_index that is not allowed stays, to be refused with all other arguments.
        ignore_index = -100 if is_integer(ignore_index) else ignore_index
        target = _every_token(input, vocab)
    tensors = {
        "input": input,
        "linear_weight": linear_weight,
        "target": target,
        "linear_bias": linear_bias,
        "weight": None,
        "token_weight": token_weight,
        "linear_adapter": linear_adapter,
    }
    keywords = {
        "reduction": reduction,
        "ignore_index": ignore_index,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "temperature": temperature,
        "num_tokens": num_tokens,
    }
    call = Arguments.of("linear_divergence", tensors, keywords, vocab, options, {"return_stats": return_stats}, teacher)
    returned = loss_of(lambda: Divergence(beta), call)  # a beta that is refused on one rank is refused on all
    if not (without_targets and return_stats):
        return cast("Tensor | tuple[Tensor, LossStats]", returned)  # a teacher goes with one depth
    loss, stats = cast("tuple[Tensor, LossStats]", returned)
    return loss, stats._replace(num_correct=torch.zeros_like(stats.num_correct))


def _every_token(input: Tensor, vocab: VocabShard | None) -> Tensor:
    """Targets that are not ignored, for the tokens of all ranks if ``input`` is a sequence shard."""
    shape: tuple[int, ...] = input.shape[:-1]
    if isinstance(vocab, VocabShard) and vocab.input_grad == "sequence":
        shape = (vocab.size * input.shape[:-1].numel(),)
    target = torch.zeros(shape, dtype=torch.int64, device=input.device)
    remember(target, -100, None)
    return target
