"""Where statistics are not batch-invariant, ``ChunkOptions(invariant=True)`` is refused."""

from __future__ import annotations

from typing import Any

from chunked_ce.objectives import Teacher
from chunked_ce.options import ChunkOptions
from chunked_ce.parallel.vocab import VocabShard

__all__ = ["check_invariance"]


def check_invariance(
    options: ChunkOptions,
    tensors: dict[str, Any],  # of a call, by name
    vocab: VocabShard | None,
    teacher: Teacher | None,
    transformed: bool,  # by `torch.func`
) -> None:
    """Raise ``ValueError`` if the options ask for batch-invariant statistics that are not proven to be so."""
    if not options.invariant:
        return
    device = tensors["target"].device
    refused = {
        f"target on {device}": device.type != "cpu",
        "logits that exist": "linear_weight" not in tensors,
        "vocab, a shard of the vocabulary": vocab is not None,
        "a teacher": teacher is not None,
        "a support": tensors.get("support") is not None,
        "a transform of torch.func or forward mode": transformed,
    }
    for what, given in refused.items():
        if given:
            raise ValueError(
                "options.invariant=True is proven for hidden states and a whole head on the CPU, outside of "
                f"torch.func, was given with {what}: use invariant=False"
            )
