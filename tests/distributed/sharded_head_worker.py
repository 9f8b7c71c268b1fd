"""Models with a sharded head on several ranks, and the same models on one process."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WORDS, WIDTH = 11, 6


class Scaled(nn.Embedding):
    """As Gemma's: what is looked up is multiplied."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3.0


class LanguageModel(nn.Module):
    def __init__(self, tied: bool = True, bias: bool = False, embedding: type = nn.Embedding, words: int = WORDS):
        super().__init__()
        torch.manual_seed(0)
        self.embed = embedding(words, WIDTH, padding_idx=1)
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
        self.lm_head = nn.Linear(WIDTH, words, bias=bias)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.body(self.embed(ids)))


def ids_of(rank: int, number: int) -> Tensor:
    return torch.randint(WORDS, (1, number), generator=torch.Generator().manual_seed(rank))
