"""The options of torch's own ``linear_cross_entropy`` in the place of `ChunkOptions`: taken, or refused by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch

from chunked_ce.options import ChunkOptions

if TYPE_CHECKING:
    from torch.nn import LinearCrossEntropyOptions as TorchOptions
else:
    TorchOptions = getattr(torch.nn, "LinearCrossEntropyOptions", None)  # from torch 2.13 on

__all__ = ["TorchOptions", "chunk_options", "what_to_write"]

_ACCUMULATES = (None, torch.float32, torch.float64, torch.bfloat16)


def chunk_options(options: ChunkOptions | TorchOptions | None) -> ChunkOptions | None:
    """`ChunkOptions` that mean what torch's options mean; options that have no counterpart as they are, to be refused
    with all other arguments.

    ``batch_chunk_size`` is ``chunk_size``, and ``acc_dtype`` is ``accumulate_dtype``. ``allow_retain_graph`` changes
    nothing: a backward may always run again. Head gradients are summed in float32 under every ``acc_policy`` but
    ``"compact"``, which is refused, as are ways to find a chunk size that torch has and this package has not.
    """
    if not _is_torchs(options) or _refused(options) is not None:
        return cast("ChunkOptions | None", options)
    return ChunkOptions(**_counterparts(options))


def what_to_write(options: object) -> str | None:
    """What to write instead of ``options``, if these are torch's."""
    if not _is_torchs(options):
        return None
    refused = _refused(options)
    if refused is not None:
        return refused
    return f"write ChunkOptions({', '.join(f'{name}={value!r}' for name, value in _counterparts(options).items())})"


def _is_torchs(options: object) -> TypeGuard[TorchOptions]:
    return TorchOptions is not None and isinstance(options, TorchOptions)


def _counterparts(options: TorchOptions) -> dict[str, Any]:
    """The keywords of `ChunkOptions`, but those that have their defaults."""
    size = {} if options.batch_chunk_size is None else {"chunk_size": options.batch_chunk_size}
    return size | ({} if options.acc_dtype is None else {"accumulate_dtype": options.acc_dtype})


def _refused(options: TorchOptions) -> str | None:
    """The field of torch's options that has no counterpart, and what to write instead."""
    if options.acc_dtype not in _ACCUMULATES:
        return f"acc_dtype={options.acc_dtype} has no counterpart: write ChunkOptions(accumulate_dtype=torch.float32)"
    if options.acc_policy == "compact":
        return (
            "acc_policy='compact' has no counterpart: write ChunkOptions(gradients='backward') for the least memory, "
            "or ChunkOptions(accumulate_dtype=torch.bfloat16) to sum a bfloat16 head's gradient in its own dtype"
        )
    method, size = options.chunking_method, options.batch_chunk_size
    if method is None and size is None:
        return (
            "chunking_method=None without a batch_chunk_size, a single chunk, has no counterpart: write "
            "ChunkOptions(chunk_size=N) with the number of tokens"
        )
    if method not in ("auto", None):
        return (
            f"chunking_method={method!r} has no counterpart: write ChunkOptions(chunk_size=...) with a number, or "
            "ChunkOptions() for as many as memory and speed ask for"
        )
    return None
