"""The exponential of many numbers."""

from __future__ import annotations

import math

from torch import Tensor

__all__ = ["exp_"]

_LOG2_E = math.log2(math.e)


def exp_(values: Tensor) -> Tensor:
    """``exp(values)`` in place, to a relative error of about ``|values|`` roundings, as plain softmax has it.

    By way of ``exp2``: with MKL, torch's ``exp`` takes 2.8 times as long, and another 37 times as long where the result
    is denormal (below -87 in fp32), 12 times where it is 0.
    """
    return values.mul_(_LOG2_E).exp2_()
