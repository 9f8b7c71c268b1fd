"""The passes of the gradient filter in Triton. Launched by `chunked_ce.rows.triton_filter`.

Offsets are 64-bit, and no addition is atomic: every run gives the same result.
"""

# Kernels are compiled for the types of their arguments, which no annotation gives.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# pyright: reportOperatorIssue=false

import triton.language as tl

from chunked_ce.rows.triton_jit import jit

_NOWHERE = tl.constexpr(-(2**31))  # the place of a column beyond the vocabulary


@jit(
    do_not_specialize=["num_rows", "width", "blocks"],
    do_not_specialize_on_alignment=["skip"],
)
def compact_kernel(
    gradients,  # (C, V)
    row_stride,
    place,  # (V,) int32 among the kept columns, or -1 - the group of a dropped one
    skip,  # () not 0 if the chunk's products are dense
    kept,  # (C, width)
    kept_stride,
    left,  # (splits, C, g) fp32
    num_rows,
    vocab_size,
    width,
    blocks,  # of columns in a split
    NUM_GROUPS: tl.constexpr,
    GROUPS: tl.constexpr,  # at least NUM_GROUPS, and as many as a matrix product takes
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Reads some columns of some rows once. The groups' sums are products with zeros and ones, which do not round."""
    if tl.load(skip) != 0:
        return
    split = tl.program_id(1)
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    row_mask = rows < num_rows
    group = tl.arange(0, GROUPS)
    from_rows = gradients + rows[:, None] * row_stride
    to_rows = kept + rows[:, None] * kept_stride
    start = split * blocks * BLOCK
    end = tl.minimum(start + blocks * BLOCK, vocab_size)
    sums = tl.zeros((ROWS, GROUPS), tl.float32)
    for first in range(start, end, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        to = tl.load(place + columns, mask=columns < end, other=_NOWHERE)
        mask = row_mask[:, None] & (columns < end)[None, :]
        values = tl.load(from_rows + columns[None, :], mask=mask, other=0.0)
        tl.store(to_rows + to[None, :], values, mask=mask & ((to >= 0) & (to < width))[None, :])
        members = tl.where(to[:, None] == -1 - group[None, :], 1.0, 0.0).to(values.dtype)
        sums = tl.dot(values, members, sums, input_precision="ieee")
    to_left = left + (split.to(tl.int64) * num_rows + rows)[:, None] * NUM_GROUPS + group[None, :]
    tl.store(to_left, sums, mask=row_mask[:, None] & (group < NUM_GROUPS)[None, :])


@jit
def _in_two(values, dtype: tl.constexpr):
    """``values`` as a sum of two values in ``dtype``."""
    first = values.to(dtype)
    return first, (values - first.to(tl.float32)).to(dtype)


@jit(do_not_specialize=["num_rows", "width"])
def tail_columns_kernel(
    left,  # (C, k) fp32
    count,  # () the kept columns
    kept,  # (C, width)
    kept_stride,
    num_rows,
    width,
    scale,
    NUM_TAILS: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # 3 k + PADDED at least
):
    """Writes the tail's columns behind the kept ones: in two parts, the first one twice; then zeros."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    row_mask = rows < num_rows
    known = tl.load(count).to(tl.int64)
    end = tl.minimum((known + 3 * NUM_TAILS + PADDED - 1) // PADDED * PADDED, width) - known
    is_tail = columns < 3 * NUM_TAILS
    from_left = left + rows[:, None] * NUM_TAILS + (columns % NUM_TAILS)[None, :]
    values = tl.load(from_left, mask=row_mask[:, None] & is_tail[None, :], other=0.0) / scale
    first, rest = _in_two(values, kept.dtype.element_ty)
    values = tl.where((columns < 2 * NUM_TAILS)[None, :], first, rest)
    mask = row_mask[:, None] & (columns < end)[None, :]
    tl.store(kept + rows[:, None] * kept_stride + (known + columns)[None, :], values, mask=mask)


@jit(do_not_specialize=["blocks"], do_not_specialize_on_alignment=["skip"])
def tail_rows_kernel(
    right,  # (V, k) fp32
    weight,  # (V, D)
    row_stride,
    skip,  # () not 0 if the chunk's products are dense
    rows,  # (splits, k, D) fp32
    vocab_size,
    hidden_size,
    scale,
    blocks,  # of entries in a split
    NUM_TAILS: tl.constexpr,
    FACTORS: tl.constexpr,  # 2 k at least, and as many as a matrix product takes
    ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Reads the head once: ``right.T @ weight`` of some entries, ``right`` in two parts that are as good as fp32."""
    if tl.load(skip) != 0:
        return
    split = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < hidden_size
    factor = tl.arange(0, FACTORS)
    start = split * blocks * ENTRIES
    end = tl.minimum(start + blocks * ENTRIES, vocab_size)
    sums = tl.zeros((FACTORS, BLOCK), tl.float32)
    for first_entry in range(start, end, ENTRIES):
        entries = (first_entry + tl.arange(0, ENTRIES)).to(tl.int64)
        is_entry = entries < end
        from_right = right + entries[None, :] * NUM_TAILS + (factor % NUM_TAILS)[:, None]
        is_factor = (factor < 2 * NUM_TAILS)[:, None] & is_entry[None, :]
        first, rest = _in_two(tl.load(from_right, mask=is_factor, other=0.0) * scale, weight.dtype.element_ty)
        factors = tl.where((factor < NUM_TAILS)[:, None], first, rest)
        from_weight = weight + entries[:, None] * row_stride + columns[None, :]
        values = tl.load(from_weight, mask=is_entry[:, None] & inside[None, :], other=0.0)
        sums = tl.dot(factors, values, sums, input_precision="ieee")
    sums = sums / scale
    to_rows = rows + (split.to(tl.int64) * FACTORS + factor)[:, None] * hidden_size + columns[None, :]
    tl.store(to_rows, sums, mask=(factor < 2 * NUM_TAILS)[:, None] & inside[None, :])


@jit(do_not_specialize=["count", "width"])
def head_rows_kernel(
    weight,  # (V, D)
    row_stride,
    place,  # (V,) int32
    tail,  # (k, D) fp32
    out,  # (width, D)
    vocab_size,
    hidden_size,
    count,  # of kept columns
    width,
    scale,
    NUM_TAILS: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copies the kept rows of the head; the last programs write the tail's rows and zeros behind them."""
    of_entries = tl.cdiv(vocab_size, ENTRIES)
    program = tl.program_id(0)
    steps = tl.arange(0, ENTRIES)
    if program < of_entries:
        entries = program * ENTRIES + steps
        to = tl.load(place + entries, mask=entries < vocab_size, other=-1).to(tl.int64)
        if tl.max(to, 0) >= 0:
            for first in range(0, hidden_size, BLOCK):
                columns = first + tl.arange(0, BLOCK)
                mask = (to >= 0)[:, None] & (columns < hidden_size)[None, :]
                values = tl.load(
                    weight + entries.to(tl.int64)[:, None] * row_stride + columns[None, :], mask=mask, other=0.0
                )
                tl.store(out + to[:, None] * hidden_size + columns[None, :], values, mask=mask)
    else:
        behind = (program - of_entries) * ENTRIES + steps
        is_tail, inside = behind < 3 * NUM_TAILS, count + behind < width
        is_rest = (behind >= NUM_TAILS) & (behind < 2 * NUM_TAILS)
        to = (count + behind).to(tl.int64)
        for first in range(0, hidden_size, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            is_column = columns < hidden_size
            from_tail = tail + (behind % NUM_TAILS)[:, None] * hidden_size + columns[None, :]
            values = tl.load(from_tail, mask=is_tail[:, None] & is_column[None, :], other=0.0) * scale
            part, rest = _in_two(values, out.dtype.element_ty)
            values = tl.where(is_rest[:, None], rest, part)
            mask = inside[:, None] & is_column[None, :]
            tl.store(out + to[:, None] * hidden_size + columns[None, :], values, mask=mask)


@jit(
    do_not_specialize=["num_chunks", "num_tails"],
    do_not_specialize_on_alignment=["total", "places", "right", "factor"],
)
def finish_kernel(
    total,  # (V, D) or None
    parts,  # (R, D) fp32, or None
    places,  # (chunks, V) int32, the row of each entry in the parts, negative where it was dropped
    right,  # (V, k) fp32
    left,  # (k, D) fp32
    factor,  # () or None
    out,  # (V, D), may be total
    vocab_size,
    hidden_size,
    num_chunks,
    num_tails,
    ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``factor * (total + the kept rows of all chunks + right @ left)``, rounded once."""
    entries = (tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_entry, inside = entries < vocab_size, columns < hidden_size
    mask = is_entry[:, None] & inside[None, :]
    at = entries[:, None] * hidden_size + columns[None, :]
    sums = tl.zeros((ENTRIES, BLOCK), tl.float32)
    for tail in range(0, num_tails):
        of_entry = tl.load(right + entries * num_tails + tail, mask=is_entry, other=0.0)
        of_column = tl.load(left + tail * hidden_size + columns, mask=inside, other=0.0)
        sums += of_entry[:, None] * of_column[None, :]
    if parts is not None:
        of_chunk = places + entries
        for _ in range(0, num_chunks):
            row = tl.load(of_chunk, mask=is_entry, other=-1).to(tl.int64)
            of_chunk += vocab_size
            from_parts = parts + row[:, None] * hidden_size + columns[None, :]
            sums += tl.load(from_parts, mask=mask & (row >= 0)[:, None], other=0.0)
    if total is not None:
        sums += tl.load(total + at, mask=mask, other=0.0).to(tl.float32)
    if factor is not None:
        sums *= tl.load(factor).to(tl.float32)
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=mask)
