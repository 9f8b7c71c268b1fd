"""`ChunkOptions`: how the work is cut into chunks."""

from __future__ import annotations

import dataclasses
from typing import Literal

from chunked_ce.arguments import check_flag, described, integer, is_integer, is_number, is_one_of
from chunked_ce.light import torch

__all__ = ["ChunkOptions"]

_LOGITS_DTYPES = (torch.float32,)
_ACCUMULATE_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
_NAMES = {
    "gradients": ("auto", "forward", "backward"),
    "ignored": ("auto", "drop", "mask"),
    "backend": ("auto", "torch", "triton"),
}


@dataclasses.dataclass(frozen=True)
class ChunkOptions:
    """How the chunked loss spends memory and time; except for ``gradient_filter``, no option changes the result
    beyond rounding.

    Raises ``ValueError`` or ``TypeError`` for a value that is not allowed.

    >>> ChunkOptions(chunk_size=512, gradients="backward").chunk_size
    512
    >>> ChunkOptions(chunk_size=0)
    Traceback (most recent call last):
        ...
    ValueError: chunk_size must be 'auto' or an integer >= 1, was 0
    """

    chunk_size: int | Literal["auto"] = "auto"
    """Tokens in a chunk; ``"auto"`` takes as many as ``memory_budget`` allows, in chunks of equal size."""

    memory_budget: int | None = None
    """Bytes that a chunk's logits may take; None lets `chunked_ce.plan` choose by device, vocabulary and width."""

    gradients: Literal["auto", "forward", "backward"] = "auto"
    """When gradients are computed: with the loss (6 N V D operations, sums and means only) or in the backward
    from recomputed logits (8 N V D, the least memory); ``"auto"`` takes ``"forward"`` where it can, unless
    ``accumulate_into`` or ``invariant`` requires ``"backward"``."""

    accumulate_dtype: torch.dtype = torch.float32
    """The dtype in which gradients of the head are summed over chunks, if it is wider than the products' dtype."""

    logits_dtype: torch.dtype | None = None
    """None: logits are rounded to the products' dtype, as plain code rounds them. ``torch.float32``: bf16 and fp16
    factors give logits in fp32, which have its range, and whose log-probabilities have errors of about 3e-6 instead of
    6e-2 (bf16) or 6e-3 (fp16). The gradients of the logits stay in the products' dtype. fp32 and fp64 products are as
    they were. On a CPU, which has no such product, the factors are cast to fp32, block by block: it takes as long as in
    fp32."""

    ignored: Literal["auto", "drop", "mask"] = "auto"
    """What becomes of ignored tokens; they contribute exactly 0 either way. ``"drop"`` leaves them out before the first
    product, so that time and memory follow the tokens that count. On an accelerator the host then waits once per loss,
    to learn which tokens count, unless it knows: targets on the host, or counted by `TokenMean.over` before.
    ``"mask"`` keeps them in the products and waits for nothing. ``"auto"`` drops them, except on an accelerator while a
    CUDA graph is captured or a compiler records, or where logits exist already and no product is saved."""

    gradient_filter: float | Literal["auto"] | None = None
    """Vocabulary entries, other than targets, whose probability is at most this at every token of a chunk enter the
    gradients as a few averages; None is exact. The threshold of ``"auto"`` (see `filter_threshold`) keeps the error
    measured on trained language models below the rounding of the products' dtype, which is no guarantee. On an
    accelerator the host waits for two numbers once per chunk, while the device is at work on the chunk."""

    backend: Literal["auto", "torch", "triton"] = "auto"
    """Which row kernels run: ``"auto"`` takes Triton's on CUDA devices (fp32, bf16 and fp16, if it is installed), else
    torch's; ``"triton"`` raises ``ValueError`` in a call where Triton cannot run."""

    accumulate_into: Literal["grad", "main_grad"] | None = None
    """Where recomputation adds the head's gradient, block by block, instead of returning it to autograd: to the
    ``grad`` of the head's weight once there is one, or to its ``main_grad``, which may be wider. No second gradient
    exists; but hooks on the weight's gradient do not run, so it does not work under an engine that relies on them
    (DDP, FSDP, ZeRO). Only a backward that accumulates into the weight adds to it; ``torch.autograd.grad`` returns
    the gradients that it is asked for. ``"grad"`` still returns the gradient in the first step, with a sparse
    ``grad``, for a weight that is not a leaf, under ``create_graph=True`` and in compiled code; ``"main_grad"`` raises
    where it is not supported."""

    invariant: bool = False
    """Batch-invariant statistics: the bits of a token's log-probability, and of each other statistic, depend on its
    hidden state and the head only, not on the batch, its place in it, the mask or other tokens. On the CPU, with one
    number of threads; not with a sharded vocabulary, a teacher, a support or logits that exist, nor under
    ``torch.func``, which raise ``ValueError``. Gradients are computed in the backward; ``chunk_size`` and
    ``memory_budget`` concern these only. docs/numerics.md says what it costs."""

    def __post_init__(self) -> None:
        if not is_one_of(self.chunk_size, ("auto",)):
            self._set("chunk_size", _at_least_1("chunk_size", self.chunk_size, "'auto' or an integer"))
        if self.memory_budget is not None:
            self._set("memory_budget", _at_least_1("memory_budget", self.memory_budget, "None or a number of bytes"))
        for name, allowed in _NAMES.items():
            if not is_one_of(getattr(self, name), allowed):
                raise ValueError(f"{name} must be {_either(allowed)}, was {described(getattr(self, name))}")
        if not _is_dtype(self.accumulate_dtype, _ACCUMULATE_DTYPES):
            dtypes = ", ".join(map(str, _ACCUMULATE_DTYPES))
            raise ValueError(f"accumulate_dtype must be one of {dtypes}, was {described(self.accumulate_dtype)}")
        if self.logits_dtype is not None and not _is_dtype(self.logits_dtype, _LOGITS_DTYPES):
            raise ValueError(f"logits_dtype must be None or torch.float32, was {described(self.logits_dtype)}")
        if self.gradient_filter is not None and not is_one_of(self.gradient_filter, ("auto",)):
            self._set("gradient_filter", _probability("gradient_filter", self.gradient_filter))
        into = self.accumulate_into
        if into is not None and not is_one_of(into, ("grad", "main_grad")):
            raise ValueError(f"accumulate_into must be None, 'grad' or 'main_grad', was {described(into)}")
        if into is not None and self.gradients == "forward":
            raise ValueError(f"accumulate_into={into!r} needs gradients 'backward' or 'auto', was 'forward'")

        check_flag("invariant", self.invariant)
        if self.invariant and self.gradients == "forward":
            raise ValueError("invariant=True needs gradients 'backward' or 'auto', was 'forward'")
        if self.invariant and self.backend == "triton":
            raise ValueError("invariant=True needs backend 'auto' or 'torch', was 'triton'")

    def _set(self, name: str, value: float) -> None:
        """Store a plain Python number, which can be hashed, pickled and compiled."""
        object.__setattr__(self, name, value)

    @property
    def in_backward(self) -> bool:
        """Whether gradients are to be computed in the backward."""
        return self.gradients == "backward" or self.accumulate_into is not None or self.invariant

    def filter_threshold(self, dtype: torch.dtype) -> float | None:
        """The largest probability of a dropped vocabulary entry for products in ``dtype``, None if none is dropped.

        ``"auto"`` is 2**-7 of the dtype's machine epsilon.

        >>> ChunkOptions(gradient_filter="auto").filter_threshold(torch.bfloat16) == 2**-14
        True
        """
        if self.gradient_filter == "auto":
            return torch.finfo(dtype).eps * 2**-7
        return self.gradient_filter


def _is_dtype(value: object, allowed: tuple[torch.dtype, ...]) -> bool:
    return isinstance(value, torch.dtype) and value in allowed


def _at_least_1(name: str, value: object, kind: str) -> int:
    if not is_integer(value) or value < 1:
        raise ValueError(f"{name} must be {kind} >= 1, was {described(value)}")
    return integer(name, value, kind)


def _probability(name: str, value: object) -> float:
    if not is_number(value) or not 0 <= value < 1:
        raise ValueError(f"{name} must be None, 'auto' or in [0, 1), was {described(value)}")
    return float(value)


def _either(names: tuple[str, ...]) -> str:
    return f"{', '.join(map(repr, names[:-1]))} or {names[-1]!r}"
