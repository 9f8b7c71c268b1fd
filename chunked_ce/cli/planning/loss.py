"""What the loss takes, by path: the memory law of the chunked ones, and formulas for full logits."""

from __future__ import annotations

import functools
import math
from typing import Literal

from chunked_ce.cli.memory_models import compiled_logits, full_logits
from chunked_ce.cli.planning.run import DTYPES, Path, Run
from chunked_ce.light import torch
from chunked_ce.options import ChunkOptions
from chunked_ce.plan import MemoryPrediction, predict_memory
from chunked_ce.sharded.costs import predict_sharded_memory

__all__ = ["DEFAULTS", "EXACT", "LABELS", "loss_of", "options_of", "paths_of"]

LABELS: dict[Path, str] = {
    "full": "full logits",
    "compiled": "compiled full logits",
    "forward": "gradients in the forward",
    "backward": "gradients in the backward",
    "filtered": "filtered gradients",
    "sharded": "sharded head",
}
DEFAULTS: tuple[Path, ...] = ("forward", "backward")  # exact ones of ours that change nothing else, the fastest first
EXACT: tuple[Path, ...] = (*DEFAULTS, "sharded")


def paths_of(run: Run) -> tuple[Path, ...]:
    """The paths that the trainer's loss can take.

    Log-probabilities of tokens, which DPO sums, have gradients in the backward only. A filter has no effect on a
    teacher, on ids or on an adapter. A sharded head is for data-parallel ranks that train it.
    """
    of_loss = run.trainer != "dpo"
    special = run.teacher_width is not None or run.ids > 0 or run.adapter > 0
    shards = run.replicas > 1 and run.tensor == 1 and run.pipeline == 1 and run.trains_head and not special
    taken: dict[Path, bool] = {
        "full": True,
        "compiled": of_loss and not special and run.tensor == 1,
        "forward": of_loss,
        "backward": True,
        "filtered": of_loss and not special,
        "sharded": shards,
    }
    return tuple(path for path, is_taken in taken.items() if is_taken)


def options_of(run: Run, path: Path) -> ChunkOptions:
    """The options of a chunked path."""
    size: int | Literal["auto"] = run.chunk or "auto"
    if path == "filtered":
        return ChunkOptions(chunk_size=size, gradient_filter="auto")
    backward = path == "backward" or run.trainer == "dpo"
    return ChunkOptions(chunk_size=size, gradients="backward" if backward else "forward")


@functools.lru_cache(maxsize=4096)
def loss_of(run: Run, path: Path) -> MemoryPrediction:
    """Bytes by name that one call and its backward take, in each phase."""
    n, d, vocab = run.local_tokens, run.model.hidden, run.model.vocab
    dtype = DTYPES[run.dtype]
    head_dtype = torch.float32 if run.precision == "autocast" and run.trains_head else dtype
    rows = math.ceil(vocab / run.tensor)
    if path == "full":
        with_teacher = run.teacher_width is not None
        return full_logits(
            n,
            rows,
            d,
            dtype=dtype,
            train_input=run.train_input,
            train_head=run.trains_head,
            with_teacher=with_teacher,
        )
    if path == "compiled":
        return compiled_logits(n, rows, d, dtype=dtype, train_input=run.train_input, train_head=run.trains_head)
    options = options_of(run, path)
    if path == "sharded":
        ranks = run.replicas
        return predict_sharded_memory(n, vocab, d, ranks=ranks, dtype=dtype, options=options, device_type=run.device)
    return predict_memory(
        n,
        vocab,
        d,
        dtype=dtype,
        head_dtype=head_dtype,
        compute_dtype=dtype,
        num_counted=n - round(run.ignored * n),
        train_input=run.train_input,
        train_head=run.trains_head,
        options=options,
        device_type=run.device,
        ranks=run.tensor,
        teacher_hidden_size=run.teacher_width,
        num_ids=run.ids,
        adapter_rank=run.adapter,
    )
