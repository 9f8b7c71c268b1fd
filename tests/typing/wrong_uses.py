"""Users' mistakes that type checkers find: each line that ends in ``# wrong: <mypy's code>``, which nothing runs."""

from __future__ import annotations

import torch
from torch import Tensor

from chunked_ce import (
    ChunkOptions,
    LinearCrossEntropyLoss,
    LMHead,
    Teacher,
    TokenMean,
    VocabShard,
    cross_entropy,
    linear_cross_entropy,
    linear_divergence,
    linear_logprobs,
    linear_loss,
    linear_statistics,
    logits_loss,
    preference,
)
from chunked_ce.objectives import CrossEntropy, PolicyGradient


def losses(hidden: Tensor, head: Tensor, target: Tensor, mean: TokenMean) -> None:
    linear_cross_entropy(hidden, head, target, reduction="avg")  # wrong: call-overload
    linear_cross_entropy(hidden, head, target, sofcap=30.0)  # wrong: call-overload
    linear_cross_entropy(hidden, head, target, softcap="30")  # wrong: call-overload
    linear_cross_entropy(hidden, head, target, options=512)  # wrong: call-overload
    linear_cross_entropy(hidden, head)  # wrong: call-overload
    linear_cross_entropy(hidden, head, target, return_stats=True).backward()  # wrong: attr-defined
    linear_cross_entropy([hidden], head, [target], reduction="none").backward()  # wrong: attr-defined
    _, stats = linear_cross_entropy(hidden, head, target, return_stats=True)
    stats.num_corect.item()  # wrong: attr-defined
    mean(linear_cross_entropy(hidden, head, target, return_stats=True))  # wrong: arg-type
    mean.report(1.0)  # wrong: arg-type
    cross_entropy(hidden, target, reduction="batchmean")  # wrong: call-overload
    cross_entropy(hidden, target, linear_bias=head)  # wrong: call-overload
    LinearCrossEntropyLoss(reduction="avg")  # wrong: call-overload
    LinearCrossEntropyLoss(num_tokens=3)  # wrong: call-overload
    LinearCrossEntropyLoss()(hidden, head)  # wrong: call-overload
    LinearCrossEntropyLoss(return_stats=True)(hidden, head, target).backward()  # wrong: attr-defined


def others(hidden: Tensor, head: Tensor, target: Tensor) -> None:
    linear_loss("clip", hidden, head, target)  # wrong: call-overload
    linear_loss(CrossEntropy(), hidden, head, target, reduction="max")  # wrong: call-overload
    logits_loss(CrossEntropy(), hidden, target, softcap="no")  # wrong: call-overload
    linear_divergence(hidden, head, hidden)  # wrong: call-overload
    linear_logprobs(hidden, head, target, reduction="sum")  # wrong: call-overload
    linear_statistics(hidden, head, target, outputs=("logprob",)).logprob.sum()  # wrong: union-attr
    PolicyGradient(kind="ppo")  # wrong: arg-type
    Teacher(words="all")  # wrong: arg-type
    ChunkOptions(gradients="both")  # wrong: arg-type
    ChunkOptions(chunk_size="big")  # wrong: arg-type
    VocabShard(None, 0, 8, 16, input_grad="whole")  # wrong: arg-type
    preference.dpo(hidden, hidden)  # wrong: call-arg
    LMHead.wrap("model")  # wrong: type-var
    LMHead(4, 10, lazy="never")  # wrong: arg-type
    LMHead(4, 10, z_los=0.1)  # wrong: call-arg
    LMHead.wrap(torch.nn.Linear(4, 10), softcap="30")  # wrong: arg-type
    LMHead.shard(torch.nn.Linear(4, 10), vocab=None)  # wrong: call-arg
