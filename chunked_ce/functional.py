"""The public functions: a docstring, a check, a call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chunked_ce.arguments import ADAPTER, plain_integer
from chunked_ce.checks import check_call, check_ids, check_objective, compute_dtype_of, described_objective
from chunked_ce.depths import (
    are_depths,
    check_one_depth,
    check_widths,
    check_with_depths,
    depths_of,
    for_each_depth,
    in_shapes,
    joined_depths,
)
from chunked_ce.engine import dispatch
from chunked_ce.engine.call import Call
from chunked_ce.engine.loss_stats import LossStats
from chunked_ce.engine.specification import TEMPERATURE, Specification
from chunked_ce.invariance import check_invariance
from chunked_ce.objectives import CrossEntropy, Divergence, Objective, Teacher
from chunked_ce.options import ChunkOptions
from chunked_ce.parallel.agreement import agreed, facts_of_call
from chunked_ce.parallel.dtensors import has_dtensor, local_arguments
from chunked_ce.parallel.vocab import VocabShard
from chunked_ce.plan import Settings
from chunked_ce.rows.statistics import Logits, names_of, work_dtype
from chunked_ce.teachers import check_teacher, facts_of_teacher, of_this_rank, product_dtype
from chunked_ce.token_statistics import (
    TokenStatistics,
    asked_flags,
    check_outputs,
    has_ids,
    names_for,
    one_of_the_ids,
    support_statistics,
    token_statistics,
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
    ignore_index: int = -100,
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
        **_given(temperature, linear_adapter),
    }
    keywords = {
        "reduction": reduction,
        "ignore_index": ignore_index,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "temperature": 1.0 if _is_per_token(temperature) else temperature,
        "num_tokens": num_tokens,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
    }
    call = _Arguments("linear_cross_entropy", tensors, keywords, vocab, options, {"return_stats": return_stats})
    return _loss(lambda: CrossEntropy(label_smoothing, z_loss), call)


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
        **_given(temperature),
    }
    keywords = {
        "reduction": reduction,
        "ignore_index": ignore_index,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "temperature": 1.0 if _is_per_token(temperature) else temperature,
        "num_tokens": num_tokens,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
    }
    call = _Arguments("cross_entropy", tensors, keywords, vocab, options, {"return_stats": return_stats})
    return _loss(lambda: CrossEntropy(label_smoothing, z_loss), call)


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
        **_given(temperature, linear_adapter),
    }
    keywords = {
        "reduction": reduction,
        "ignore_index": ignore_index,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "temperature": 1.0 if _is_per_token(temperature) else temperature,
        "num_tokens": num_tokens,
    }
    call = _Arguments("linear_loss", tensors, keywords, vocab, options, {"return_stats": return_stats}, teacher)
    return _loss(lambda: check_objective(objective), call, per_token_tensors)


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
        **_given(temperature),
    }
    keywords = {
        "reduction": reduction,
        "ignore_index": ignore_index,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "temperature": 1.0 if _is_per_token(temperature) else temperature,
        "num_tokens": num_tokens,
    }
    call = _Arguments("logits_loss", tensors, keywords, vocab, options, {"return_stats": return_stats}, teacher)
    return _loss(lambda: check_objective(objective), call, per_token_tensors)


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
    without_targets = target is None and isinstance(input, Tensor)
    if without_targets:
        ignore_index, target = -100, _every_token(input, vocab)
    returned = linear_loss(
        Divergence(beta),
        input,
        linear_weight,
        target,
        linear_bias=linear_bias,
        reduction=reduction,
        ignore_index=ignore_index,
        token_weight=token_weight,
        num_tokens=num_tokens,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        linear_adapter=linear_adapter,
        teacher=teacher,
        vocab=vocab,
        options=options,
        return_stats=return_stats,
    )
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
        **_given(temperature, linear_adapter),
    }
    keywords = {
        "reduction": "none",
        "ignore_index": ignore_index,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "temperature": 1.0 if _is_per_token(temperature) else temperature,
    }
    flags = {"return_entropy": return_entropy}
    arguments = _Arguments("linear_logprobs", tensors, keywords, vocab, options, flags).local()
    options, _ = _agreed(lambda: None, arguments, {})
    arguments = arguments.joined()
    call = _call(arguments, options, None, names_of(("mean",) if return_entropy else ()))
    rows = dispatch.statistics(call)
    logprobs = arguments.shaped(rows.logprob)
    return (logprobs, arguments.shaped(rows.entropy)) if return_entropy else logprobs


def _every_token(input: Tensor, vocab: VocabShard | None) -> Tensor:
    """Targets that are not ignored, for the tokens of all ranks if ``input`` is a sequence shard."""
    shape = input.shape[:-1]
    if isinstance(vocab, VocabShard) and vocab.input_grad == "sequence":
        shape = (vocab.size * shape.numel(),)
    return torch.zeros(shape, dtype=torch.int64, device=input.device)


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
        **_given(temperature, linear_adapter),
        **({} if support is None else {"support": support}),
    }
    keywords = {
        "reduction": "none",
        "ignore_index": ignore_index,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "temperature": 1.0 if _is_per_token(temperature) else temperature,
    }
    arguments = _Arguments("linear_statistics", tensors, keywords, vocab, options, asked_flags(outputs)).local()
    tensors = dict(arguments.tensors)
    with_ids = has_ids(tensors["input"], tensors["target"])
    if with_ids:
        tensors["target ids"] = tensors["target"]
        tensors["target"] = one_of_the_ids(tensors["target"], ignore_index)
        arguments = arguments._replace(tensors=tensors)

    def check() -> None:
        check_one_depth(tensors, "linear_statistics")
        check_outputs(outputs, with_ids=with_ids, with_support=support is not None)
        is_sequence = isinstance(vocab, VocabShard) and vocab.input_grad == "sequence"
        shape = None if is_sequence else tensors["input"].shape[:-1]
        if with_ids:
            check_ids("target", tensors["target ids"], shape)
        if support is not None:
            check_ids("support", tensors["support"], tensors["target"].shape, least=0)

    options, _ = _agreed(check, arguments, {})
    call = _call(arguments, options, None, names_for(outputs, with_ids=with_ids))
    ids = None
    if with_ids:
        ids = tensors["target ids"].reshape(-1, tensors["target ids"].shape[-1]).long()  # (N, K)
        counted = (ids != call.ignore_index).any(-1)
        # An id out of range is reported by its place among the ids, not as a target.
        inside = call.target.clamp(0, call.vocab_size - 1).where(counted, call.ignore_index)
        call = call._replace(target=inside)
    shape = tensors["target"].shape
    if support is None:
        return _over_the_vocabulary(call, outputs, ids, shape)
    return _over_a_support(call, outputs, ids, tensors["support"], shape)


def _over_the_vocabulary(call: Call, outputs: Sequence[str], ids: Tensor | None, shape: torch.Size) -> TokenStatistics:
    """Statistics of the distributions over all vocabulary entries, in the ``shape`` of the tokens."""
    valid = None
    if ids is not None:
        call = call.with_per_token(call.per_token | {"target": ids}, ids="target")
        valid = ids != call.ignore_index
    return token_statistics(outputs, dispatch.statistics(call), call.vocab_size, shape, valid)


def _over_a_support(
    call: Call, outputs: Sequence[str], ids: Tensor | None, support: Tensor, shape: torch.Size
) -> TokenStatistics:
    """Statistics of the distributions over each token's support and its targets."""
    targets = call.target.unsqueeze(-1) if ids is None else ids  # (N, K)
    support = support.reshape(targets.shape[0], support.shape[-1]).long()  # (N, S)
    gathered = call.with_per_token({"target": targets, "support": support})
    members = torch.cat([targets, support], -1)
    members = members.where(members != call.ignore_index, -1)
    counted = call.target != call.ignore_index
    temperature = None if call.temperature is None else call.temperature.where(counted, 1)
    logits = call.specification.logits(dispatch.gathered_logits(gathered), temperature)
    found = support_statistics(outputs, logits, members, targets.shape[1], counted)
    shapes = {"logprob": shape if ids is None else (*shape, ids.shape[1])}
    return TokenStatistics(**{n: v.view(shapes.get(n, shape)) for n, v in found._asdict().items() if v is not None})


