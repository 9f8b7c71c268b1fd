"""The cases of ``chunked-ce check`` besides cross-entropy: objectives, statistics per token, and other heads.

Each is a loss of hidden states and head, ours and the formula on full logits; `chunked_ce.cli.self_checks.compare`
says what is allowed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from chunked_ce import ChunkOptions, Teacher, VocabShard, linear_cross_entropy, linear_loss, linear_statistics
from chunked_ce.cli.self_checks import CHUNK, CheckInputs, Row, compare, place
from chunked_ce.cli.synthetic_inputs import IGNORED
from chunked_ce.objectives import Divergence, PolicyGradient, TopKDivergence

__all__ = ["CASES", "cases", "sharded_cases"]

_NARROW = 100  # size of the teacher's hidden states
_RANK = 8  # of the adapter
_IDS = 5  # of a top-k teacher
_OUTPUTS = ("logprob", "entropy", "lse", "log_sum_sq_probs", "mean_logit")

Loss = Callable[[CheckInputs, dict[str, object]], Tensor]
Formula = Callable[[CheckInputs], Tensor]


class Case(NamedTuple):
    """A sum over tokens: ours, of inputs and keywords of how to compute it, and by its formula."""

    loss: Loss
    formula: Formula
    ways: tuple[str, ...] = ("forward", "backward")


def cases(device: str, dtype: torch.dtype, backend: str = "auto") -> Iterator[Row]:
    """All rows of one device, dtype and choice of kernels."""
    inputs, where = CheckInputs.random(dtype, device), place(device, dtype, backend)
    for name, case in CASES.items():
        for way in case.ways:
            options = ChunkOptions(chunk_size=CHUNK, gradients=way, backend=backend)
            yield from _rows(name, f"{where}, {way}", inputs, case, {"options": options})


def sharded_cases(inputs: CheckInputs, where: str, options: ChunkOptions, vocab: VocabShard) -> Iterator[Row]:
    """The cases whose constants are rows of the head, on this rank's ones."""
    for name, case in CASES.items():
        if name != _TOP_K and options.gradients in case.ways:
            yield from _rows(name, where, inputs, case, {"options": options, "vocab": vocab})


def _rows(name: str, where: str, inputs: CheckInputs, case: Case, keywords: dict[str, object]) -> Iterator[Row]:
    vocab = keywords.get("vocab")
    rows = slice(None) if vocab is None else slice(vocab.start, vocab.stop)

    def run(loss: Callable[[CheckInputs], Tensor], given: CheckInputs) -> tuple[Tensor | None, ...]:
        own = given.leaves()
        value = loss(own)
        value.backward()
        return value.detach(), own.hidden.grad, own.head.grad[rows]

    values = run(lambda own: case.loss(own._replace(head=own.head[rows]), keywords), inputs)
    # The formula's own sum may be right by chance: one rounding of the dtype is allowed, and gradients say more.
    rounding = {"loss": torch.finfo(inputs.hidden.dtype).eps}
    formula = functools.partial(run, case.formula)
    yield from compare(name, where, inputs, ("loss", "dX", "dW"), values, formula, rounding=rounding)


# ---- the formulas, on full logits ----


def _logits(own: CheckInputs) -> Tensor:
    """(n, V) of the tokens that count."""
    return _wide(F.linear(own.hidden, own.head)[own.target != IGNORED])


