"""The modules that Liger's losses are: options are given when one is made, tensors at each call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from chunked_ce.arguments import check_flag, described, integer
from chunked_ce.checks import check_keywords
from chunked_ce.options import ChunkOptions

__all__ = ["Options", "chunk_options", "refuse"]

_FLAGS = ("compiled", "compute_nll_loss", "use_ref_model", "average_log_prob", "return_soft_hard_loss")
_CHECKED = ("reduction", "ignore_index", "label_smoothing", "softcap", "temperature")


class Options(nn.Module):
    """A loss whose options are its attributes."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        """``arguments`` are the ``locals()`` of a subclass's ``__init__``, before it has any of its own."""
        super().__init__()
        options = {name: value for name, value in arguments.items() if name not in ("self", "__class__")}
        for name, value in options.items():
            if name in _FLAGS:
                check_flag(name, value)
            setattr(self, name, value)
        check_keywords(**{name: options[name] for name in _CHECKED if name in options})
        if integer("chunk_size", options.get("chunk_size", 1)) < 1:
            raise ValueError(f"chunk_size must be >= 1, was {described(options['chunk_size'])}")
        self._names = tuple(options)

    if TYPE_CHECKING:  # attributes are the options, of their own types, not submodules and buffers

        def __getattr__(self, name: str) -> Any: ...

    def options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._names}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options().items())


def refuse(why: str, **values: tuple[Any, Any]) -> None:
    """Raise for the first of the named ``(value, the only one that is allowed)`` that differ."""
    for name, (value, allowed) in values.items():
        if value is not allowed and value != allowed:
            raise ValueError(f"{name} must be {described(allowed)}, was {described(value)}: {why}")


def chunk_options(accum_dtype: torch.dtype | None) -> ChunkOptions | None:
    """The options for a gradient of the head that is summed in ``accum_dtype``."""
    if accum_dtype is None:
        return None
    try:
        return ChunkOptions(accumulate_dtype=accum_dtype)
    except ValueError as error:
        raise ValueError(str(error).replace("accumulate_dtype", "accum_dtype")) from None
