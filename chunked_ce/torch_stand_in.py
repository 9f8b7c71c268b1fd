"""The names of torch that planning needs, where torch is not imported: dtypes with their sizes, and types that no value
has.

>>> promote_types(bfloat16, float16), finfo(bfloat16).eps == 2**-7
(torch.float32, True)
"""

from __future__ import annotations

import dataclasses
import os
from types import SimpleNamespace
from typing import NamedTuple

__all__ = [
    "SymFloat",
    "SymInt",
    "Tensor",
    "bfloat16",
    "bool",
    "compiler",
    "cuda",
    "device",
    "dtype",
    "finfo",
    "float16",
    "float32",
    "float64",
    "get_num_threads",
    "int8",
    "int16",
    "int32",
    "int64",
    "promote_types",
    "strided",
    "uint8",
    "version",
]


@dataclasses.dataclass(frozen=True)
class dtype:
    """A dtype by its name; equal to none of torch's."""

    name: str
    itemsize: int

    def __repr__(self) -> str:
        return f"torch.{self.name}"


float64, float32 = dtype("float64", 8), dtype("float32", 4)
bfloat16, float16 = dtype("bfloat16", 2), dtype("float16", 2)
int64, int32, int16 = dtype("int64", 8), dtype("int32", 4), dtype("int16", 2)
int8, uint8, bool = dtype("int8", 1), dtype("uint8", 1), dtype("bool", 1)

_EPSILON = {float64: 2.0**-52, float32: 2.0**-23, bfloat16: 2.0**-7, float16: 2.0**-10}


class _FloatInfo(NamedTuple):
    eps: float


def finfo(type: dtype) -> _FloatInfo:
    """The machine epsilon of a floating-point dtype."""
    return _FloatInfo(_EPSILON[type])


def promote_types(type1: dtype, type2: dtype) -> dtype:
    """The narrowest floating-point dtype that holds both."""
    if type1 == type2:
        return type1
    if type1.itemsize != type2.itemsize:
        return max(type1, type2, key=lambda one: one.itemsize)
    return float32  # bf16 and fp16


def get_num_threads() -> int:
    """The threads that torch would take: those of OMP_NUM_THREADS, or one for each core."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() and int(asked) else os.cpu_count() or 1


class device:
    """A device by its type."""

    def __init__(self, type: str) -> None:
        self.type = type


class Tensor:
    """There are no tensors."""


class SymInt:
    """There are no symbolic numbers."""


class SymFloat:
    """There are no symbolic numbers."""


strided = "strided"
version = SimpleNamespace(hip=None)  # plans are for NVIDIA's devices
cuda = SimpleNamespace(is_initialized=lambda: False)
compiler = SimpleNamespace(is_compiling=lambda: False)
