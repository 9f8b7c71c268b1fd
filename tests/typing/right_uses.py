"""Users' code that type checkers accept: right uses of every public name, which nothing runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import assert_type

import chunked_ce
from chunked_ce import (
    ChunkOptions,
    LazyLogits,
    LinearCrossEntropyLoss,
    LMHead,
    LossStats,
    Teacher,
    TokenMean,
    TokenStatistics,
    VocabShard,
    count_tokens,
    cross_entropy,
    linear_cross_entropy,
    linear_divergence,
    linear_logprobs,
    linear_loss,
    linear_statistics,
    logits_loss,
    preference,
    sequence_weights,
)
from chunked_ce.head_report import HeadReport, Report
from chunked_ce.objectives import CrossEntropy, Divergence, Objective, PolicyGradient, Tokens, TopKDivergence
from chunked_ce.rows.statistics import RowStatistics


def losses(hidden: Tensor, head: Tensor, target: Tensor, reduction: Literal["mean", "sum", "none"]) -> None:
    loss = linear_cross_entropy(hidden, head, target)
    loss.backward()
    assert_type(linear_cross_entropy(hidden, head, target, reduction=reduction), Tensor)
    mean, stats = linear_cross_entropy(hidden, head, target, softcap=30, ignore_index=None, return_stats=True)
    mean.backward()
    assert_type(stats, LossStats)
    accuracy = float(stats.num_correct / stats.num_tokens)
    print(f"{accuracy:.2f}, {chunked_ce.__version__}")
    each, _ = linear_cross_entropy(hidden, head, target, reduction="none", return_stats=True)
    assert_type(each, Tensor)
    options = ChunkOptions(chunk_size=512, gradients="backward", gradient_filter="auto", logits_dtype=torch.float32)
    linear_cross_entropy(hidden, head, target, linear_bias=head[:, 0], z_loss=1e-4, options=options).backward()
    linear_cross_entropy(hidden, head, target, options=torch.nn.LinearCrossEntropyOptions(batch_chunk_size=512))
    cross_entropy(hidden, target, label_smoothing=0.1).backward()
    assert_type(cross_entropy(hidden, target, reduction="sum", return_stats=True), tuple[Tensor, LossStats])


def depths(hidden: list[Tensor], head: Tensor, targets: list[Tensor]) -> None:
    """Of multi-token prediction."""
    loss = linear_cross_entropy(
        hidden, head, targets, token_weight=[1.0, 0.3, targets[2]], linear_adapter=(hidden, head)
    )
    assert_type(loss, Tensor)
    assert_type(linear_cross_entropy(hidden, head, targets, reduction="none"), list[Tensor])
    assert_type(linear_logprobs(hidden, head, targets), list[Tensor])
    some: Sequence[Tensor] = linear_cross_entropy(tuple(hidden), head, targets, reduction="none")
    linear_loss(CrossEntropy(), hidden, head, targets, temperature=[1.0, 0.5, 2.0]).backward()
    print(some[0])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.lm_head = nn.Linear(4, 10)
        self.loss = LinearCrossEntropyLoss(softcap=30.0, weight=torch.ones(10))
        self.with_stats = LinearCrossEntropyLoss(return_stats=True)
        self.each: LinearCrossEntropyLoss[Tensor, list[Tensor]] = LinearCrossEntropyLoss(reduction="none")
        self.other: LinearCrossEntropyLoss | None = None

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(self.embed(ids))
        return logits

    def losses(self, ids: Tensor, target: Tensor) -> Tensor:
        hidden, head = self.embed(ids), self.lm_head.weight
        loss, stats = self.with_stats(hidden, head, target)
        assert_type(stats.lse_max, Tensor)
        assert_type(self.each(hidden, head, target, token_weight=target), Tensor)
        assert_type(self.each([hidden], head, [target]), list[Tensor])
        return loss + self.loss(hidden, head, target, num_tokens=3)


def drop_in(ids: Tensor) -> None:
    model = assert_type(LMHead.wrap(Model()), Model)
    assert_type(LMHead.wrap(Model(), "lm_head", z_loss=1e-4, options=ChunkOptions(chunk_size=4), lazy="always"), Model)
    assert_type(LMHead.unwrap(model), Model)
    assert_type(LMHead.shard(model), Model)
    logits = model(ids)
    F.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    report = assert_type(LMHead.report(model), Report)
    head_report = assert_type(report.heads[0], HeadReport)
    assert_type(head_report.is_lazy, bool)
    assert_type(head_report.training.taken["cross_entropy"], int)
    head = LMHead(4, 10, z_loss=1e-4, softcap=30.0, dtype=torch.float32, device="cpu")
    linear: nn.Linear = head
    found = head(torch.ones(2, 3, 4))
    if isinstance(found, LazyLogits):
        assert_type(found.materialize(), Tensor)
        as_tensor: Tensor = found
        print(linear, as_tensor)


def ranks(hidden: Tensor, rows: Tensor, window: list[Tensor], group: dist.ProcessGroup) -> None:
    mean = TokenMean.over(window, group=group, divisor=8)
    sums = []
    for target in window:
        loss_sum = linear_cross_entropy(hidden, rows, target, reduction="sum")
        mean.for_backward(loss_sum).backward()
        mean(loss_sum).backward()
        sums.append(loss_sum.detach())
    assert_type(mean.report(sums), Tensor)
    assert_type(count_tokens(window, ignore_index=-1), Tensor)
    TokenMean(count_tokens(window)).report(sums[0])
    TokenMean.over(window, weights=map(sequence_weights, window))
    shard = VocabShard(group, 0, 8, 16, input_grad="partial", tokens="same")
    assert_type(VocabShard.split(1000, group, padded=1024, tokens="own"), VocabShard)
    assert_type(shard.group.size(), int)
    assert_type(shard.ranks, tuple[int, ...])
    linear_cross_entropy(hidden, rows, window[0], vocab=shard).backward()
    linear_loss(CrossEntropy(), hidden, rows, window[0], vocab=VocabShard.from_local(8)).backward()


@dataclasses.dataclass(frozen=True)
class FocalLoss(Objective):
    gamma: float = 2.0
    statistics: ClassVar[tuple[str, ...]] = ("logprob",)

    def loss(self, rows: RowStatistics, tokens: Tokens) -> Tensor:
        return -((1 - rows.logprob.exp()) ** self.gamma) * rows.logprob


def objectives(hidden: Tensor, head: Tensor, target: Tensor) -> None:
    loss, stats = linear_loss(
        PolicyGradient(kind="cispo", clip_high=0.3, kl=0.1),
        hidden,
        head,
        target,
        advantage=hidden[:, 0],
        old_logprob=None,
        ref_logprob=hidden[:, 1],
        return_stats=True,
    )
    loss.backward()
    print(stats.clipped / stats.num_tokens, stats.kl)
    linear_loss(FocalLoss(gamma=1.0), hidden, head, target, reduction="sum").backward()
    tail = TopKDivergence(tail="renormalize")
    assert_type(linear_loss(tail, hidden, head, target, teacher_ids=target, teacher_logprobs=hidden), Tensor)
    teacher = Teacher(hidden, head, softcap=30.0)
    linear_divergence(hidden, head, teacher, beta=0.5, target=target).backward()
    assert_type(linear_divergence(hidden, head, teacher, return_stats=True), tuple[Tensor, LossStats])
    logits_loss(Divergence(beta=1.0), hidden, target, teacher=Teacher(logits=hidden)).backward()
    assert_type(logits_loss(CrossEntropy(z_loss=0.1), hidden, target, return_stats=True), tuple[Tensor, LossStats])


def per_token(hidden: Tensor, head: Tensor, target: Tensor) -> Tensor:
    found = linear_statistics(hidden, head, target, outputs=("logprob", "entropy"), temperature=0.7)
    assert_type(found, TokenStatistics)
    assert found.logprob is not None
    logprobs, entropies = linear_logprobs(hidden, head, target, return_entropy=True)
    return found.logprob + logprobs + entropies + linear_logprobs(hidden, head, target)


def preferences(chosen: Tensor, rejected: Tensor, length: Tensor) -> Tensor:
    loss = preference.dpo(chosen, rejected, chosen, rejected, beta=0.1) + preference.ipo(
        chosen, rejected, chosen, rejected
    )
    loss = loss + preference.simpo(chosen, rejected, chosen_length=length, rejected_length=length)
    loss = loss + preference.orpo(chosen, rejected) + preference.cpo(chosen, rejected)
    return loss + preference.kto(chosen, rejected, chosen, rejected, kl=0.5)


def integrations(hidden: Tensor, head: Tensor, target: Tensor, group: dist.ProcessGroup) -> None:
    from chunked_ce.integrations import cce, deepspeed, liger, transformers, trl, verl

    loss = cce.linear_cross_entropy(hidden, head, target, shift=1, reduction="sum", filter_eps="high")
    assert isinstance(loss, Tensor)
    cce.LinearCrossEntropy(impl=cce.LinearCrossEntropyImpl.CCE)(hidden, head, target).backward()
    cce.VocabParallelOptions(0, 8, group)
    fused = liger.liger_fused_linear_cross_entropy(hidden, head, target, return_z_loss=True)
    if isinstance(fused, liger.CrossEntropyOutput):
        fused.loss.backward()
    liger.LigerFusedLinearCrossEntropyLoss(reduction="sum")(head, hidden, target).backward()
    liger.LigerFusedLinearDPOLoss(beta=0.2)
    assert_type(transformers.ForCausalLMLoss(hidden, target, 10), Tensor)
    trl.install(z_loss=1e-4)
    trl.uninstall()
    verl.install(ChunkOptions(chunk_size=512))
    verl.FusedLinearForPPO()(hidden, head, target)
    install: Callable[[], None] = deepspeed.install
    install()


def in_deepspeed() -> TokenMean:
    import deepspeed

    from chunked_ce.integrations.deepspeed import initialize, token_mean

    engine, *_ = initialize(model=Model(), config={})
    other = deepspeed.initialize(model=Model(), config={})[0]
    token_mean(other, [torch.zeros(3)])
    return token_mean(engine, [torch.zeros(3)], scale_wrt_gas=False)
