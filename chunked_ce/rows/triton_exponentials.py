"""`chunked_ce.rows.exponentials` in Triton: each logit is read once and its exponential written once.

The kernels keep the rules of `chunked_ce.rows.triton_kernels`: fp32, 64-bit offsets, no atomic addition.
"""

# Kernels are compiled for the types of their arguments, which no annotation gives.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from chunked_ce.rows.exponentials import ScaledExponentials
from chunked_ce.rows.statistics import Logits, PerRow
from chunked_ce.rows.triton_jit import device_of, jit

__all__ = ["add_columns_", "add_targets_", "exponentials"]

_BLOCK = 4096  # logits of a row that a program holds at a time: 8 in each of 512 threads
_ROWS, _COLUMNS = 32, 128  # the tile of a block of columns that a program holds
_RUN, _WIDTH = 8, 256  # tokens with the same target, and columns of their hidden states, at a time
LOG2E = tl.constexpr(1.4426950408889634)
# log2 of how far a row's logits may exceed its reference before its exponentials are rewritten: exp(30). The sum of a
# row, its factor and a token's hidden state times this factor then stay far within the range of bf16 and fp32.
MOST = tl.constexpr(43.28)
_VARYING = {  # arguments that differ between chunks
    "do_not_specialize": ["num_rows"],
    "do_not_specialize_on_alignment": ["column", "temperature", "part", "factor", "gradient", "taken"],
}


@jit
def _exponentiate(block, factor, reference):
    """2 to the power of ``factor * block - reference``, rounded once before the power is taken."""
    base = tl.where(reference == -float("inf"), 0.0, reference)  # as yet, all entries are masked
    return tl.exp2(tl.fma(block.to(tl.float32), factor, -base))


@jit
def _raise(out_of_row, column_stride, reference, level, total, first, BLOCK: tl.constexpr):
    """Relate what was written of a row to a higher reference; it is ``total`` times the ratio that is returned."""
    ratio = tl.exp2(reference - level)
    tl.debug_barrier()  # a thread may read what another one wrote
    for at in range(0, first, BLOCK):
        places = out_of_row + (at + tl.arange(0, BLOCK)).to(tl.int64) * column_stride
        written = tl.load(places).to(tl.float32) * ratio
        tl.store(places, written.to(out_of_row.dtype.element_ty))
    return total * ratio


