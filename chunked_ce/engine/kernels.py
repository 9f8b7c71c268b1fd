"""Which row kernels run: those in Triton where they can, else those in torch. Both have one interface.

`chunked_ce.engine.rows` documents it: ``statistics``, ``shard_statistics``, ``statistics_and_gradients_``,
``logit_gradients``, ``rows_in_flight`` and ``scale_into``.
"""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType

import torch

from chunked_ce.engine import rows
from chunked_ce.engine.tracing import assume_constant

__all__ = ["INTERPRETED", "row_kernels", "triton_runs", "why_not_triton"]

# Triton reads it when a kernel is defined: set later it changes nothing.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def row_kernels(backend: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The row kernels for products in ``dtype``; ``backend`` is that of `chunked_ce.ChunkOptions`.

    In the interpreter, which is for tests, ``"auto"`` stays with torch.
    """
    if backend == "torch" or not triton_runs(device, dtype) or (backend == "auto" and device.type != "cuda"):
        return rows
    return importlib.import_module("chunked_ce.engine.triton_rows")


def triton_runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the Triton kernels can run on products in ``dtype``."""
    return why_not_triton(device, dtype) is None


@assume_constant
def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """What keeps the Triton kernels from products in ``dtype``, None if nothing does."""
    if dtype not in _DTYPES:
        return f"it has no {dtype}"
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        return f"it runs on CUDA devices (on a CPU in its interpreter: TRITON_INTERPRET=1), not on {device.type!r}"
    return _import_error()


@functools.cache
def _import_error() -> str | None:
    try:
        importlib.import_module("triton")
    except Exception as error:  # a broken installation raises anything
        return f"triton cannot be imported: {error}"
    return None
