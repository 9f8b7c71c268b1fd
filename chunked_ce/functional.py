"""The public functions: a docstring, a check, a call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from chunked_ce.arguments import FLOATING, INDICES, check_tensor, is_dense, is_integer
from chunked_ce.checks import check_ids, check_objective
from chunked_ce.depths import check_one_depth
from chunked_ce.engine import dispatch
from chunked_ce.engine.loss_stats import LossStats
from chunked_ce.invocation import Arguments, agreed_on, call_of, loss_of
from chunked_ce.known_tokens import remember
from chunked_ce.objectives import CrossEntropy, Divergence, Objective, Teacher
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

__all__ = [
    "LossStats",
    "PerToken",
    "cross_entropy",
    "linear_cross_entropy",
    "linear_divergence",
    "linear_logprobs",
    "linear_loss",
    "linear_statistics",
    "logits_loss",
]

PerToken = Tensor | Sequence[Tensor]  # a list of several depths; numbers in it stand for tensors of equal ones


def linear_cross_entropy(
    input: PerToken,
    linear_weight: Tensor,
    target: PerToken,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    token_weight: PerToken | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | PerToken = 1.0,
    linear_adapter: tuple[PerToken, Tensor] | None = None,
    num_tokens: float | Tensor | None = None,
    vocab: VocabShard | None = None,
    options: ChunkOptions | None = None,
    return_stats: bool = False,
) -> Tensor | list[Tensor] | tuple[Tensor | list[Tensor], LossStats]:
    """Cross-entropy of ``logit_scale * (input @ linear_weight.T + linear_bias)``, whose logits never exist as a whole.

    With ``z`` the logits of a token (softcapped: ``softcap * tanh(z / softcap)``), ``w`` the class weights and ``lse``
    the log-sum-exp of ``z``, the loss of a token is ``token_weight`` times::

        (1 - label_smoothing) * w[y] * (lse - z[y]) + label_smoothing / V * sum_v w[v] * (lse - z[v]) + z_loss * lse**2

    the first line as in `torch.nn.functional.cross_entropy`, the z-loss as in PaLM (arXiv:2204.02311, section 5), the
    softcap as in Gemma 2 (arXiv:2408.00118, section 2). A token whose target is ``ignore_index`` contributes exactly 0
    to the value and to every gradient, whatever its hidden state holds, and on the CPU costs nothing.

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
    call = Arguments.of("linear_cross_entropy", tensors, keywords, vocab, options, {"return_stats": return_stats})
    return loss_of(lambda: CrossEntropy(label_smoothing, z_loss), call)


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
    return loss_of(lambda: CrossEntropy(label_smoothing, z_loss), call)


def linear_loss(
    objective: Objective,
    input: PerToken,
    linear_weight: Tensor,
    target: PerToken,
    *,
    linear_bias: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    token_weight: PerToken | None = None,
    num_tokens: float | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | PerToken = 1.0,
    teacher: Teacher | None = None,
    linear_adapter: tuple[PerToken, Tensor] | None = None,
    vocab: VocabShard | None = None,
    options: ChunkOptions | None = None,
    return_stats: bool = False,
    **per_token_tensors: PerToken | None,
) -> Tensor | list[Tensor] | tuple[Tensor | list[Tensor], LossStats]:
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


def logits_loss(
    objective: Objective,
    logits: Tensor,
    target: Tensor,
    *,
    reduction: str = "mean",
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
    return loss_of(lambda: check_objective(objective), call, per_token_tensors)


def linear_divergence(
    input: Tensor,
    linear_weight: Tensor,
    teacher: Teacher,
    *,
    target: Tensor | None = None,
    beta: float = 0.0,
    linear_bias: Tensor | None = None,
    reduction: str = "mean",
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
        return returned
    loss, stats = returned
    return loss, stats._replace(num_correct=torch.zeros_like(stats.num_correct))


def linear_logprobs(
    input: PerToken,
    linear_weight: Tensor,
    target: PerToken,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | PerToken = 1.0,
    linear_adapter: tuple[PerToken, Tensor] | None = None,
    vocab: VocabShard | None = None,
    options: ChunkOptions | None = None,
    return_entropy: bool = False,
) -> Tensor | list[Tensor] | tuple[Tensor | list[Tensor], Tensor | list[Tensor]]:
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


def _every_token(input: Tensor, vocab: VocabShard | None) -> Tensor:
    """Targets that are not ignored, for the tokens of all ranks if ``input`` is a sequence shard."""
    shape = input.shape[:-1]
    if isinstance(vocab, VocabShard) and vocab.input_grad == "sequence":
        shape = (vocab.size * shape.numel(),)
    target = torch.zeros(shape, dtype=torch.int64, device=input.device)
    remember(target, -100, None)
    return target


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
    tensors = {
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
    arguments = Arguments.of("linear_statistics", tensors, keywords, vocab, options, asked_flags(outputs)).local()
    tensors = dict(arguments.tensors)
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

    options, _ = agreed_on(check, arguments, {})
    with arguments.shared_errors():
        call = call_of(arguments, options, None, names_for(outputs, with_ids=with_ids))
    ids = tensors["target ids"] if with_ids else None
    return statistics_over(call, outputs, ids, tensors.get("support"), tensors["target"].shape)