def _given(temperature: float | Tensor, linear_adapter: tuple[Tensor, Tensor] | None = None) -> dict[str, Tensor]:
    """The temperature, if it is a tensor, and the factors of the adapter among the tensors of a call."""
    tensors = {"temperature": temperature} if _is_per_token(temperature) else {}
    if linear_adapter is None:
        return tensors
    if isinstance(linear_adapter, list | tuple) and len(linear_adapter) == 2:
        return tensors | dict(zip(ADAPTER, linear_adapter, strict=True))
    return tensors | {"linear_adapter": linear_adapter}  # which is refused where arguments are checked


def _is_per_token(temperature: float | Tensor) -> bool:
    return isinstance(temperature, Tensor) or are_depths(temperature)


class _Arguments(NamedTuple):
    """The arguments of one call as its user gave them, by name."""

    function: str
    tensors: dict[str, Tensor | None]  # "input", "linear_weight" and "linear_bias", or "logits", and those of the loss
    keywords: dict[str, Any]
    vocab: VocabShard | None
    options: ChunkOptions | None
    flags: dict[str, bool]
    teacher: Teacher | None = None
    shapes: list[torch.Size] | None = None  # of each depth's tokens, once these are joined

    @property
    def is_head(self) -> bool:
        return "linear_weight" in self.tensors

    @property
    def input(self) -> Tensor:
        """The hidden states, of the first depth if there are several, or the logits."""
        input = self.tensors["input" if self.is_head else "logits"]
        return input[0] if are_depths(input) and len(input) > 0 else input

    @property
    def has_depths(self) -> bool:
        return self.is_head and are_depths(self.tensors["input"])

    def shaped(self, values: Tensor) -> Tensor | list[Tensor]:
        """``values`` (N,) of all tokens in the shape of the target, or in those of its depths."""
        return values.view(self.tensors["target"].shape) if self.shapes is None else in_shapes(values, self.shapes)

    def joined(self, per_token: Iterable[str] = ()) -> _Arguments:
        """With the small tensors per token of several depths joined, and their hidden states as lists."""
        if not self.has_depths:
            return self
        tensors, shapes = joined_depths(depths_of(self.tensors, per_token), per_token)
        return self._replace(tensors=tensors, shapes=shapes)

    @property
    def vocab_size(self) -> int:
        """Vocabulary entries that this rank is given."""
        return self.tensors["linear_weight"].shape[0] if self.is_head else self.input.shape[-1]

    def local(self) -> _Arguments:
        """What this rank needs of DTensors, and the shard that they say that it holds."""
        if not has_dtensor((*self.tensors.values(), self.keywords.get("num_tokens"))):
            return self
        tensors = dict(self.tensors)
        name = "linear_weight" if self.is_head else "logits"
        numbers = {"num_tokens": self.keywords["num_tokens"]} if "num_tokens" in self.keywords else {}
        sharded, vocab, given = local_arguments(name, tensors.pop(name), self.vocab, **tensors, **numbers)
        tensors = {key: sharded if key == name else given[key] for key in self.tensors}
        keywords = self.keywords | {key: given[key] for key in numbers}
        return self._replace(tensors=tensors, keywords=keywords, vocab=vocab)


