"""The product of hidden states and head whose epilogue takes the exponentials: no logit reaches memory.

`product_exponentials` writes what `chunked_ce.rows.exponentials.exponentials` writes, from the factors of the logits.
A row's reference has to be known before the product: it is the target's logit, from a product of two rows. Where a
row's largest logit turns out to exceed it by more than is allowed, its tiles are formed again, with that logit as the
reference. Factors are loaded and exponentials stored through tensor descriptors (TMA on sm_90 and later).
"""

# Kernels are compiled for the types of their arguments, which no annotation gives.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# pyright: reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from chunked_ce.rows.statistics import Logits, PerRow
from chunked_ce.rows.triton_exponentials import LOG2E, MOST
from chunked_ce.rows.triton_jit import device_of, jit

__all__ = ["product_exponentials", "takes"]

_TOKENS, _ENTRIES, _COLUMNS = 128, 256, 64  # of a tile, and of both factors at a time
_REPEATED = 64  # tokens of a tile that is formed again
_WARPS, _STAGES = 8, 4
_GROUP = 8  # blocks of tokens whose tiles follow one another, so that they share what they read of the head
_PROGRAMS = 512  # about so many look for rows to repeat
_WIDTH = 512  # columns of two rows, or tiles of a row, at a time
_VARYING = {  # arguments that differ between chunks
    "do_not_specialize": ["num_rows", "row_blocks"],
    "do_not_specialize_on_alignment": ["column", "temperature", "reference", "at_target", "highest", "sums", "part"],
}


def takes(factor: Tensor) -> bool:
    """Whether a tensor descriptor takes a factor (n, D) as it is: its rows begin at multiples of 16 bytes."""
    is_aligned = factor.stride(1) == 1 and factor.stride(0) % 8 == 0 and factor.data_ptr() % 16 == 0
    return factor.dtype == torch.bfloat16 and factor.shape[1] % 8 == 0 and is_aligned


@jit
def _factor_of(heat, scale):
    """What takes the products of rows to the logarithms to base 2 of their exponentials."""
    if heat is not None:
        scale = scale / heat
    return scale * LOG2E


@jit(**_VARYING)
def references_kernel(
    x,  # (n, D)
    x_stride,
    weight,  # (V, D)
    weight_stride,
    bias,  # (V,) or None
    column,  # (n,) of the target
    temperature,  # (n,) or None
    reference,  # (n,)
    vocab_size,
    hidden_size,
    scale,
    BLOCK: tl.constexpr,
):
    """The logarithm to base 2 of exp(z) of a token's target."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.load(column + row).to(tl.int64)
    known = (at >= 0) & (at < vocab_size)
    at = tl.where(known, at, 0)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, hidden_size, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < hidden_size
        left = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
        total += left * tl.load(weight + at * weight_stride + columns, mask=inside, other=0.0).to(tl.float32)
    logit = tl.sum(total, 0)
    if bias is not None:
        logit += tl.load(bias + at).to(tl.float32)
    heat = None
    if temperature is not None:
        heat = tl.load(temperature + row)
    value = logit * _factor_of(heat, scale)
    tl.store(reference + row, tl.where(tl.abs(value) < float("inf"), value, 0.0))


@jit
def _tile(
    x,  # descriptor of (n, D)
    weight,  # descriptor of (V, D)
    out,  # descriptor of (n, V)
    bias,
    column,
    temperature,
    reference,
    at_target,  # (n,) the targets' logits before scale and temperature
    highest,  # (blocks, n) of each row in a block of the vocabulary, before scale and temperature
    sums,  # (blocks, n) of its exponentials
    num_rows,
    vocab_size,
    hidden_size,
    scale,
    row_block,
    block,
    TOKENS: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One tile of exponentials, and what its rows have there."""
    first_row, first = row_block * TOKENS, block * ENTRIES
    products = tl.zeros((TOKENS, ENTRIES), tl.float32)
    for at in range(0, hidden_size, COLUMNS):
        products = tl.dot(x.load([first_row, at]), weight.load([first, at]).T, products)
    rows, entries = first_row + tl.arange(0, TOKENS), first + tl.arange(0, ENTRIES)
    mask, inside = rows < num_rows, entries < vocab_size
    if bias is not None:
        products += tl.load(bias + entries, mask=inside, other=0.0).to(tl.float32)[None, :]
    if first + ENTRIES > vocab_size:
        products = tl.where(inside[None, :], products, -float("inf"))
    places = num_rows.to(tl.int64) * block + rows
    tl.store(highest + places, tl.max(products, 1), mask=mask)
    targets = tl.load(column + rows, mask=mask, other=-1)
    is_here = (targets >= first) & (targets < first + ENTRIES)
    if tl.max(is_here.to(tl.int32), 0) > 0:
        of_target = tl.sum(tl.where(entries[None, :] == targets[:, None], products, 0.0), 1)
        tl.store(at_target + rows, of_target, mask=is_here)
    base = tl.load(reference + rows, mask=mask, other=0.0)[:, None]
    heat = None
    if temperature is not None:
        heat = tl.load(temperature + rows, mask=mask, other=1.0)[:, None]
    values = tl.exp2(tl.fma(products, _factor_of(heat, scale), -base))
    tl.store(sums + places, tl.sum(values, 1), mask=mask)
    out.store([first_row, first], values.to(tl.bfloat16))


