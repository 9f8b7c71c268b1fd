"""The losses by which a student learns from a teacher, in chunks and with full logits."""

import torch
import torch.nn.functional as F
from torch import Tensor

from chunked_ce import linear_loss
from chunked_ce.objectives import Divergence, Teacher, TopKDivergence
from common.model import ModelConfig, Transformer
from common.text_data import IGNORED

LEAST = 2.0**-24  # of the probability of all other words: rounding leaves no less of 1
TAILS = ("bucket", "drop", "renormalize")  # what becomes of the words outside the teacher's K


def chunked_divergence(
    hidden: Tensor,  # (..., D)
    head: Tensor,  # (V, D)
    targets: Tensor,  # (...), -100 where a token is ignored
    teacher_hidden: Tensor,  # (..., D_teacher)
    *,
    teacher_head: Tensor,  # (V, D_teacher)
    beta: float = 0.0,
) -> Tensor:
    """The sum over tokens of the divergence between the teacher p and the student q.

    KL(p || q) for beta = 0, KL(q || p) for beta = 1; in between beta KL(p || m) + (1 - beta) KL(q || m) with
    m = beta p + (1 - beta) q.
    """
    teacher = Teacher(teacher_hidden, teacher_head)
    return linear_loss(Divergence(beta), hidden, head, targets, teacher=teacher, reduction="sum")


def full_divergence(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    teacher_hidden: Tensor,
    *,
    teacher_head: Tensor,
    beta: float = 0.0,
) -> Tensor:
    """The same sum, from the logits (N, V) of both, N being the tokens that are not ignored."""
    counted = targets != IGNORED
    log_p = F.linear(teacher_hidden[counted], teacher_head).float().log_softmax(-1)
    log_q = F.linear(hidden[counted], head).float().log_softmax(-1)
    if beta == 0:
        return kl(log_p, log_q)
    if beta == 1:
        return kl(log_q, log_p)
    weights = torch.tensor([beta, 1 - beta], device=log_p.device).log()
    log_m = torch.logaddexp(log_p + weights[0], log_q + weights[1])
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q), summed over tokens."""
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True)


def chunked_top_k(
    hidden: Tensor,  # (..., D)
    head: Tensor,  # (V, D)
    targets: Tensor,  # (...), -100 where a token is ignored
    teacher_ids: Tensor,  # (..., K)
    teacher_logprobs: Tensor,  # (..., K)
    *,
    tail: str = "bucket",
) -> Tensor:
    """The sum over tokens of KL(p || q) over the teacher's K likeliest words, and one bucket for all others."""
    teacher = {"teacher_ids": teacher_ids, "teacher_logprobs": teacher_logprobs}
    return linear_loss(TopKDivergence(tail), hidden, head, targets, reduction="sum", **teacher)


def full_top_k(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    *,
    tail: str = "bucket",
) -> Tensor:
    """The same sum, from the student's logits (N, V), N being the tokens that are not ignored."""
    counted = targets != IGNORED
    log_p = teacher_logprobs[counted]  # (N, K)
    log_q = F.linear(hidden[counted], head).float().log_softmax(-1).gather(-1, teacher_ids[counted])
    if tail == "renormalize":
        log_p, log_q = log_p.log_softmax(-1), log_q.log_softmax(-1)
    elif tail == "bucket":
        log_p, log_q = with_rest(log_p), with_rest(log_q)
    return kl(log_p, log_q)


def with_rest(logprobs: Tensor) -> Tensor:
    """Appends the log-probability of all other words: (N, K) to (N, K + 1)."""
    rest = 1 - logprobs.exp().sum(-1, keepdim=True)
    return torch.cat([logprobs, rest.clamp(min=LEAST).log()], -1)


LOSSES = {
    "kl": {"chunked": chunked_divergence, "full": full_divergence},
    "top-k": {"chunked": chunked_top_k, "full": full_top_k},
}


class Student(Transformer):
    """Maps tokens and targets, both (B, T), and what the teacher says of each token to the sum of the loss."""

    def __init__(self, config: ModelConfig, loss):
        super().__init__(config)
        self.loss = loss

    def forward(self, tokens: Tensor, targets: Tensor, *taught: Tensor) -> Tensor:
        return self.loss(super().forward(tokens), self.head.weight, targets, *taught)