def _loss(
    objective_of: Callable[[], Objective], arguments: _Arguments, per_token: dict[str, Tensor | None] | None = None
) -> Tensor | list[Tensor] | tuple[Tensor | list[Tensor], LossStats]:
    per_token = per_token or {}
    if per_token:
        given = {name: tensor for name, tensor in per_token.items() if tensor is not None}
        arguments = arguments._replace(tensors=arguments.tensors | given)
    arguments = arguments.local()
    options, objective = _agreed(objective_of, arguments, per_token)
    arguments = arguments.joined(per_token)
    tensors, keywords, return_stats = arguments.tensors, arguments.keywords, arguments.flags["return_stats"]
    reduction = keywords["reduction"]
    asked = objective.statistics + (("mean", "correct") if return_stats else ())
    call = _call(arguments, options, objective.without_tensors(), names_of(asked))
    weights = dispatch.TokenWeights.of(call, tensors["token_weight"])
    given = {name: tensors[name] for name, tensor in per_token.items() if tensor is not None}
    flat = {name: _of_tokens(objective, name, tensor) for name, tensor in given.items()}
    call = call.with_per_token(call.per_token | flat, ids=objective.ids)
    coefficient = weights.coefficient(reduction, keywords["num_tokens"])
    in_forward = arguments.is_head and not options.in_backward
    loss, rows = dispatch.loss(call, coefficient, in_forward=in_forward, reduces=reduction != "none")
    loss = arguments.shaped(loss) if reduction == "none" else loss
    return (loss, dispatch.stats(call, weights, rows)) if return_stats else loss