@jit(**_VARYING)
def exponentials_kernel(
    products,  # (n, V)
    row_stride,
    column_stride,
    out,  # (n, V), may be products
    out_row_stride,
    out_column_stride,
    column,  # (n,) of the target
    temperature,  # (n,) or None
    part,  # (n, 4) maximum, sum relative to it, target relative to it, sum relative to the reference
    vocab_size,
    scale,  # > 0
    BLOCK: tl.constexpr,
):
    """The exponentials of a row, relative to the larger of its target's logit and the largest of its first block."""
    row = tl.program_id(0).to(tl.int64)
    logits_of_row = products + row * row_stride
    out_of_row = out + row * out_row_stride
    heat = 1.0
    if temperature is not None:
        heat = tl.load(temperature + row)
    factor = scale / heat * LOG2E
    at = tl.load(column + row)
    known = (at >= 0) & (at < vocab_size)  # an out-of-range target, reported elsewhere, must not be read
    target = tl.load(logits_of_row + at.to(tl.int64) * column_stride, mask=known, other=float("nan")).to(tl.float32)
    reference = target * factor
    reference = tl.where(reference == reference, reference, -float("inf"))
    maximum = tl.full((), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    inside = tl.arange(0, BLOCK)
    whole = vocab_size // BLOCK * BLOCK
    # Blocks without an edge need no mask by column, which keeps accesses wide whatever the vocabulary size is. The next
    # one is loaded ahead: after a store, which may be to the same memory, its load would wait.
    block = tl.load(logits_of_row + inside.to(tl.int64) * column_stride, mask=inside < whole, other=0.0)
    for first in range(0, whole, BLOCK):
        places = first + inside
        ahead = logits_of_row + (places + BLOCK).to(tl.int64) * column_stride
        following = tl.load(ahead, mask=inside < tl.where(first + BLOCK < whole, BLOCK, 0), other=0.0)
        largest = tl.max(block.to(tl.float32), 0)
        maximum = tl.maximum(maximum, largest)
        level = largest * factor
        if level > reference + tl.where(first > 0, MOST, 0.0):
            total = _raise(out_of_row, out_column_stride, reference, level, total, first, BLOCK)
            reference = level
        values = _exponentiate(block, factor, reference)
        total += values
        tl.store(out_of_row + places.to(tl.int64) * out_column_stride, values.to(out.dtype.element_ty))
        block = following
    if whole < vocab_size:
        places = whole + inside
        edge = places < vocab_size
        block = tl.load(logits_of_row + places.to(tl.int64) * column_stride, mask=edge, other=-float("inf"))
        largest = tl.max(block.to(tl.float32), 0)
        maximum = tl.maximum(maximum, largest)
        level = largest * factor
        if level > reference + tl.where(whole > 0, MOST, 0.0):
            total = _raise(out_of_row, out_column_stride, reference, level, total, whole, BLOCK)
            reference = level
        values = _exponentiate(block, factor, reference)
        total += values
        places = out_of_row + places.to(tl.int64) * out_column_stride
        tl.store(places, values.to(out.dtype.element_ty), mask=edge)

    sum_exp = tl.sum(total, 0)
    masked = maximum == -float("inf")
    relative = sum_exp / _exponentiate(maximum, factor, reference)  # by the largest exponential, as it was computed
    of_row = part + row * 4
    highest = maximum * scale
    target = target * scale
    if temperature is not None:
        highest = highest / heat
        target = target / heat
    tl.store(of_row, highest)
    tl.store(of_row + 1, tl.where(masked, 0.0, relative))
    tl.store(of_row + 2, tl.where(masked, -float("inf"), target - highest))
    tl.store(of_row + 3, sum_exp)


@jit(**_VARYING)
def targets_kernel(
    entry,  # (n,) the targets in order
    order,  # (n,) the tokens that they belong to
    end,  # (n,) behind the last token with the same target
    gradient,  # (n,)
    taken,  # (n,)
    x,  # (n, D) contiguous
    scaled_x,  # (n, D) contiguous
    total,  # (V, D) with columns side by side
    total_stride,
    hidden_size,
    blocks,  # of columns
    RUN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The missing terms of one target, by the program of its first token: a block of columns of the sum over all."""
    program = tl.program_id(0)
    at = program // blocks
    columns = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < hidden_size
    target = tl.load(entry + at)
    first = target != tl.load(entry + at - 1, mask=at > 0, other=-1)
    into = total + target.to(tl.int64) * total_stride + columns
    mask = columns < tl.where(first, hidden_size, 0)  # none if an earlier program has this target
    stop = tl.where(first, tl.load(end + at).to(tl.int32), at)
    terms = tl.zeros((BLOCK,), tl.float32)
    for start in range(at, stop, RUN):
        places = start + tl.arange(0, RUN)
        same = places < stop
        token = tl.load(order + places, mask=same, other=0)
        right = tl.load(gradient + token, mask=same, other=0.0)
        left_out = tl.load(taken + token, mask=same, other=0.0).to(tl.float32)
        both = same[:, None] & inside[None, :]
        places = (token * hidden_size)[:, None] + columns[None, :]
        exact = tl.load(x + places, mask=both, other=0.0).to(tl.float32)
        scaled = tl.load(scaled_x + places, mask=both, other=0.0)
        terms += tl.sum(right[:, None] * exact - left_out[:, None] * scaled.to(tl.float32), 0)
    old = tl.load(into, mask=mask, other=0.0)
    tl.store(into, (old + terms).to(total.dtype.element_ty), mask=mask)


@jit(**_VARYING)
def columns_kernel(
    values,  # (n, V)
    row_stride,
    column_stride,
    column,  # (n,)
    factor,  # (n,)
    gradient,  # (n,)
    total,  # (V,)
    num_rows,
    vocab_size,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of columns of the gradients, summed over all rows."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocab_size
    sums = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, num_rows, ROWS):
        rows = (first + tl.arange(0, ROWS)).to(tl.int64)
        mask = rows < num_rows
        places = rows[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
        block = tl.load(values + places, mask=mask[:, None] & inside[None, :], other=0.0).to(tl.float32)
        block *= tl.load(factor + rows, mask=mask, other=0.0)[:, None]
        is_target = columns[None, :] == tl.load(column + rows, mask=mask, other=-1)[:, None]
        block = tl.where(is_target, tl.load(gradient + rows, mask=mask, other=0.0)[:, None], block)
        sums += tl.sum(block, 0)
    old = tl.load(total + columns, mask=inside, other=0.0)
    tl.store(total + columns, (old + sums).to(total.dtype.element_ty), mask=inside)


def exponentials(
    products: Tensor,  # (n, V)
    column: Tensor,  # (n,) of the target
    logits: Logits,  # without a softcap
    out: Tensor,  # (n, V), may be the products
    *,
    per_row: PerRow,
) -> Tensor:
    """Write the exponentials to ``out``; the part (n, 3) of the statistics in fp32, and beside it the sums."""
    n, vocab_size = products.shape
    part = torch.empty(n, 4, dtype=torch.float32, device=products.device)
    block = min(_BLOCK, max(128, triton.next_power_of_2(vocab_size)))
    temperature = None if per_row.temperature is None else per_row.temperature.contiguous()
    with device_of(products):
        exponentials_kernel[(n,)](
            products,
            *products.stride(),
            out,
            *out.stride(),
            column.contiguous(),
            temperature,
            part,
            vocab_size,
            logits.scale,
            BLOCK=block,
            num_warps=max(1, block // 256),
        )
    return part


def add_targets_(total: Tensor, scaled: ScaledExponentials, x: Tensor, scaled_x: Tensor) -> None:
    """Add to ``total`` (V, D) what the product of the exponentials and ``scaled_x`` (n, D) lacks of the targets'
    terms with ``x`` (n, D); each row is summed in fp32 before it is added, always in the same order."""
    entry, order = scaled.column.sort(stable=True)
    end = torch.searchsorted(entry, entry, right=True)
    n, hidden_size = x.shape
    blocks = triton.cdiv(hidden_size, _WIDTH)
    x = x.contiguous()
    with device_of(x):
        targets_kernel[(n * blocks,)](
            entry,
            order,
            end,
            scaled.gradient,
            scaled.taken,
            x,
            scaled_x,
            total,
            total.stride(0),
            hidden_size,
            blocks,
            RUN=_RUN,
            BLOCK=_WIDTH,
            num_warps=4,
        )


def add_columns_(total: Tensor, scaled: ScaledExponentials) -> None:
    """Add the column sums of the gradients to ``total`` (V,)."""
    n, vocab_size = scaled.values.shape
    with device_of(total):
        columns_kernel[(triton.cdiv(vocab_size, _COLUMNS),)](
            scaled.values,
            *scaled.values.stride(),
            scaled.column.contiguous(),
            scaled.factor,
            scaled.gradient,
            total,
            n,
            vocab_size,
            ROWS=_ROWS,
            BLOCK=_COLUMNS,
            num_warps=4,
        )
