"""The row kernels in Triton: one program reads a row of logits once, in registers and fp32.

Launched by `chunked_ce.rows.triton_rows`. Whether an optional argument is None is known when a kernel is
compiled, so a statistic that was not requested costs nothing. Offsets are 64-bit: N * V passes 2^31. No addition is
atomic, so every run gives the same result.
"""

import triton
import triton.language as tl

# Arguments that differ between chunks: a kernel is compiled once for all of their values.
_VARYING = {
    "do_not_specialize": ["part_row_stride", "part_column_stride", "start", "blocks", "num_rows"],
    "do_not_specialize_on_alignment": [
        "target",
        "class_weight",
        "temperature",
        "part",
        "row_maximum",
        "row_log_sum",
        "row_target",
        "row_mean",
        "row_squares",
        "log_sum_slope",
        "target_slope",
        "weighted_slope",
        "mean_slope",
        "squares_slope",
    ],
}
_NO_EXP = tl.constexpr(-1000.0)  # its exp is 0, and 0 times it is 0, not NaN as for -inf


@triton.jit
def _tanh(x):
    """Accurate to 1.1 ulp: near 0, a minimax fit of (tanh(x) / x - 1) / x^2 keeps small values."""
    size = tl.abs(x)
    square = x * x
    fit = 0.001895667444 * square - 0.007883310717
    fit = fit * square + 0.0215710611
    fit = fit * square - 0.05392095472
    fit = fit * square + 0.1333298343
    fit = fit * square - 0.3333332463
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(size < 0.7, x + x * square * fit, tl.where(x < 0.0, -far, far))


@triton.jit
def _logits(products, scale, softcap, heat):
    """`chunked_ce.rows.statistics.Logits` in fp32, over the temperature ``heat`` of their rows, if there is one."""
    z = products.to(tl.float32) * scale
    if softcap is not None:
        z = softcap * _tanh(z / softcap)
    if heat is not None:
        z = z / heat
    return z