@jit(**_VARYING)
def product_kernel(
    x,  # descriptor of (n, D)
    weight,  # descriptor of (V, D)
    out,  # descriptor of (n, V)
    bias,  # (V,) or None
    column,  # (n,)
    temperature,  # (n,) or None
    reference,  # (n,)
    at_target,  # (n,)
    highest,  # (blocks, n)
    sums,  # (blocks, n)
    num_rows,
    row_blocks,
    vocab_size,
    hidden_size,
    scale,
    TOKENS: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A tile of the exponentials of all rows."""
    program = tl.program_id(0)
    blocks = tl.cdiv(vocab_size, ENTRIES)
    first = program // (GROUP * blocks) * GROUP
    size = tl.minimum(row_blocks - first, GROUP)
    row_block = first + program % (GROUP * blocks) % size
    block = program % (GROUP * blocks) // size
    _tile(
        x, weight, out, bias, column, temperature, reference, at_target, highest, sums,
        num_rows, vocab_size, hidden_size, scale, row_block, block, TOKENS, ENTRIES, COLUMNS,
    )  # fmt: skip


@jit(**_VARYING)
def repeat_kernel(
    x,
    weight,
    out,
    bias,
    column,
    temperature,
    reference,  # (n,)
    at_target,
    highest,
    sums,
    outrun,  # (n,) 1 where the reference has changed
    num_rows,
    vocab_size,
    hidden_size,
    scale,
    TOKENS: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """`product_kernel` for the blocks of rows in which a row outran its reference."""
    row_block = tl.program_id(0)
    rows = row_block * TOKENS + tl.arange(0, TOKENS)
    if tl.max(tl.load(outrun + rows, mask=rows < num_rows, other=0), 0) > 0:
        for block in range(tl.program_id(1), tl.cdiv(vocab_size, ENTRIES), tl.num_programs(1)):
            _tile(
                x, weight, out, bias, column, temperature, reference, at_target, highest, sums,
                num_rows, vocab_size, hidden_size, scale, row_block, block, TOKENS, ENTRIES, COLUMNS,
            )  # fmt: skip


@jit(**_VARYING)
def parts_kernel(
    highest,  # (blocks, n)
    sums,  # (blocks, n)
    column,  # (n,)
    temperature,  # (n,) or None
    at_target,  # (n,)
    reference,  # (n,) raised where a row outran it
    outrun,  # (n,)
    part,  # (n, 4) as of `exponentials`
    num_rows,
    blocks,
    vocab_size,
    scale,
    BLOCK: tl.constexpr,
):
    """The part of a row from its tiles."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, blocks, BLOCK):
        tiles = first + tl.arange(0, BLOCK)
        places = tiles.to(tl.int64) * num_rows + row
        largest = tl.maximum(largest, tl.load(highest + places, mask=tiles < blocks, other=-float("inf")))
        total += tl.load(sums + places, mask=tiles < blocks, other=0.0)
    maximum = tl.max(largest, 0)
    sum_exp = tl.sum(total, 0)
    heat = None
    if temperature is not None:
        heat = tl.load(temperature + row)
    factor = _factor_of(heat, scale)
    base = tl.load(reference + row)
    rise = tl.fma(maximum, factor, -base)
    tl.store(outrun + row, (rise > MOST).to(tl.int32))
    tl.store(reference + row, tl.where(rise > MOST, maximum * factor, base))
    target_column = tl.load(column + row)
    known = (target_column >= 0) & (target_column < vocab_size)
    target = tl.load(at_target + row, mask=known, other=float("nan")) * scale
    maximum_logit = maximum * scale
    if temperature is not None:
        target = target / heat
        maximum_logit = maximum_logit / heat
    masked = maximum == -float("inf")
    of_row = part + row * 4
    tl.store(of_row, maximum_logit)
    tl.store(of_row + 1, tl.where(masked, 0.0, sum_exp * tl.exp2(-rise)))
    tl.store(of_row + 2, tl.where(masked, -float("inf"), target - maximum_logit))
    tl.store(of_row + 3, sum_exp)


def product_exponentials(
    x: Tensor,  # (n, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    column: Tensor,  # (n,) of the target
    logits: Logits,  # without a softcap
    out: Tensor,  # (n, V)
    *,
    per_row: PerRow,
) -> Tensor:
    """Write the exponentials of the logits ``x @ weight.T + bias`` to ``out``; the part (n, 3) of the statistics in
    fp32, and beside it the sums. The weight has to be one that the descriptors take, and so has ``out``, but for V."""
    x = x if takes(x) else x.clone(memory_format=torch.contiguous_format)
    (n, hidden_size), vocab_size = x.shape, len(weight)
    blocks = triton.cdiv(vocab_size, _ENTRIES)
    temperature = None if per_row.temperature is None else per_row.temperature.contiguous()
    column = column.contiguous()
    reference, at_target = x.new_empty(2, n, dtype=torch.float32)
    outrun = torch.empty(n, dtype=torch.int32, device=x.device)
    highest, sums = x.new_empty(2, blocks, n, dtype=torch.float32)
    part = torch.empty(n, 4, dtype=torch.float32, device=x.device)
    of_rows = bias, column, temperature, reference, at_target, highest, sums
    sizes = vocab_size, hidden_size, logits.scale

    def tiles(tokens: int) -> tuple[int, list[TensorDescriptor], dict[str, int]]:
        shapes = {"TOKENS": tokens, "ENTRIES": _ENTRIES, "COLUMNS": _COLUMNS}
        pairs = (x, [tokens, _COLUMNS]), (weight, [_ENTRIES, _COLUMNS]), (out, [tokens, _ENTRIES])
        descriptors = [TensorDescriptor.from_tensor(*pair) for pair in pairs]
        return triton.cdiv(n, tokens), descriptors, shapes | {"num_warps": _WARPS, "num_stages": _STAGES}

    def to_parts() -> None:
        tensors = highest, sums, column, temperature, at_target, reference, outrun, part
        parts_kernel[(n,)](*tensors, n, blocks, vocab_size, logits.scale, BLOCK=_WIDTH, num_warps=4)

    with device_of(x):
        tensors = x, x.stride(0), weight, weight.stride(0), bias, column, temperature, reference
        references_kernel[(n,)](*tensors, *sizes, BLOCK=_WIDTH, num_warps=4)
        row_blocks, factors, tile = tiles(_TOKENS)
        product_kernel[(row_blocks * blocks,)](*factors, *of_rows, n, row_blocks, *sizes, **tile, GROUP=_GROUP)
        to_parts()
        row_blocks, factors, tile = tiles(_REPEATED)
        splits = max(1, min(blocks, _PROGRAMS // row_blocks))
        repeat_kernel[(row_blocks, splits)](*factors, *of_rows, outrun, n, *sizes, **tile)
        to_parts()
    return part
