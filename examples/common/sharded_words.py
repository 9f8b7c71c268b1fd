"""Shards the weight that embedding and head share: each rank holds some rows of the vocabulary."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from chunked_ce import VocabShard
from common.model import Transformer


class SumOverRanks(torch.autograd.Function):
    """The sum over a group. Each rank gets the gradient of the whole sum, so the backward passes it on unchanged."""

    @staticmethod
    def forward(ctx, share: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = share.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class ShardedEmbedding(nn.Module):
    """Each rank looks up the tokens whose rows it holds; the sum over the ranks is the embedding."""

    def __init__(self, rows: nn.Parameter, shard: VocabShard):
        super().__init__()
        self.weight, self.shard = rows, shard  # (stop - start, D)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T) to (B, T, D)
        held = (self.shard.start <= tokens) & (tokens < self.shard.stop)
        found = F.embedding(torch.where(held, tokens - self.shard.start, 0), self.weight)
        return SumOverRanks.apply(found * held[..., None], self.shard.group)


def shard_words(model: Transformer, shard: VocabShard) -> nn.Parameter:
    """Keeps only this rank's rows of the weight that embedding and head share; returns them."""
    rows = nn.Parameter(model.embedding.weight.detach()[shard.start : shard.stop].clone())
    model.embedding, model.head.weight = ShardedEmbedding(rows, shard), rows
    return rows
