"""Triton's interpreter truncates fp32 to bf16, where devices round to nearest: here it rounds too. It also multiplies
the bits of bf16 matrices as integers: here their values. That of Triton 3.6 rounds twice in an fma: here once, but for
the rare sum in float64 that is halfway between two fp32 numbers."""

import numpy as np
import torch

from chunked_ce.rows.backend import INTERPRETED


def round_as_devices_do():
    """For the rest of this process; nothing outside the interpreter."""
    if not INTERPRETED:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float
    builder = interpreter.InterpreterBuilder
    multiply = builder.create_dot

    def rounding(values, source, target, mode):
        if source == tl.float32 and target == tl.bfloat16:
            return torch.tensor(values).bfloat16().view(torch.uint16).numpy()
        return convert(values, source, target, mode)

    def widened(factor):
        if factor.dtype.scalar != tl.bfloat16:
            return factor
        values = torch.tensor(factor.data).view(torch.bfloat16).float().numpy()
        return interpreter.TensorHandle(values, tl.float32)

    def create_fma(self, left, right, added):
        total = left.data.astype(np.float64) * right.data + added.data
        return interpreter.TensorHandle(total.astype(added.data.dtype), added.dtype.scalar)

    def create_dot(self, left, right, total, *precision):
        return multiply(self, widened(left), widened(right), total, *precision)

    interpreter._convert_float = rounding
    builder.create_dot, builder.create_fma = create_dot, create_fma