@triton.jit(**_VARYING)
def statistics_kernel(
    products,  # (n, V)
    row_stride,
    column_stride,
    target,  # (n,) a column, -1 where it is in another shard
    class_weight,  # (V,) or None
    temperature,  # (n,) or None
    part,  # (n, columns)
    part_row_stride,
    part_column_stride,
    vocab_size,
    scale,
    softcap,
    start,  # index of the first column in the whole vocabulary
    WHOLE: tl.constexpr,  # whether these are all columns: a target outside them then gives NaN
    LOG_SUM: tl.constexpr,  # column of each statistic in the part, -1 if it was not requested
    TARGET: tl.constexpr,
    WEIGHTED: tl.constexpr,
    MEAN: tl.constexpr,
    CORRECT: tl.constexpr,
    SQUARES: tl.constexpr,
    TOTAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The part of a row's statistics by an online softmax: a larger logit rescales the sums so far."""
    row = tl.program_id(0).to(tl.int64)
    logits_of_row = products + row * row_stride
    maximum = tl.full((), -float("inf"), tl.float32)
    sum_exp = tl.full((), 0.0, tl.float32)
    weighted = tl.full((), 0.0, tl.float32)
    weight_sum = tl.full((), 0.0, tl.float32)
    moment = tl.full((), 0.0, tl.float32)
    squares = tl.full((), 0.0, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    heat = None
    if temperature is not None:
        heat = tl.load(temperature + row)
    best = tl.full((), 0, tl.int32)
    for first in range(0, vocab_size, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < vocab_size
        block = tl.load(logits_of_row + columns.to(tl.int64) * column_stride, mask=inside, other=0.0)
        z = tl.where(inside, _logits(block, scale, softcap, heat), -float("inf"))
        largest = tl.max(z, 0)
        if CORRECT >= 0:
            at = tl.min(tl.where((z == largest) & inside, columns, vocab_size), 0)
            best = tl.where(largest > maximum, at, best)
        higher = tl.maximum(maximum, largest)
        base = tl.where(higher == -float("inf"), 0.0, higher)  # a row may begin with entries masked by -inf
        shift = tl.where(maximum == -float("inf"), 0.0, maximum - base)
        rescale = tl.exp(shift)
        relative = z - base
        exponentials = tl.exp(relative)
        if MEAN >= 0:
            moment = (moment + sum_exp * tl.maximum(shift, _NO_EXP)) * rescale
            moment += tl.sum(exponentials * tl.maximum(relative, _NO_EXP), 0)
        if WEIGHTED >= 0:
            weight = tl.where(inside, 1.0, 0.0)
            if class_weight is not None:
                weight = tl.load(class_weight + columns, mask=inside, other=0.0)
            weighted += weight_sum * shift + tl.sum(weight * tl.where(inside, relative, 0.0), 0)
            weight_sum += tl.sum(weight, 0)
        if TOTAL >= 0:
            total += tl.sum(tl.where(inside, z, 0.0), 0)
        if SQUARES >= 0:
            squares = squares * (rescale * rescale) + tl.sum(exponentials * exponentials, 0)
        sum_exp = sum_exp * rescale + tl.sum(exponentials, 0)
        maximum = higher

    column = tl.load(target + row)
    known = (column >= 0) & (column < vocab_size)  # an out-of-range target, reported elsewhere, must not be read
    at_target = tl.load(logits_of_row + column.to(tl.int64) * column_stride, mask=known, other=float("nan"))
    at_target = _logits(at_target, scale, softcap, heat) - maximum
    masked = maximum == -float("inf")  # whether every entry of the row is masked
    if not WHOLE:
        at_target = tl.where(column < 0, -float("inf"), at_target)
    out = part + row * part_row_stride
    tl.store(out, maximum)
    tl.store(out + LOG_SUM * part_column_stride, tl.where(masked, 0.0, sum_exp))
    tl.store(out + TARGET * part_column_stride, tl.where(masked, -float("inf"), at_target))
    if WEIGHTED >= 0:
        tl.store(out + WEIGHTED * part_column_stride, tl.where(masked, -float("inf"), weighted))
        tl.store(out + (WEIGHTED + 1) * part_column_stride, weight_sum)
    if MEAN >= 0:
        tl.store(out + MEAN * part_column_stride, tl.where(masked, 0.0, moment))
    if SQUARES >= 0:
        tl.store(out + SQUARES * part_column_stride, tl.where(masked, 0.0, squares))
    if TOTAL >= 0:
        tl.store(out + TOTAL * part_column_stride, total)
    if CORRECT >= 0:
        tl.store(out + CORRECT * part_column_stride, (best + start).to(tl.float32))


@triton.jit
def _factor(relative, log_sum, mean, squares, by_log_sum, by_mean, by_squares):
    """The factor of the probability in the gradient of a logit that is given ``relative`` to the maximum."""
    factor = by_log_sum
    if by_mean is not None:
        factor = factor + by_mean * (tl.maximum(relative, _NO_EXP) + (1.0 - mean))
    if by_squares is not None:
        factor = factor + (2.0 * by_squares) * tl.exp(relative + (log_sum - squares))
    return factor


@triton.jit
def _of_softmax(z, maximum, log_sum, mean, squares, by_log_sum, by_mean, by_squares):
    """The terms of the statistics of the softmax in the gradients of the logits ``z``."""
    relative = z - maximum
    factor = _factor(relative, log_sum, mean, squares, by_log_sum, by_mean, by_squares)
    return tl.exp(relative) * (factor * tl.exp(-log_sum))


@triton.jit
def _at_target(relative, log_sum, mean, squares, by_log_sum, by_target, by_mean, by_squares):
    """The gradients of the targets' logits, which are given ``relative`` to the maximum."""
    factor = _factor(relative, log_sum, mean, squares, by_log_sum, by_mean, by_squares)
    return tl.exp(relative - log_sum) * factor + by_target


@triton.jit
def _through_softcap(gradients, z, softcap, heat):
    if softcap is not None:
        capped = z / softcap
        if heat is not None:
            capped = capped * heat
        gradients *= 1.0 - capped * capped
    return gradients


@triton.jit(**_VARYING)
def gradients_kernel(
    products,  # (n, V)
    row_stride,
    column_stride,
    out,  # (n, V), may be products
    out_row_stride,
    out_column_stride,
    target,  # (n,) a column, or -1
    class_weight,  # (V,) or None
    temperature,  # (n,) or None
    row_maximum,  # (n,)
    row_log_sum,  # (n,)
    row_target,  # (n,) the target's logit, relative to the maximum
    row_mean,  # (n,) or None
    row_squares,  # (n,) or None
    log_sum_slope,  # (n,)
    target_slope,  # (n,)
    weighted_slope,  # (n,) or None
    mean_slope,  # (n,) or None, with row_mean
    squares_slope,  # (n,) or None, with row_squares
    vocab_size,
    blocks,  # per row
    scale,
    softcap,
    BLOCK: tl.constexpr,
):
    """The gradients of a block of a row by the formula of `chunked_ce.rows.statistics`, chained through the softcap."""
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    columns = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocab_size
    by_log_sum = tl.load(log_sum_slope + row)
    by_target = tl.load(target_slope + row)
    alive = (by_log_sum != 0.0) | (by_target != 0.0)
    by_weighted = None
    if weighted_slope is not None:
        by_weighted = tl.load(weighted_slope + row)
        alive |= by_weighted != 0.0
    by_mean = None
    mean = None
    if mean_slope is not None:
        by_mean = tl.load(mean_slope + row)
        alive |= by_mean != 0.0
        mean = tl.load(row_mean + row)
    by_squares = None
    squares = None
    if squares_slope is not None:
        by_squares = tl.load(squares_slope + row)
        alive |= by_squares != 0.0
        squares = tl.load(row_squares + row)
    heat = None
    if temperature is not None:
        heat = tl.load(temperature + row)

    read = columns < tl.where(alive, vocab_size, 0)
    places = columns.to(tl.int64)
    block = tl.load(products + row * row_stride + places * column_stride, mask=read, other=0.0)
    z = _logits(block, scale, softcap, heat)
    maximum, log_sum = tl.load(row_maximum + row), tl.load(row_log_sum + row)
    gradients = _of_softmax(z, maximum, log_sum, mean, squares, by_log_sum, by_mean, by_squares)
    at_target = tl.load(row_target + row)
    at_target = _at_target(at_target, log_sum, mean, squares, by_log_sum, by_target, by_mean, by_squares)
    gradients = tl.where(columns == tl.load(target + row), at_target, gradients)
    if weighted_slope is not None:
        if class_weight is not None:
            by_weighted = by_weighted * tl.load(class_weight + columns, mask=inside, other=0.0)
        gradients += by_weighted
    gradients = tl.where(read, _through_softcap(gradients, z, softcap, heat), 0.0)
    tl.store(out + row * out_row_stride + places * out_column_stride, gradients.to(out.dtype.element_ty), mask=inside)


@triton.jit(**_VARYING)
def gradients_and_columns_kernel(
    products,  # (n, V)
    row_stride,
    column_stride,
    out,  # (n, V), may be products
    out_row_stride,
    out_column_stride,
    target,  # (n,) a column, or -1
    class_weight,  # (V,) or None
    temperature,  # (n,) or None
    row_maximum,  # (n,)
    row_log_sum,  # (n,)
    row_target,  # (n,) the target's logit, relative to the maximum
    row_mean,  # (n,) or None
    row_squares,  # (n,) or None
    log_sum_slope,  # (n,)
    target_slope,  # (n,)
    weighted_slope,  # (n,) or None
    mean_slope,  # (n,) or None, with row_mean
    squares_slope,  # (n,) or None, with row_squares
    largest_of_column,  # (V,) of `chunked_ce.rows.columns.ColumnSums`
    total_of_column,  # (V,)
    num_rows,
    vocab_size,
    scale,
    softcap,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`gradients_kernel` for a block of columns of all rows, with the column sums of the gradient filter."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocab_size
    places = columns.to(tl.int64)[None, :]
    largest = tl.load(largest_of_column + columns, mask=inside, other=0.0)
    total = tl.load(total_of_column + columns, mask=inside, other=0.0)
    weight = None
    if class_weight is not None:
        weight = tl.load(class_weight + columns, mask=inside, other=0.0)[None, :]
    for first in range(0, num_rows, ROWS):
        rows = (first + tl.arange(0, ROWS)).to(tl.int64)
        row_mask = rows < num_rows
        by_log_sum = tl.load(log_sum_slope + rows, mask=row_mask, other=0.0)
        by_target = tl.load(target_slope + rows, mask=row_mask, other=0.0)
        alive = (by_log_sum != 0.0) | (by_target != 0.0)
        by_weighted = None
        if weighted_slope is not None:
            by_weighted = tl.load(weighted_slope + rows, mask=row_mask, other=0.0)
            alive |= by_weighted != 0.0
            by_weighted = by_weighted[:, None]
        by_mean = None
        mean = None
        if mean_slope is not None:
            by_mean = tl.load(mean_slope + rows, mask=row_mask, other=0.0)
            alive |= by_mean != 0.0
            by_mean = by_mean[:, None]
            mean = tl.load(row_mean + rows, mask=row_mask, other=0.0)[:, None]
        by_squares = None
        squares = None
        if squares_slope is not None:
            by_squares = tl.load(squares_slope + rows, mask=row_mask, other=0.0)
            alive |= by_squares != 0.0
            by_squares = by_squares[:, None]
            squares = tl.load(row_squares + rows, mask=row_mask, other=0.0)[:, None]
        heat = None
        if temperature is not None:
            heat = tl.load(temperature + rows, mask=row_mask, other=1.0)[:, None]

        mask = row_mask[:, None] & inside[None, :]
        read = alive[:, None] & mask
        block = tl.load(products + rows[:, None] * row_stride + places * column_stride, mask=read, other=0.0)
        z = _logits(block, scale, softcap, heat)
        maximum = tl.load(row_maximum + rows, mask=row_mask, other=0.0)[:, None]
        log_sum = tl.load(row_log_sum + rows, mask=row_mask, other=0.0)[:, None]
        by_log_sums, by_targets = by_log_sum[:, None], by_target[:, None]
        gradients = _of_softmax(z, maximum, log_sum, mean, squares, by_log_sums, by_mean, by_squares)
        seen = tl.where(read, _through_softcap(gradients, z, softcap, heat), 0.0)
        largest = tl.maximum(largest, tl.max(tl.abs(seen), 0))
        sign = tl.where(by_log_sum > 0.0, 1.0, tl.where(by_log_sum < 0.0, -1.0, 0.0))
        total += tl.sum(sign[:, None] * seen, 0)
        column_of_target = tl.load(target + rows, mask=row_mask, other=-1)[:, None]
        at_target = tl.load(row_target + rows, mask=row_mask, other=0.0)[:, None]
        at_target = _at_target(at_target, log_sum, mean, squares, by_log_sums, by_targets, by_mean, by_squares)
        gradients = tl.where(columns[None, :] == column_of_target, at_target, gradients)
        if weighted_slope is not None:
            if class_weight is not None:
                by_weighted = by_weighted * weight
            gradients += by_weighted
        gradients = tl.where(read, _through_softcap(gradients, z, softcap, heat), 0.0).to(out.dtype.element_ty)
        tl.store(out + rows[:, None] * out_row_stride + places * out_column_stride, gradients, mask=mask)
    tl.store(largest_of_column + columns, largest, mask=inside)
    tl.store(total_of_column + columns, total, mask=inside)


@triton.jit
def scale_kernel(
    source,  # (m,)
    factor,  # ()
    out,  # (m,), may be source
    size,
    IN_PLACE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``factor * source``. In place with a factor of 1, nothing is read, and the host need not know the factor."""
    value = tl.load(factor)
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = places < size
    if IN_PLACE:
        mask = places < tl.where(value == 1.0, 0, size)
    scaled = tl.load(source + places, mask=mask, other=0.0).to(tl.float32) * value.to(tl.float32)
    tl.store(out + places, scaled.to(out.dtype.element_ty), mask=mask)
