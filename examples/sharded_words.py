"""A model whose words are sharded over ranks: each holds some rows of the weight that embedding and head share."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from model import Transformer
from torch import Tensor, nn

from chunked_ce import VocabShard


class SumOverRanks(torch.autograd.Function):
    """The sum over a group whose ranks all get the gradient of the whole sum, and so pass it on as it is."""

    @staticmethod
    def forward(ctx, share: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = share.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class ShardedEmbedding(nn.Module):
    """Each rank looks up the words that it holds; the sum over the ranks is complete."""

    def __init__(self, rows: nn.Parameter, shard: VocabShard):
        super().__init__()
        self.weight, self.shard = rows, shard  # (stop - start, D)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T) to (B, T, D)
        held = (self.shard.start <= tokens) & (tokens < self.shard.stop)
        found = F.embedding(torch.where(held, tokens - self.shard.start, 0), self.weight)
        return SumOverRanks.apply(found * held[..., None], self.shard.group)


def shard_words(model: Transformer, shard: VocabShard) -> nn.Parameter:
    """Keeps, and returns, this rank's rows of the weight that embedding and head share."""
    rows = nn.Parameter(model.embedding.weight.detach()[shard.start : shard.stop].clone())
    model.embedding, model.head.weight = ShardedEmbedding(rows, shard), rows
    return rows
