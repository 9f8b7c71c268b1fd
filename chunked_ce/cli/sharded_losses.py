"""A head of which each rank holds V / R rows: the cross-entropy on it, as ``bench --loss sharded`` measures it.

N tokens are those of all ranks. Where ranks have tokens of their own, as in data parallelism, each has N / R of them;
where they have the same ones, as in tensor parallelism, each has all N. Either way the work of a rank is that of
N V / R logits. The gathered head is the alternative for tokens of their own: all rows are gathered before the loss and
their gradient, which is summed over ranks, is scattered after it, as FSDP and ZeRO-3 do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from chunked_ce import ChunkOptions, VocabShard, linear_cross_entropy
from chunked_ce.cli.synthetic_inputs import LossInputs
from chunked_ce.parallel.collectives import all_gather_single, reduce_scatter_single

__all__ = ["NOTE", "SHARDED_LOSSES", "RankInputs", "ShardedLoss"]

NOTE = (
    "N counts the tokens of all ranks: N/{ranks} on each, and all N on each where the name says same tokens. Seconds "
    "are those of the slowest rank, memory and bytes sent those of the rank with the most; three products are those "
    "of a rank's share, N V/{ranks} logits."
)


class RankInputs(NamedTuple):
    """This rank's tensors."""

    hidden: Tensor  # (N / R, D), or (N, D) for tokens that all ranks have
    weight: Tensor  # (V_r, D): this rank's rows
    target: Tensor  # (N / R,) or (N,)
    vocab_size: int  # V

    @classmethod
    def of(cls, whole: LossInputs) -> tuple[RankInputs, RankInputs]:
        """Those of its own tokens and those of all, with the same rows; the whole ones may go."""
        vocab = VocabShard.split(len(whole.weight))
        rows = whole.weight.detach()[vocab.start : vocab.stop].clone().requires_grad_()
        hidden, target = (
            tensor.detach().tensor_split(dist.get_world_size())[dist.get_rank()].clone()
            for tensor in (whole.hidden, whole.target)
        )
        own = cls(hidden.requires_grad_(), rows, target, vocab.total)
        return own, cls(whole.hidden, rows, whole.target, vocab.total)


class ShardedLoss(NamedTuple):
    """A loss of `RankInputs`, and whether its tokens are the same on all ranks."""

    key: str
    loss: Callable[[ChunkOptions], Callable[..., Tensor]]
    same_tokens: bool = False
    takes_chunk: bool = True


class _Gathered(torch.autograd.Function):
    """All rows of the head (V, D) from this rank's; the gradient of these is the mean over ranks."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, vocab_size: int) -> Tensor:
        ranks = dist.get_world_size()
        most = -(-vocab_size // ranks)
        ctx.rows, ctx.padded_rows = len(rows), most * ranks
        whole = rows.new_empty(ctx.padded_rows, rows.shape[1])
        all_gather_single(whole, F.pad(rows, (0, 0, 0, most - len(rows))) if len(rows) < most else rows.contiguous())
        return whole[:vocab_size]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        grad, ranks = grads[0], dist.get_world_size()
        if len(grad) < ctx.padded_rows:
            grad = F.pad(grad, (0, 0, 0, ctx.padded_rows - len(grad)))
        mine = grad.new_empty(ctx.padded_rows // ranks, grad.shape[1])
        reduce_scatter_single(mine, grad.contiguous())
        return mine[: ctx.rows].div_(ranks), None


def _sharded(options: ChunkOptions, tokens: str) -> Callable[..., Tensor]:
    def loss(hidden: Tensor, rows: Tensor, target: Tensor, vocab_size: int) -> Tensor:
        vocab = VocabShard.split(vocab_size, tokens=tokens)
        return linear_cross_entropy(hidden, rows, target, vocab=vocab, options=options)

    return loss


def _gathered(options: ChunkOptions) -> Callable[..., Tensor]:
    def loss(hidden: Tensor, rows: Tensor, target: Tensor, vocab_size: int) -> Tensor:
        head: Tensor = _Gathered.apply(rows, vocab_size)  # type: ignore[no-untyped-call]
        return linear_cross_entropy(hidden, head, target, options=options)

    return loss


def _full(options: ChunkOptions) -> Callable[..., Tensor]:
    def loss(hidden: Tensor, rows: Tensor, target: Tensor, vocab_size: int) -> Tensor:
        head: Tensor = _Gathered.apply(rows, vocab_size)  # type: ignore[no-untyped-call]
        return F.cross_entropy(F.linear(hidden, head).float(), target)

    return loss


OWN, SAME = "chunked_ce, sharded head, own tokens", "chunked_ce, sharded head, same tokens"

SHARDED_LOSSES = {
    OWN: ShardedLoss("own", lambda options: _sharded(options, "own")),
    SAME: ShardedLoss("same", lambda options: _sharded(options, "same"), same_tokens=True),
    "chunked_ce, gathered head": ShardedLoss("gathered", _gathered),
    "full logits, gathered head": ShardedLoss("gathered-full", _full, takes_chunk=False),
}
