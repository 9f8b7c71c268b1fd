"""Who runs against whom: one training step of each, on the same problem.

A loss is a function of hidden states (N, D), head (V, D) and targets (N,); `train_step` runs it forward and backward.
`PRODUCTS` is the yardstick: the three matrix products that no exact loss can do without, 6 N V D operations.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from chunked_ce import ChunkOptions, linear_cross_entropy

__all__ = [
    "BACKWARD",
    "CONTESTANTS",
    "DEVICE",
    "DTYPES",
    "FORWARD",
    "FULL",
    "LOSSES",
    "PRODUCTS",
    "Problem",
    "train_step",
    "why_not",
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
IGNORED = -100

PRODUCTS = "three products"
FORWARD = "chunked_ce"
BACKWARD = "chunked_ce, backward way"
FULL = "full logits"
TORCH = "torch, 512 rows"
DEEPSPEED = "deepspeed"


def products(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The logits and the two products with a gradient of their shape, as anyone would write them."""
    with torch.no_grad():
        logits = hidden @ weight.t()
        return logits @ weight, logits.t() @ hidden


def full_logits(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), target)


def torch_chunked(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=512, chunking_method=None)
    return F.linear_cross_entropy(hidden, weight, target, options=options)


def deepspeed_loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from deepspeed.sequence.linear_cross_entropy import vocab_parallel_linear_cross_entropy

    return vocab_parallel_linear_cross_entropy(hidden, weight, target)


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    FORWARD: linear_cross_entropy,
    BACKWARD: functools.partial(linear_cross_entropy, options=ChunkOptions(gradients="backward")),
    FULL: full_logits,
    TORCH: torch_chunked,
    DEEPSPEED: deepspeed_loss,
}
CONTESTANTS = (PRODUCTS, *LOSSES)


def why_not(contestant: str) -> str | None:
    """Why a contestant cannot run here; None if it can."""
    if contestant == TORCH and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"torch {torch.__version__} has no chunked linear_cross_entropy"
    if contestant == DEEPSPEED:
        os.environ.setdefault("DS_ACCELERATOR", DEVICE)  # or it warns that it found none
        try:
            importlib.import_module("deepspeed.sequence.linear_cross_entropy")
        except ImportError as error:
            return f"no DeepSpeed that has a linear_cross_entropy: {error}"
    return None


class Problem(NamedTuple):
    """The leaves of a language model's loss."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    target: Tensor  # (N,)

    @classmethod
    def random(
        cls,
        num_tokens: int,
        hidden_size: int,
        vocab_size: int,
        dtype: torch.dtype,
        *,
        ignored: float = 0.0,  # the share of tokens that do not count
        device: str = DEVICE,
    ) -> Problem:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        generator = torch.Generator(device).manual_seed(0)
        hidden = normal(num_tokens, hidden_size)
        weight = normal(vocab_size, hidden_size).mul_(0.02)
        target = torch.randint(vocab_size, (num_tokens,), generator=generator, device=device)
        order = torch.randperm(num_tokens, generator=generator, device=device)
        target[order[: round(ignored * num_tokens)]] = IGNORED
        return cls(hidden.requires_grad_(), weight.requires_grad_(), target)


def train_step(contestant: str, problem: Problem) -> None:
    """Forward and backward, gradients into fresh memory, and all of it done on the device when it returns."""
    hidden, weight, target = problem
    if contestant == PRODUCTS:
        products(hidden, weight)
    else:
        LOSSES[contestant](hidden, weight, target).backward()
        hidden.grad = weight.grad = None
    if hidden.is_cuda:
        torch.cuda.synchronize()
