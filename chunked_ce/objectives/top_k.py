"""The divergence to a teacher of whom only the K most likely entries of the vocabulary are known."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from chunked_ce.arguments import described, is_one_of
from chunked_ce.narrowing import not_none
from chunked_ce.objectives.base import Objective, Tokens
from chunked_ce.rows.statistics import RowStatistics

__all__ = ["TopKDivergence"]

TAILS = ("bucket", "drop", "renormalize")
# The least probability of the student's rest: a log-sum-exp in fp32 does not tell less from 0.
_LEAST_REST = 2.0**-24


@dataclasses.dataclass(frozen=True)
class TopKDivergence(Objective):
    """The Kullback-Leibler divergence KL(p || q) between a teacher's p and the student's q over K ids per token.

    With k over a token's ids, the loss is one of::

        "drop":         sum_k p_k (log p_k - log q_k)
        "bucket":       the same plus p' (log p' - log q'), where p' = 1 - sum_k p_k and q' = 1 - sum_k q_k
        "renormalize":  "drop" of p_k / sum_j p_j and q_k / sum_j q_j

    ``"bucket"`` is the divergence of both distributions with all other entries of the vocabulary taken for one. q' is
    taken to be at least 2**-24.

    `chunked_ce.linear_loss` takes for each token ``teacher_ids`` (..., K), int32 or int64, distinct, and
    ``teacher_logprobs`` (..., K). An id equal to ``ignore_index`` is padding and contributes nothing. ``target`` only
    says which tokens count. The student's logits are needed at these ids and for its log-sum-exp only.

    Raises ``ValueError`` when it is made with another ``tail``; a loss raises ``IndexError`` for an id outside [0, V).

    >>> from chunked_ce import linear_loss
    >>> hidden, head, target = torch.zeros(2, 4), torch.eye(8, 4), torch.tensor([3, -100])
    >>> ids, logprobs = torch.tensor([[3, 1], [0, 2]]), torch.tensor([[0.5, 0.25], [0.5, 0.25]]).log()
    >>> linear_loss(TopKDivergence(), hidden, head, target, teacher_ids=ids, teacher_logprobs=logprobs)
    tensor(0.5918)
    """

    tail: Literal["bucket", "drop", "renormalize"] = "bucket"
    """``"bucket"``, ``"drop"`` or ``"renormalize"``."""

    statistics = ("at_ids",)
    per_token = ("teacher_ids", "teacher_logprobs")
    ids = "teacher_ids"
    per_id = ("teacher_logprobs",)

    def __post_init__(self) -> None:
        if not is_one_of(self.tail, TAILS):
            raise ValueError(f"tail must be 'bucket', 'drop' or 'renormalize', was {described(self.tail)}")

    def loss(self, rows: RowStatistics, tokens: Tokens) -> Tensor:
        teacher = self._teacher(tokens)
        if self.tail == "renormalize":
            some = (tokens.teacher_ids >= 0).any(-1, keepdim=True)
            log_q = not_none(rows.at_ids).double().where(some, 0).log_softmax(-1)  # (n, K)
        else:
            log_q = rows.logprobs.double()
        # A product of 0 and -inf, where the teacher has no probability, is 0.
        gap = (teacher.log_p - log_q).where(teacher.p > 0, 0)
        loss = (teacher.p * gap).sum(-1)
        if self.tail != "bucket":
            return loss
        rest = 1 - log_q.exp().sum(-1)
        rest = rest + (rest.clamp(min=_LEAST_REST) - rest).detach()  # has the gradient of the rest as it was
        return loss + torch.xlogy(teacher.rest, teacher.rest) - teacher.rest * rest.log()

    def slopes(self, rows: RowStatistics, tokens: Tokens) -> RowStatistics:
        p, _, rest_p = self._teacher(tokens)
        if self.tail == "renormalize":
            q = not_none(rows.at_ids).double().softmax(-1).where(p.sum(-1, True) > 0, 0)
            return RowStatistics(None, torch.zeros_like(rows.log_sum), torch.zeros_like(rows.target), at_ids=q - p)
        at_ids = -p
        if self.tail == "bucket":
            q = rows.logprobs.double().exp()
            at_ids = at_ids + q * (rest_p / (1 - q.sum(-1)).clamp(min=_LEAST_REST)).unsqueeze(-1)
        return RowStatistics(None, -at_ids.sum(-1), torch.zeros_like(rows.target), at_ids=at_ids)

    def _teacher(self, tokens: Tokens) -> _Teacher:
        log_p = tokens.teacher_logprobs.double().where(tokens.teacher_ids >= 0, -torch.inf)
        if self.tail == "renormalize":
            total = log_p.logsumexp(-1, True)
            log_p = log_p - total.where(total > -torch.inf, 0)  # a token without any id has no probability
        p = log_p.exp()
        return _Teacher(p, log_p, (1 - p.sum(-1)).clamp(min=0))


class _Teacher(NamedTuple):
    p: Tensor  # (n, K) 0 at padding
    log_p: Tensor  # (n, K)
    rest: Tensor  # (n,) the probability of all other entries
