"""A small causal transformer, and the two losses that the examples compare."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chunked_ce import linear_cross_entropy


@dataclass(frozen=True)
class ModelConfig:
    vocab: int = 131_072
    width: int = 128
    depth: int = 4
    heads: int = 4
    context: int = 512

    def __post_init__(self):
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, got width {self.width} and heads {self.heads}")


def chunked_loss(
    hidden: Tensor,  # (..., D)
    head: nn.Linear,  # D to V
    targets: Tensor,  # (...), -100 where a token is ignored
) -> Tensor:
    # After LMHead.shard, the weight holds this rank's rows of the vocabulary.
    return linear_cross_entropy(hidden, head.weight, targets, vocab=getattr(head, "vocab", None), reduction="sum")


def full_loss(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """The same sum, from all logits (N, V) in fp32."""
    logits = head(hidden).float()
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum")


LOSSES: dict[str, Callable[[Tensor, nn.Linear, Tensor], Tensor]] = {"chunked": chunked_loss, "full": full_loss}


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        width, self.heads = config.width, config.heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D)
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T, D / heads)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """Maps tokens (B, T) to hidden states (B, T, D); `head` shares its weight with the embedding."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.scale = config.width**0.5
        self.embedding = nn.Embedding(config.vocab, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab, bias=False)
        self.head.weight = self.embedding.weight
        self.initialize(config.width)

    def initialize(self, width: int) -> None:
        """Makes the first steps smooth: blocks begin as the identity, and hidden states are large.

        The model first learns how frequent each token is, through one direction of the hidden states. The larger
        they are, the smaller the learning rate at which the head learns it.
        """
        nn.init.normal_(self.embedding.weight, std=1 / width)
        nn.init.normal_(self.positions.weight, std=1 / width)
        nn.init.constant_(self.norm.weight, 5.0)
        for block in self.blocks:
            for layer in (block.qkv, block.mlp[0]):
                nn.init.normal_(layer.weight, std=0.02)
            for layer in (block.out, block.mlp[-1]):
                nn.init.zeros_(layer.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) * self.scale
        x = x + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class LanguageModel(Transformer):
    """Maps tokens and targets, both (B, T), to the sum of the loss over targets that are not ignored.

    The loss is part of the forward because ZeRO-3 gathers the head's weight only there.
    """

    def __init__(self, config: ModelConfig, loss: str = "chunked"):
        super().__init__(config)
        self.loss = LOSSES[loss]

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return self.loss(super().forward(tokens), self.head, targets)
