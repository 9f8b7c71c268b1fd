"""Choose the row kernels: Triton's where they can run, else torch's. Both have the same interface.

`chunked_ce.rows.torch_rows` documents it: ``statistics``, ``shard_statistics``, ``statistics_and_gradients_``,
``logit_gradients``, ``rows_in_flight`` and ``scale_into``.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Sequence
from types import ModuleType

import torch

from chunked_ce.rows import torch_rows
from chunked_ce.rows.statistics import STATISTICS
from chunked_ce.tracing import assume_constant

__all__ = ["INTERPRETED", "row_kernels", "triton_runs", "why_not_triton"]

# Triton reads the variable when a kernel is defined: setting it later changes nothing.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def row_kernels(backend: str, device: torch.device, dtype: torch.dtype, names: Sequence[str] = ()) -> ModuleType:
    """The row kernels for products in ``dtype`` and the statistics ``names``; ``backend`` is the option.

    Torch computes statistics that the Triton kernels do not. In the interpreter, a test tool, ``"auto"`` is torch.
    """
    if backend == "torch" or not triton_runs(device, dtype) or (backend == "auto" and device.type != "cuda"):
        return torch_rows
    if not all(STATISTICS[name].in_triton for name in names):
        return torch_rows
    return importlib.import_module("chunked_ce.rows.triton_rows")


def triton_runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the Triton kernels can run on products in ``dtype``."""
    return why_not_triton(device, dtype) is None


@assume_constant
def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot run on products in ``dtype``; None if they can."""
    if dtype not in _DTYPES:
        return f"it has no {dtype}"
    if device.type == "cuda" and torch.version.hip:
        return "its kernels are written for NVIDIA's devices, and this is ROCm"
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        return f"it runs on CUDA devices (on a CPU in its interpreter: TRITON_INTERPRET=1), not on {device.type!r}"
    return _import_error()


@functools.cache
def _import_error() -> str | None:
    try:
        importlib.import_module("triton")
    except Exception as error:  # a broken installation may raise any exception
        return f"triton cannot be imported: {error}"
    return None
