"""Other packages' losses as functions of hidden states (N, D), head (V, D) and targets (N,), and why one cannot run.

Nothing of a package is imported before its loss is asked for.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from chunked_ce.cli.synthetic_inputs import IGNORED

__all__ = [
    "cce",
    "deepspeed",
    "liger",
    "liger_cute",
    "liger_scaled",
    "no_cce_preset",
    "no_deepspeed",
    "no_liger_cute",
    "no_liger_scaled",
    "no_trl",
    "on_cuda",
    "quack",
    "trl",
]

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

_TRL_ENTRIES = 32768  # vocabulary entries in a tile, as TRL's own trainers ask for
_CUTE_TOKENS, _CUTE_ENTRIES = 128, 256  # Liger's SM90 kernels take multiples of these only


def deepspeed(chunk: int | None) -> Loss:
    from deepspeed.sequence.linear_cross_entropy import vocab_parallel_linear_cross_entropy

    return cast(Loss, vocab_parallel_linear_cross_entropy)


def liger(chunk: int | None) -> Loss:
    """Liger's own loss: products by torch, rows by a Triton kernel."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, weight, target: loss(weight, hidden, target)


def liger_cute(chunk: int | None) -> Loss:
    """Liger's loss for SM90, products included."""
    from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90 import liger_fused_linear_cross_entropy_sm90

    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        if len(target) % _CUTE_TOKENS or len(weight) % _CUTE_ENTRIES:
            raise ValueError(f"it takes multiples of {_CUTE_TOKENS} tokens and {_CUTE_ENTRIES} vocabulary entries only")
        return cast(Tensor, liger_fused_linear_cross_entropy_sm90(hidden, weight, target))

    return loss


def liger_scaled(chunk: int | None) -> Loss:
    """The mean of Liger's losses per token, which recompute logits in the backward: in torch, on SM90 with CuTe."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as function

    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        losses: Tensor = function.apply(hidden, weight, target)
        return losses.sum() / (target != IGNORED).sum()

    return loss


def trl(chunk: int | None) -> Loss:
    """The mean of TRL's log-probabilities per token, with ignored tokens left out where its trainers do so."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    def logprobs(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        results = ChunkedLogProbFunction.apply(hidden, weight, None, target, 1.0, _TRL_ENTRIES, None, 1.0, ())
        return cast(Tensor, results[0])

    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        counted = target != IGNORED
        if hidden.is_cuda:
            return -logprobs(hidden[counted], weight, target[counted]).mean()
        return -logprobs(hidden, weight, target.clamp(min=0)).masked_fill(~counted, 0).sum() / counted.sum()

    return loss


def cce(chunk: int | None, **keywords: object) -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    return functools.partial(linear_cross_entropy, **keywords)


def quack(chunk: int | None) -> Loss:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return functools.partial(chunked_linear_cross_entropy, **({"chunk_size": chunk} if chunk else {}))


# ---- why one cannot run: a line, None if it can ----


def no_deepspeed(device: str) -> str | None:
    os.environ.setdefault("DS_ACCELERATOR", device)  # without it DeepSpeed warns that it found no accelerator
    return _not_imported("deepspeed.sequence.linear_cross_entropy", "DeepSpeed with a linear_cross_entropy")


def no_trl(device: str) -> str | None:
    return _not_imported("trl.kernels.chunked_logprob", "TRL of version 1.15 or later")


def no_liger_scaled(device: str) -> str | None:
    return _not_imported(
        "liger_kernel.ops.fused_linear_scaled_cross_entropy", "Liger with a loss per token (0.8.5 or later)"
    )


def no_liger_cute(device: str) -> str | None:
    if device == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        return "it runs on GPUs of compute capability 9.0 only"
    return on_cuda("liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90", device)


def on_cuda(module: str, device: str) -> str | None:
    if device != "cuda":
        return "it runs on CUDA only"
    return _not_imported(module, module.partition(".")[0])


def no_cce_preset(device: str) -> str | None:
    reason = on_cuda("cut_cross_entropy", device)
    if reason is None and _not_imported("cut_cross_entropy.cce_utils", "presets"):
        reason = "this version of cut_cross_entropy has no presets"
    return reason


def _not_imported(module: str, what: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever the import of a peer raises, the peer cannot run
        return f"no {what}: {error}".splitlines()[0]
    return None