def _of_tokens(objective: Objective, name: str, tensor: Tensor) -> Tensor:
    """A tensor per token of an objective, (N,), or (N, K) with K ids per token."""
    if name not in (objective.ids, *objective.per_id):
        return tensor.reshape(-1)
    tensor = tensor.reshape(-1, tensor.shape[-1])
    return tensor.long() if name == objective.ids else tensor


def _agreed(
    objective_of: Callable[[], Objective | None], arguments: _Arguments, per_token: dict[str, Tensor]
) -> tuple[ChunkOptions, Objective | None]:
    """The checked options and objective of a call, on every rank that takes part in it."""
    tensors, keywords, vocab, options = arguments.tensors, arguments.keywords, arguments.vocab, arguments.options

    def check() -> tuple[ChunkOptions, Objective | None]:
        objective = objective_of()
        transformed = dispatch.is_transformed(None)

        def check_depth(tensors: dict[str, Tensor | None]) -> ChunkOptions:
            return check_call(tensors, keywords, vocab, options, arguments.flags, objective, per_token, transformed)

        depths = depths_of(tensors, per_token)
        if len(depths) > 1:
            check_with_depths(len(depths), arguments.teacher, vocab)
        (checked, *_) = for_each_depth(depths, check_depth)
        if len(depths) > 1:
            check_widths(depths, per_token)
        check_teacher(arguments.teacher, objective, depths[0]["target"], arguments.vocab_size, vocab)
        check_invariance(checked, depths[0], vocab, arguments.teacher, transformed)
        dispatch.is_transformed(vocab)
        return checked, objective

    def facts(result: tuple[ChunkOptions, Objective | None]) -> dict[str, Any]:
        depths = depths_of(tensors, per_token)
        facts = {"function": arguments.function, "options": options, "depths": len(depths)} | arguments.flags
        for at, depth in enumerate(depths):
            found = facts_of_call(depth, keywords, compute_dtype_of(arguments.input), vocab)
            facts |= found if at == 0 else {f"{name} (depth {at})": fact for name, fact in found.items()}
        facts, objective = facts | facts_of_teacher(arguments.teacher), result[1]
        return facts if objective is None else facts | {"objective": described_objective(objective)}

    return agreed(check, facts, vocab, getattr(arguments.input, "device", None))