def _wide(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()


def _counted(own: CheckInputs, values: Tensor) -> Tensor:
    return values[own.target != IGNORED]


def _chosen(own: CheckInputs, logprobs: Tensor) -> Tensor:
    return logprobs.gather(-1, _counted(own, own.target).unsqueeze(-1)).squeeze(-1)


def _temperatures(own: CheckInputs) -> Tensor:
    return own.token_weight.double().clamp(0.3, 3.0)


def _with_temperatures(own: CheckInputs) -> Tensor:
    z = _logits(own)
    z = z / _counted(own, _temperatures(own)).unsqueeze(-1).to(z.dtype)
    return -_chosen(own, z.log_softmax(-1)).sum()


def _policy(own: CheckInputs, kl: float, entropy: float) -> Tensor:
    """A clipped surrogate whose old log-probabilities are `_old`, with a KL term and an entropy bonus."""
    logprobs = _logits(own).log_softmax(-1)
    lp, advantage, old = (
        _chosen(own, logprobs),
        _counted(own, own.upstream),
        _counted(own, _old(own)).to(logprobs.dtype),
    )
    ratio = (lp - old).exp()
    loss = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    loss = loss + kl * (torch.exp(old - lp) - (old - lp) - 1)
    return (loss + entropy * (logprobs.exp() * logprobs).sum(-1)).sum()


def _old(own: CheckInputs) -> Tensor:
    return -6.5 + 0.5 * own.upstream.double()


def _teacher(own: CheckInputs) -> tuple[Tensor, Tensor]:
    """A narrower head, constant."""
    return own.hidden.detach()[:, :_NARROW] * 2, own.head.detach()[:, -_NARROW:]


def _divergence(own: CheckInputs, beta: float) -> Tensor:
    q, p = (_counted(own, _wide(F.linear(*head))).log_softmax(-1) for head in ((own.hidden, own.head), _teacher(own)))
    if beta == 0:
        return (p.exp() * (p - q)).sum()
    if beta == 1:
        return (q.exp() * (q - p)).sum()
    m = (beta * p.exp() + (1 - beta) * q.exp()).log()
    return (beta * p.exp() * (p - m) + (1 - beta) * q.exp() * (q - m)).sum()


def _top(own: CheckInputs) -> tuple[Tensor, Tensor]:
    """A teacher's likeliest ids (N, K), and their log-probabilities, the same in every dtype of the student."""
    hidden, head = _teacher(own)
    logprobs, ids = F.linear(hidden.double(), head.double()).log_softmax(-1).topk(_IDS)
    return ids, logprobs


def _top_k(own: CheckInputs) -> Tensor:
    ids, logprobs = (_counted(own, part) for part in _top(own))
    q = _logits(own).log_softmax(-1).gather(-1, ids)
    logprobs = logprobs.to(q.dtype)
    rest_p, rest_q = (torch.log1p(-part.exp().sum(-1)) for part in (logprobs, q))
    return ((logprobs.exp() * (logprobs - q)).sum(-1) + rest_p.exp() * (rest_p - rest_q)).sum()


def _adapter(own: CheckInputs) -> tuple[Tensor, Tensor]:
    return own.hidden[:, :_RANK], own.head[:, -_RANK:]


def _adapted(own: CheckInputs) -> Tensor:
    z = _wide(F.linear(own.hidden, own.head) + F.linear(*_adapter(own)))
    return F.cross_entropy(z, own.target, reduction="sum")


def _statistics(own: CheckInputs) -> Tensor:
    z = _logits(own)
    logprobs, lse = z.log_softmax(-1), z.logsumexp(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    squares = (2 * logprobs).logsumexp(-1)
    parts = _chosen(own, logprobs), entropy, lse, squares, z.mean(-1)
    return _weighed(parts, _counted(own, own.upstream))


def _weighed(parts: tuple[Tensor, ...], upstream: Tensor) -> Tensor:
    """The statistics of tokens times an upstream gradient of each."""
    return sum((part * upstream.roll(turn)).sum() for turn, part in enumerate(parts))


def _of_statistics(own: CheckInputs, keywords: dict[str, object]) -> Tensor:
    found = linear_statistics(own.hidden, own.head, own.target, outputs=_OUTPUTS, **keywords)
    parts = tuple(_counted(own, getattr(found, name)) for name in _OUTPUTS)
    return _weighed(parts, _counted(own, own.upstream))


def _objective(objective: object, per_token: Callable[[CheckInputs], dict[str, object]]) -> Loss:
    def loss(own: CheckInputs, keywords: dict[str, object]) -> Tensor:
        given = {"reduction": "sum"} | keywords | per_token(own)
        return linear_loss(objective, own.hidden, own.head, own.target, **given)

    return loss


def _cross_entropy(of_inputs: Callable[[CheckInputs], dict[str, object]]) -> Loss:
    def loss(own: CheckInputs, keywords: dict[str, object]) -> Tensor:
        given = {"reduction": "sum"} | keywords | of_inputs(own)
        return linear_cross_entropy(own.hidden, own.head, own.target, **given)

    return loss


def _divergence_case(beta: float) -> Case:
    loss = _objective(Divergence(beta), lambda own: {"teacher": Teacher(*_teacher(own))})
    return Case(loss, functools.partial(_divergence, beta=beta))


_TOP_K = "top-k divergence"  # whose ids are of the whole vocabulary
CASES = {
    "temperatures": Case(_cross_entropy(lambda own: {"temperature": _temperatures(own)}), _with_temperatures),
    "policy gradient": Case(
        _objective(
            PolicyGradient(kl=0.1, entropy=0.01),
            lambda own: {"advantage": own.upstream, "old_logprob": _old(own), "ref_logprob": _old(own)},
        ),
        functools.partial(_policy, kl=0.1, entropy=0.01),
    ),
    "KL divergence": _divergence_case(0.0),
    "reverse KL divergence": _divergence_case(1.0),
    "Jensen-Shannon divergence": _divergence_case(0.3),
    _TOP_K: Case(
        _objective(
            TopKDivergence(), lambda own: dict(zip(("teacher_ids", "teacher_logprobs"), _top(own), strict=True))
        ),
        _top_k,
    ),
    "low-rank adapter": Case(_cross_entropy(lambda own: {"linear_adapter": _adapter(own)}), _adapted),
    "statistics per token": Case(_of_statistics, _statistics, ("backward",)),
}
