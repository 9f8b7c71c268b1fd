"""Triton's interpreter truncates fp32 to bf16, where devices round to nearest: here it rounds too. It also multiplies
the bits of bf16 matrices as integers: here their values. That of Triton 3.6 rounds twice in an fma: here once, but for
the rare sum in float64 that is halfway between two fp32 numbers. It replaces the language's functions anew for every
call of a device function, which takes a third of its time: here once for each launch."""

import functools

import numpy as np
import torch

from chunked_ce.rows.backend import INTERPRETED


@functools.cache
def round_as_devices_do():
    """For the rest of this process, however often it is called; nothing outside the interpreter."""
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
    interpreter._patch_lang = patching_once(interpreter._patch_lang)


def patching_once(patch):
    """``patch``, Triton's replacement of the language that a function sees, done once between two restorations."""
    import triton.language as tl
    from triton.runtime.interpreter import _LangPatchScope

    patched = set()

    @functools.cache
    def languages(fn):
        seen = {id(value) for value in fn.__globals__.values()}
        return frozenset({id(tl), id(tl.core)} & seen)

    class Launch(_LangPatchScope):
        def restore(self):
            patched.clear()
            super().restore()

    def patch_lang(fn):
        scope = Launch()
        if not languages(fn) <= patched:
            patched.update(languages(fn))
            scope._changes = patch(fn)._changes
        return scope

    return patch_lang
