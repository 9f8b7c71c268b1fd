"""The cases of ``chunked-ce check`` besides cross-entropy: objectives, statistics per token, and other heads.

Each is a loss of hidden states and head, ours and the formula on full logits; `chunked_ce.cli.self_checks.compare`
says what is allowed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from chunked_ce import (
    ChunkOptions,
    Teacher,
    VocabShard,
    linear_cross_entropy,
    linear_logprobs,
    linear_loss,
    linear_statistics,
)
from chunked_ce.cli.accuracy import gradient_of
from chunked_ce.cli.self_checks import CHUNK, WAYS, CheckInputs, Kernels, Row, Way, compare, place
from chunked_ce.cli.synthetic_inputs import IGNORED
from chunked_ce.objectives import Divergence, Objective, PolicyGradient, TopKDivergence
from chunked_ce.preference import dpo

__all__ = ["CASES", "cases", "sharded_cases"]

_NARROW = 100  # size of the teacher's hidden states
_RANK = 8  # of the adapter
_IDS = 5  # of a top-k teacher
_OUTPUTS = ("logprob", "entropy", "lse", "log_sum_sq_probs", "mean_logit")

Keywords = dict[str, Any]
Loss = Callable[[CheckInputs, Keywords], Tensor]
Formula = Callable[[CheckInputs], Tensor]


class Case(NamedTuple):
    """A sum over tokens: ours, of inputs and keywords of how to compute it, and by its formula."""

    loss: Loss
    formula: Formula
    ways: tuple[Way, ...] = WAYS
    constants: Callable[[CheckInputs], Keywords] = lambda whole: {}
    """Keywords that come from the whole head, whichever rows of it a rank has: ids, and what a teacher says of them."""

    def with_constants(self, whole: CheckInputs, keywords: Keywords) -> Callable[[CheckInputs], Tensor]:
        """The loss as a function of its leaves alone."""
        given = dict(keywords) | self.constants(whole)
        return lambda own: self.loss(own, given)


def cases(device: str, dtype: torch.dtype, backend: Kernels = "auto") -> Iterator[Row]:
    """All rows of one device, dtype and choice of kernels."""
    inputs, where = CheckInputs.random(dtype, device), place(device, dtype, backend)
    for name, case in CASES.items():
        for way in case.ways:
            options = ChunkOptions(chunk_size=CHUNK, gradients=way, backend=backend)
            yield from _rows(name, f"{where}, {way}", inputs, case, {"options": options})


def sharded_cases(
    inputs: CheckInputs, where: str, options: ChunkOptions, vocab: VocabShard, names: Sequence[str]
) -> Iterator[Row]:
    """The cases of these names, on this rank's rows of the head."""
    for name in names:
        case = CASES[name]
        if options.gradients in case.ways:
            yield from _rows(name, where, inputs, case, {"options": options, "vocab": vocab})


def _rows(name: str, where: str, inputs: CheckInputs, case: Case, keywords: Keywords) -> Iterator[Row]:
    vocab = keywords.get("vocab")
    rows = slice(None) if vocab is None else slice(vocab.start, vocab.stop)

    def run(loss: Callable[[CheckInputs], Tensor], given: CheckInputs) -> tuple[Tensor, ...]:
        own = given.leaves()
        value = loss(own)
        value.backward()
        return value.detach(), gradient_of(own.hidden), gradient_of(own.head)[rows]

    loss = case.with_constants(inputs, keywords)
    values = run(lambda own: loss(own._replace(head=own.head[rows])), inputs)
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


def _policy(own: CheckInputs, kind: str, kl: float, entropy: float) -> Tensor:
    """A surrogate whose old log-probabilities are `_old`, with a KL term and an entropy bonus."""
    logprobs = _logits(own).log_softmax(-1)
    lp, advantage, old = (
        _chosen(own, logprobs),
        _counted(own, own.upstream),
        _counted(own, _old(own)).to(logprobs.dtype),
    )
    ratio = (lp - old).exp()
    if kind == "clip":
        loss = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    else:
        loss = -(ratio.detach().clamp(max=1.2) if kind == "cispo" else 1.0) * advantage * lp
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