def _call(
    arguments: _Arguments,
    options: ChunkOptions,
    objective: Objective | None,
    names: tuple[str, ...],
) -> Call:
    """What the engine is given: flat tensors, this rank's rows without padding, and the specification."""
    tensors, keywords, vocab = arguments.tensors, arguments.keywords, arguments.vocab
    input, target = arguments.input, tensors["target"]
    logits, temperature, of_teacher = _logits(arguments)
    shard = None if vocab is None else vocab.plain()
    if arguments.is_head:
        settings = dispatch.settings_of(options, input, tensors["linear_weight"], compute_dtype_of(input), vocab)
        parts, source = _head(tensors, vocab)
        if parts[1] == "hidden":  # several depths: a sum over chunks is wide, however many these are
            settings = settings._replace(head_sum_dtype=settings.wide_dtype)
        if "adapter_weight" in parts:  # whose gradients would need the columns that a filter drops
            settings = settings._replace(gradient_filter=None)
        needed = tuple([part.requires_grad and torch.is_grad_enabled() for part in source])
    else:
        settings, parts, needed = Settings.of(options, input.dtype), ("logits",), ()
        unpadded = input if vocab is None else input[..., : vocab.rows]
        source = [unpadded.reshape(target.numel(), unpadded.shape[-1])]
    settings = settings._replace(teacher_dtype=product_dtype(arguments.teacher))
    classes = tensors["weight"]
    if classes is not None:
        classes = classes.to(work_dtype(settings.compute_dtype))
        classes = classes if vocab is None else vocab.whole_vocabulary(classes)
    kind = "head" if arguments.is_head else "logits"
    specification = Specification(kind, names, logits, settings, shard, parts, needed, objective)
    flat = target.reshape(-1).long()
    call = Call(source, classes, flat, plain_integer(keywords["ignore_index"]), specification)
    if arguments.teacher is not None:
        call = call.with_teacher(*of_this_rank(arguments.teacher, vocab, of_teacher, objective.teacher_share))
    if temperature is None:
        return call
    return call.with_per_token({TEMPERATURE: temperature.reshape(-1).to(work_dtype(settings.compute_dtype))})


def _head(tensors: dict[str, Any], vocab: VocabShard | None) -> tuple[tuple[str, ...], list[Tensor]]:
    """The tensors of a head as a source of logits: flat, without rows of padding; and their names."""

    def flat(hidden: Tensor | list[Tensor]) -> list[Tensor]:
        return [part.reshape(-1, part.shape[-1]) for part in (hidden if are_depths(hidden) else [hidden])]

    def rows(part: Tensor) -> Tensor:  # those of padding never get probability
        return part if vocab is None or len(part) == vocab.rows else part[: vocab.rows]

    hidden, bias = flat(tensors["input"]), tensors["linear_bias"]
    parts, source = ["hidden"] * len(hidden) + ["weight"], [*hidden, rows(tensors["linear_weight"])]
    if bias is not None:
        parts.append("bias")
        source.append(rows(bias))
    if ADAPTER[0] in tensors:
        hidden = flat(tensors[ADAPTER[0]])
        parts += ["adapter_hidden"] * len(hidden) + ["adapter_weight"]
        source += [*hidden, rows(tensors[ADAPTER[1]])]
    return tuple(parts), source


def _logits(arguments: _Arguments) -> tuple[Logits, Tensor | None, Logits]:
    """How logits follow from products, the temperatures (...) if these are not a factor of the scale, and how the
    teacher's logits follow from its products."""
    keywords, temperature = arguments.keywords, arguments.tensors.get("temperature")
    scale, softcap, number = (keywords[name] for name in ("logit_scale", "softcap", "temperature"))
    teacher = arguments.teacher or Teacher  # whose fields have defaults
    if softcap is None and teacher.softcap is None:
        return Logits(float(scale) / float(number)), temperature, Logits(float(teacher.logit_scale) / float(number))
    if temperature is None and number != 1.0:
        temperature = torch.full_like(arguments.tensors["target"], float(number), dtype=torch.float64)
    caps = [None if cap is None else float(cap) for cap in (softcap, teacher.softcap)]
    return Logits(float(scale), caps[0]), temperature, Logits(float(teacher.logit_scale), caps[1])
