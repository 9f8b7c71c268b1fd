"""Triton's interpreter truncates fp32 to bf16, where devices round to nearest: here it rounds too."""

import torch

from chunked_ce.rows.backend import INTERPRETED


def round_as_devices_do():
    """For the rest of this process; nothing outside the interpreter."""
    if not INTERPRETED:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounding(values, source, target, mode):
        if source == tl.float32 and target == tl.bfloat16:
            return torch.tensor(values).bfloat16().view(torch.uint16).numpy()
        return convert(values, source, target, mode)

    interpreter._convert_float = rounding
