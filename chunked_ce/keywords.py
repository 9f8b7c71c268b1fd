"""The keywords that public functions share, as types: their overloads name these instead of repeating signatures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict

from torch import Tensor
from typing_extensions import TypeVar

from chunked_ce.options import ChunkOptions
from chunked_ce.parallel.vocab import VocabShard
from chunked_ce.torch_options import TorchOptions

__all__ = [
    "CrossEntropyKeywords",
    "DivergenceKeywords",
    "LinearCrossEntropyKeywords",
    "LogprobKeywords",
    "LossModuleKeywords",
    "PerToken",
    "PerTokenNumbers",
    "Reduction",
    "Tokens",
]

PerToken = Tensor | Sequence[Tensor]  # of one depth, or a list of several depths
PerTokenNumbers = Tensor | Sequence[Tensor | float]  # a number in the list stands for a tensor of equal ones
Reduction = Literal["mean", "sum", "none"]

Tokens = TypeVar("Tokens", Tensor, list[Tensor], Sequence[Tensor])
"""A result per token is a tensor for a tensor, and a list for a list of depths."""


class _Logits(TypedDict, total=False):
    """How logits are made and scaled, and where they are computed."""

    softcap: float | None
    logit_scale: float
    vocab: VocabShard | None


class _CrossEntropy(TypedDict, total=False):
    """The terms of a cross-entropy."""

    weight: Tensor | None
    label_smoothing: float
    z_loss: float


class _Depths(TypedDict, total=False):
    """A head's tensors, per token a tensor or a list of depths."""

    linear_bias: Tensor | None
    temperature: float | PerTokenNumbers
    linear_adapter: tuple[PerToken, Tensor] | None


class _Weights(TypedDict, total=False):
    """What weighs the tokens of a loss over one depth."""

    ignore_index: int
    token_weight: Tensor | None
    num_tokens: float | Tensor | None
    temperature: float | Tensor


class LinearCrossEntropyKeywords(_Logits, _CrossEntropy, _Depths, total=False):
    """Of `chunked_ce.linear_cross_entropy`, but ``reduction`` and ``return_stats``."""

    options: ChunkOptions | TorchOptions | None
    ignore_index: int | None
    token_weight: PerTokenNumbers | None
    num_tokens: float | Tensor | None


class CrossEntropyKeywords(_Logits, _CrossEntropy, _Weights, total=False):
    """Of `chunked_ce.cross_entropy`, but ``return_stats``."""

    options: ChunkOptions | None
    reduction: Reduction


class DivergenceKeywords(_Logits, _Weights, total=False):
    """Of `chunked_ce.linear_divergence`, but ``return_stats``."""

    options: ChunkOptions | None
    target: Tensor | None
    beta: float
    linear_bias: Tensor | None
    reduction: Reduction
    linear_adapter: tuple[Tensor, Tensor] | None


class LogprobKeywords(_Logits, _Depths, total=False):
    """Of `chunked_ce.linear_logprobs`, but ``return_entropy``."""

    options: ChunkOptions | None
    ignore_index: int


class LossModuleKeywords(_Logits, _CrossEntropy, total=False):
    """Of `chunked_ce.LinearCrossEntropyLoss`, but ``reduction`` and ``return_stats``."""

    options: ChunkOptions | TorchOptions | None
    ignore_index: int | None
    temperature: float
