"""`ChunkOptions`: how the work is cut into chunks."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch

__all__ = ["ChunkOptions"]

_ACCUMULATE_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class ChunkOptions:
    """How the chunked loss spends memory and time; but for ``gradient_filter``, the result does not depend on it
    beyond rounding.

    Raises ``ValueError`` or ``TypeError`` when it is made with a value that is not allowed.

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
    ``accumulate_into`` asks for the other."""

    accumulate_dtype: torch.dtype = torch.float32
    """What gradients of the head are summed in over chunks, where it is wider than the products' dtype."""

    gradient_filter: float | Literal["auto"] | None = None
    """Words whose probability is at most this at every token of a chunk take part in the gradients as one average
    word; None is exact. ``"auto"`` (see `filter_threshold`) is chosen so that the error measured on trained language
    models stays below the rounding of the products' dtype, which is no guarantee. On an accelerator the host waits for
    the device once per chunk."""

    backend: Literal["auto", "torch", "triton"] = "auto"
    """Which row kernels run: ``"auto"`` takes Triton's on CUDA devices (fp32, bf16 and fp16, if it is installed), else
    torch's; ``"triton"`` raises ``ValueError`` in a call where Triton cannot run."""

    accumulate_into: Literal["grad", "main_grad"] | None = None
    """Where the backward way adds the head's gradient, block by block, instead of returning it to autograd: into the
    ``grad`` of the head's weight once there is one, or into its ``main_grad``, which may be wider. A second gradient
    never exists; but hooks on the weight's gradient do not run, so an engine that relies on them (DDP, FSDP, ZeRO)
    must not be given it. Only a backward that accumulates into the weight adds to it: ``torch.autograd.grad`` returns
    what it is asked for. ``"grad"`` takes the usual way in the first step, with a sparse ``grad``, for a weight that is
    not a leaf, under ``create_graph=True`` and in compiled code; ``"main_grad"`` raises where it cannot be served."""

    def __post_init__(self) -> None:
        if self.chunk_size != "auto" and not _is_integer(self.chunk_size, 1):
            raise ValueError(f"chunk_size must be 'auto' or an integer >= 1, was {self.chunk_size!r}")
        if self.memory_budget is not None and not _is_integer(self.memory_budget, 1):
            raise ValueError(f"memory_budget must be None or a number of bytes >= 1, was {self.memory_budget!r}")
        if self.gradients not in ("auto", "forward", "backward"):
            raise ValueError(f"gradients must be 'auto', 'forward' or 'backward', was {self.gradients!r}")
        if self.accumulate_dtype not in _ACCUMULATE_DTYPES:
            allowed = ", ".join(map(str, _ACCUMULATE_DTYPES))
            raise ValueError(f"accumulate_dtype must be one of {allowed}, was {self.accumulate_dtype!r}")
        if self.gradient_filter not in (None, "auto") and not _is_probability(self.gradient_filter):
            raise ValueError(f"gradient_filter must be None, 'auto' or in [0, 1), was {self.gradient_filter!r}")
        if self.accumulate_into not in (None, "grad", "main_grad"):
            raise ValueError(f"accumulate_into must be None, 'grad' or 'main_grad', was {self.accumulate_into!r}")
        if self.accumulate_into is not None and self.gradients == "forward":
            raise ValueError(
                f"accumulate_into={self.accumulate_into!r} needs gradients 'backward' or 'auto', was 'forward'"
            )
        if self.backend not in ("auto", "torch", "triton"):
            raise ValueError(f"backend must be 'auto', 'torch' or 'triton', was {self.backend!r}")

    @property
    def in_backward(self) -> bool:
        """Whether gradients are asked for in the backward."""
        return self.gradients == "backward" or self.accumulate_into is not None

    def filter_threshold(self, dtype: torch.dtype) -> float | None:
        """The largest probability of a dropped word for products in ``dtype``, None if none is dropped.

        ``"auto"`` is 2**-7 of the dtype's machine epsilon.

        >>> ChunkOptions(gradient_filter="auto").filter_threshold(torch.bfloat16) == 2**-14
        True
        """
        if self.gradient_filter == "auto":
            return torch.finfo(dtype).eps * 2**-7
        return None if self.gradient_filter is None else float(self.gradient_filter)


def _is_probability(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1


def _is_integer(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