def _top_k(own: CheckInputs, tail: str) -> Tensor:
    ids, p = (_counted(own, part) for part in _top(own))
    q = _logits(own).log_softmax(-1).gather(-1, ids)
    p = p.to(q.dtype)
    if tail == "renormalize":
        p, q = p.log_softmax(-1), q.log_softmax(-1)
    losses = (p.exp() * (p - q)).sum(-1)
    if tail == "bucket":
        rest_p, rest_q = (torch.log1p(-part.exp().sum(-1)) for part in (p, q))
        losses = losses + rest_p.exp() * (rest_p - rest_q)
    return losses.sum()


def _teacher_logits(own: CheckInputs) -> Tensor:
    """(N, V), in the student's dtype."""
    return F.linear(*_teacher(own))


def _words(own: CheckInputs) -> Tensor:
    """(V,) the teacher's entry that each of the student's stands for."""
    return (3 * torch.arange(len(own.head), device=own.head.device) + 1) % _entries_of_teacher(own)


def _entries_of_teacher(own: CheckInputs) -> int:
    return len(own.head) + 100


def _draft_teacher(own: CheckInputs) -> Tensor:
    """(N, V + 100) logits of a teacher with more words than the student."""
    return torch.cat((_teacher_logits(own), own.hidden.detach()[:, :100]), 1)


def _draft_divergence(own: CheckInputs) -> Tensor:
    p = _counted(own, _wide(_draft_teacher(own)))[:, _words(own)].log_softmax(-1)
    return (p.exp() * (p - _logits(own).log_softmax(-1))).sum()


def _ids(own: CheckInputs) -> Tensor:
    """(N, K) the target and some others."""
    steps = torch.arange(_IDS, device=own.target.device)
    ids = (own.target.unsqueeze(-1) + 7 * steps) % len(own.head)
    return ids.masked_fill((own.target == IGNORED).unsqueeze(-1), IGNORED)


def _logprobs_of_ids(own: CheckInputs) -> Tensor:
    chosen = _logits(own).log_softmax(-1).gather(-1, _counted(own, _ids(own)))
    return (chosen * _counted(own, own.upstream).unsqueeze(-1)).sum()


def _of_ids(own: CheckInputs, keywords: Keywords) -> Tensor:
    found = linear_statistics(own.hidden, own.head, **keywords).logprob
    assert found is not None  # it is an output by default
    return (found * (own.upstream * (own.target != IGNORED)).unsqueeze(-1)).sum()


def _logprobs_on_support(own: CheckInputs) -> Tensor:
    """Of the targets, where only `_ids` can be sampled."""
    members = _logits(own).gather(-1, _counted(own, _ids(own)))
    return (members.log_softmax(-1)[:, 0] * _counted(own, own.upstream)).sum()


def _of_support(own: CheckInputs, keywords: Keywords) -> Tensor:
    found = linear_statistics(own.hidden, own.head, own.target, **keywords).logprob
    assert found is not None  # it is an output by default
    return (found * own.upstream).sum()


