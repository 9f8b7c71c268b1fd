"""Whether values may be read: not while operations are recorded to run later, and not where there are none."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["has_values", "is_readable", "is_recorded"]

_PROXY = torch._C._TorchDispatchModeKey.PROXY


def is_recorded() -> bool:
    """Whether a compiler or ``make_fx`` records what runs now."""
    return torch.compiler.is_compiling() or torch._C._get_dispatch_mode(_PROXY) is not None


def has_values(*sizes: int) -> bool:
    """Whether all ``sizes`` are numbers: in a graph for any size they are symbols."""
    if not torch.compiler.is_compiling():
        return not any(isinstance(size, torch.SymInt) for size in sizes)
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return all(has_static_value(size) for size in sizes)


def is_readable(tensor: Tensor) -> bool:
    """Whether the host may branch on values of ``tensor``: they are in its own memory, and it is no tracer."""
    return (
        tensor.device.type == "cpu"
        and not is_recorded()
        and type(tensor) in (Tensor, nn.Parameter)
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )
