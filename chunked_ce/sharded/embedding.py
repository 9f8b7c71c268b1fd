"""`ShardedEmbedding`: an embedding of which this rank holds some rows, tied to a sharded head."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from chunked_ce.lazy.classes import joined, without
from chunked_ce.sharded.ddp import check_not_averaged
from chunked_ce.sharded.deepspeed import check_out_of_sight
from chunked_ce.sharded.fsdp_units import check_units, compute_dtype, refuse_management
from chunked_ce.sharded.gradients import mark
from chunked_ce.sharded.lookup import lookup
from chunked_ce.sharded.rows import shardings_of
from chunked_ce.tracing import not_compiled

__all__ = ["ShardedEmbedding", "check_can_shard"]

_REFUSED = {
    "max_norm": "renormalises rows in place, which other ranks hold",
    "scale_grad_by_freq": "needs each token's number of uses on all ranks",
    "sparse": "its gradient would be sparse, and that of the head is not",
}


class ShardedEmbedding(nn.Embedding):
    """An ``nn.Embedding`` whose ranks hold different tokens and different rows of its weight."""

    @not_compiled
    def forward(self, input: Tensor) -> Tensor:
        sharding = shardings_of(self)["weight"]
        mark(self)
        check_not_averaged(self)
        check_units(self)
        found = lookup(sharding.local(self.weight), input, sharding.vocab, self.padding_idx)
        values: Tensor = found.to(compute_dtype(self) or found.dtype)
        return values

    def _fill_padding_idx_with_zero(self) -> None:
        """Part of ``reset_parameters``: the row of ``padding_idx`` is on one rank."""
        vocab = shardings_of(self)["weight"].vocab
        if self.padding_idx is not None and vocab.start <= self.padding_idx < vocab.stop:
            with torch.no_grad():
                rows = getattr(self.weight, "_local_tensor", self.weight)
                rows[self.padding_idx - vocab.start].zero_()

    def __setattr__(self, name: str, value: Any) -> None:
        refuse_management(name)
        super().__setattr__(name, value)

    def set_deepspeed_parallelism(self, *_args: Any) -> None:
        check_out_of_sight(self)

    @classmethod
    def take(cls, embedding: nn.Embedding) -> None:
        # Behind a subclass, which may scale what its ``super().forward`` looks up.
        plain = type(embedding) is nn.Embedding
        embedding.__class__ = cls if plain else joined(type(embedding), cls)

    @classmethod
    def release(cls, embedding: nn.Embedding) -> None:
        embedding.__class__ = without(type(embedding), cls, nn.Embedding)


def check_can_shard(name: str, embedding: nn.Embedding) -> None:
    """Raise ``ValueError`` for an embedding that does something that is not done across ranks."""
    for keyword, why in _REFUSED.items():
        value = getattr(embedding, keyword)
        if value:
            raise ValueError(f"the embedding {name!r} is tied to the head, and its {keyword}={value!r} {why}")
    if "forward" in vars(embedding) or not _looks_up_as_its_base_does(embedding):
        raise ValueError(
            f"the embedding {name!r} is tied to the head, and {type(embedding).__name__} has a forward that does not "
            "look its tokens up by super().forward(input): only what that returns can come from other ranks"
        )


class _Probe(nn.Embedding):
    """Stands behind an embedding in the place of `ShardedEmbedding`, and sees whether it is asked."""

    def forward(self, input: Tensor) -> Tensor:
        vars(self)["was_asked"] = True
        return super().forward(input)


def _looks_up_as_its_base_does(embedding: nn.Embedding) -> bool:
    if type(embedding).forward is nn.Embedding.forward:
        return True
    probe = copy.copy(embedding)
    probe.__class__ = joined(type(embedding), _Probe)
    try:
        with torch.no_grad():
            probe.forward(torch.empty(0, dtype=torch.long, device=embedding.weight.device))
    except Exception:  # it takes other arguments, or cannot do without tokens
        return False
    return "was_asked" in vars(probe)