def _halves(own: CheckInputs, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """The log-probabilities of two sequences, the chosen and the rejected one, each as a batch of one."""
    middle = len(logprobs) // 2
    return logprobs[:middle].sum().unsqueeze(0), logprobs[middle:].sum().unsqueeze(0)


def _reference(own: CheckInputs, policy: Tensor) -> Tensor:
    """Of the sequence by a reference: near the policy, so that the loss is not at an end of its sigmoid."""
    return policy.detach().double().round(decimals=-1).to(policy.dtype)


def _preference(own: CheckInputs) -> Tensor:
    logprobs = torch.zeros_like(own.target, dtype=torch.float64 if own.hidden.dtype == torch.float64 else torch.float32)
    chosen = _chosen(own, _logits(own).log_softmax(-1))
    logprobs = logprobs.masked_scatter(own.target != IGNORED, chosen)
    policy = _halves(own, logprobs)
    margin = (policy[0] - _reference(own, policy[0])) - (policy[1] - _reference(own, policy[1]))
    return -F.logsigmoid(0.1 * margin).sum()


def _of_preference(own: CheckInputs, keywords: Keywords) -> Tensor:
    logprobs = linear_logprobs(own.hidden, own.head, own.target, **keywords)
    policy = _halves(own, logprobs)
    return dpo(*policy, *(_reference(own, part) for part in policy), beta=0.1)


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
    return torch.stack([(part * upstream.roll(turn)).sum() for turn, part in enumerate(parts)]).sum()


def _of_statistics(own: CheckInputs, keywords: Keywords) -> Tensor:
    found = linear_statistics(own.hidden, own.head, own.target, outputs=_OUTPUTS, **keywords)
    parts = tuple(_counted(own, getattr(found, name)) for name in _OUTPUTS)
    return _weighed(parts, _counted(own, own.upstream))


def _objective(objective: Objective, per_token: Callable[[CheckInputs], Keywords]) -> Loss:
    def loss(own: CheckInputs, keywords: Keywords) -> Tensor:
        given: Keywords = {"reduction": "sum"} | keywords | per_token(own)
        value: Tensor = linear_loss(objective, own.hidden, own.head, own.target, **given)
        return value

    return loss


def _cross_entropy(of_inputs: Callable[[CheckInputs], Keywords]) -> Loss:
    def loss(own: CheckInputs, keywords: Keywords) -> Tensor:
        given: Keywords = {"reduction": "sum"} | keywords | of_inputs(own)
        value: Tensor = linear_cross_entropy(own.hidden, own.head, own.target, **given)
        return value

    return loss


def _divergence_case(beta: float, logits: bool = False) -> Case:
    def teacher(own: CheckInputs) -> Keywords:
        return {"teacher": Teacher(logits=_teacher_logits(own)) if logits else Teacher(*_teacher(own))}

    return Case(_objective(Divergence(beta), teacher), functools.partial(_divergence, beta=beta))


def _policy_case(kind: Literal["clip", "cispo", "reinforce"], kl: float, entropy: float) -> Case:
    def tensors(own: CheckInputs) -> Keywords:
        return {"advantage": own.upstream, "old_logprob": _old(own), "ref_logprob": _old(own)}

    loss = _objective(PolicyGradient(kind, kl=kl, entropy=entropy), tensors)
    return Case(loss, functools.partial(_policy, kind=kind, kl=kl, entropy=entropy))


def _top_k_case(tail: Literal["bucket", "drop", "renormalize"]) -> Case:
    def constants(whole: CheckInputs) -> Keywords:
        return dict(zip(("teacher_ids", "teacher_logprobs"), _top(whole), strict=True))

    loss = _objective(TopKDivergence(tail), lambda own: {})
    return Case(loss, functools.partial(_top_k, tail=tail), constants=constants)


CASES = {
    "temperatures": Case(_cross_entropy(lambda own: {"temperature": _temperatures(own)}), _with_temperatures),
    "policy gradient": _policy_case("clip", 0.1, 0.01),
    "policy gradient, CISPO": _policy_case("cispo", 0.0, 0.01),
    "policy gradient, REINFORCE": _policy_case("reinforce", 0.1, 0.0),
    "KL divergence": _divergence_case(0.0),
    "reverse KL divergence": _divergence_case(1.0),
    "Jensen-Shannon divergence": _divergence_case(0.3),
    "KL divergence from logits that exist": _divergence_case(0.0, logits=True),
    "KL divergence over a draft vocabulary": Case(
        _objective(Divergence(), lambda own: {}),
        _draft_divergence,
        constants=lambda whole: {"teacher": Teacher(logits=_draft_teacher(whole), words=_words(whole))},
    ),
    "top-k divergence": _top_k_case("bucket"),
    "top-k divergence, rest dropped": _top_k_case("drop"),
    "top-k divergence, renormalized": _top_k_case("renormalize"),
    "low-rank adapter": Case(_cross_entropy(lambda own: {"linear_adapter": _adapter(own)}), _adapted),
    "statistics per token": Case(_of_statistics, _statistics, ("backward",)),
    "log-probabilities of several ids": Case(
        _of_ids, _logprobs_of_ids, ("backward",), lambda whole: {"target": _ids(whole)}
    ),
    "log-probabilities on a support": Case(
        _of_support, _logprobs_on_support, ("backward",), lambda whole: {"support": _ids(whole)}
    ),
    "preference of one answer over another": Case(_of_preference, _preference, ("backward",)),
}
