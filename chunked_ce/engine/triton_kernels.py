"""The row kernels in Triton: one program reads a row of logits once, in registers and fp32.

Launched by `chunked_ce.engine.triton_rows`. An argument that may be None is known when a kernel is compiled, so that
what nobody asked for costs nothing. Offsets are 64-bit: N * V passes 2^31. Nothing is added atomically, so a result is
the same in every run.
"""

import triton
import triton.language as tl

# What differs from chunk to chunk: compiled once for all of it.
_VARYING = {
    "do_not_specialize": ["found_row_stride", "found_column_stride", "start", "blocks", "num_rows"],
    "do_not_specialize_on_alignment": [
        "target",
        "here",
        "class_weight",
        "found",
        "row_maximum",
        "row_log_sum",
        "row_target",
        "row_mean",
        "log_sum_slope",
        "target_slope",
        "weighted_slope",
        "mean_slope",
    ],
}
_NO_EXP = tl.constexpr(-1000.0)  # exp of it is 0, and 0 times it is 0, unlike 0 times -inf


@triton.jit
def _tanh(x):
    """To 1.1 units in the last place: near 0 a minimax fit of (tanh(x) / x - 1) / x^2, which keeps small values."""
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
def _logits(products, scale, softcap):
    """`chunked_ce.objective.Logits` in fp32."""
    z = products.to(tl.float32) * scale
    if softcap is not None:
        z = softcap * _tanh(z / softcap)
    return z


@triton.jit(**_VARYING)
def statistics_kernel(
    products,  # (n, V)
    row_stride,
    column_stride,
    target,  # (n,) a column
    here,  # (n,) whether the target is one of these columns; None for all of them
    class_weight,  # (V,) or None
    found,  # (n, statistics)
    found_row_stride,
    found_column_stride,
    vocab_size,
    scale,
    softcap,
    start,  # index of the first column in the whole vocabulary
    SHARD: tl.constexpr,  # parts for `chunked_ce.objective.combine_shards` instead of statistics
    WEIGHTED: tl.constexpr,
    MEAN: tl.constexpr,
    CORRECT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The statistics of a row by an online softmax: what is summed so far is rescaled where a larger logit comes."""
    row = tl.program_id(0).to(tl.int64)
    logits_of_row = products + row * row_stride
    maximum = tl.full((), -float("inf"), tl.float32)
    sum_exp = tl.full((), 0.0, tl.float32)
    weighted = tl.full((), 0.0, tl.float32)
    weight_sum = tl.full((), 0.0, tl.float32)
    moment = tl.full((), 0.0, tl.float32)
    best = tl.full((), 0, tl.int32)
    for first in range(0, vocab_size, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < vocab_size
        block = tl.load(logits_of_row + columns.to(tl.int64) * column_stride, mask=inside, other=0.0)
        z = tl.where(inside, _logits(block, scale, softcap), -float("inf"))
        largest = tl.max(z, 0)
        if CORRECT:
            at = tl.min(tl.where((z == largest) & inside, columns, vocab_size), 0)
            best = tl.where(largest > maximum, at, best)
        higher = tl.maximum(maximum, largest)
        base = tl.where(higher == -float("inf"), 0.0, higher)  # a row may begin with words masked by -inf
        shift = tl.where(maximum == -float("inf"), 0.0, maximum - base)
        rescale = tl.exp(shift)
        relative = z - base
        exponentials = tl.exp(relative)
        if MEAN:
            moment = (moment + sum_exp * tl.maximum(shift, _NO_EXP)) * rescale
            moment += tl.sum(exponentials * tl.maximum(relative, _NO_EXP), 0)
        if WEIGHTED:
            weight = tl.where(inside, 1.0, 0.0)
            if class_weight is not None:
                weight = tl.load(class_weight + columns, mask=inside, other=0.0)
            weighted += weight_sum * shift + tl.sum(weight * tl.where(inside, relative, 0.0), 0)
            weight_sum += tl.sum(weight, 0)
        sum_exp = sum_exp * rescale + tl.sum(exponentials, 0)
        maximum = higher

    column = tl.load(target + row)
    known = (column >= 0) & (column < vocab_size)  # one out of range is reported, but may not be read
    at_target = tl.load(logits_of_row + column.to(tl.int64) * column_stride, mask=known, other=float("nan"))
    at_target = _logits(at_target, scale, softcap) - maximum
    masked = maximum == -float("inf")  # every word of the row
    out = found + row * found_row_stride
    tl.store(out, maximum)
    if SHARD:
        elsewhere = tl.load(here + row) == 0
        tl.store(out + found_column_stride, sum_exp)
        tl.store(out + 2 * found_column_stride, tl.where(elsewhere | masked, -float("inf"), at_target))
        if WEIGHTED:
            tl.store(out + 3 * found_column_stride, tl.where(masked, -float("inf"), weighted))
            tl.store(out + 4 * found_column_stride, weight_sum)
        if MEAN:
            tl.store(out + (3 + 2 * WEIGHTED) * found_column_stride, moment)
        if CORRECT:
            tl.store(out + (3 + 2 * WEIGHTED + MEAN) * found_column_stride, (best + start).to(tl.float32))
    else:
        sum_exp = tl.where(masked, float("nan"), sum_exp)
        tl.store(out + found_column_stride, tl.log(sum_exp))
        tl.store(out + 2 * found_column_stride, at_target)
        if WEIGHTED:
            tl.store(out + 3 * found_column_stride, weighted)
        if MEAN:
            tl.store(out + (3 + WEIGHTED) * found_column_stride, moment / sum_exp)
        if CORRECT:
            tl.store(out + (3 + WEIGHTED + MEAN) * found_column_stride, (best == column).to(tl.float32))


@triton.jit
def _of_softmax(z, maximum, log_sum, mean, by_log_sum, by_mean):
    """What the log-sum-exp and the mean give to the gradients of the logits ``z``."""
    relative = z - maximum
    factor = by_log_sum
    if by_mean is not None:
        factor = by_log_sum + by_mean * (tl.maximum(relative, _NO_EXP) + (1.0 - mean))
    return tl.exp(relative) * (factor * tl.exp(-log_sum))


@triton.jit
def _at_target(relative, log_sum, mean, by_log_sum, by_target, by_mean):
    """The gradients of the targets' logits, which statistics give as ``relative`` to the maximum."""
    factor = by_log_sum
    if by_mean is not None:
        factor = by_log_sum + by_mean * (tl.maximum(relative, _NO_EXP) + (1.0 - mean))
    return tl.exp(relative - log_sum) * factor + by_target


@triton.jit
def _through_softcap(gradients, z, softcap):
    if softcap is not None:
        capped = z / softcap
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
    row_maximum,  # (n,)
    row_log_sum,  # (n,)
    row_target,  # (n,) the target's logit, relative to the maximum
    row_mean,  # (n,) or None
    log_sum_slope,  # (n,)
    target_slope,  # (n,)
    weighted_slope,  # (n,) or None
    mean_slope,  # (n,) or None, with row_mean
    vocab_size,
    blocks,  # of a row
    scale,
    softcap,
    BLOCK: tl.constexpr,
):
    """The gradients of a block of a row by the formula of `chunked_ce.objective`, chained through the softcap."""
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

    read = columns < tl.where(alive, vocab_size, 0)
    places = columns.to(tl.int64)
    block = tl.load(products + row * row_stride + places * column_stride, mask=read, other=0.0)
    z = _logits(block, scale, softcap)
    maximum, log_sum = tl.load(row_maximum + row), tl.load(row_log_sum + row)
    gradients = _of_softmax(z, maximum, log_sum, mean, by_log_sum, by_mean)
    at_target = _at_target(tl.load(row_target + row), log_sum, mean, by_log_sum, by_target, by_mean)
    gradients = tl.where(columns == tl.load(target + row), at_target, gradients)
    if weighted_slope is not None:
        if class_weight is not None:
            by_weighted = by_weighted * tl.load(class_weight + columns, mask=inside, other=0.0)
        gradients += by_weighted
    gradients = tl.where(read, _through_softcap(gradients, z, softcap), 0.0)
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
    row_maximum,  # (n,)
    row_log_sum,  # (n,)
    row_target,  # (n,) the target's logit, relative to the maximum
    row_mean,  # (n,) or None
    log_sum_slope,  # (n,)
    target_slope,  # (n,)
    weighted_slope,  # (n,) or None
    mean_slope,  # (n,) or None, with row_mean
    largest_of_column,  # (V,) of `chunked_ce.engine.columns.ColumnSums`
    total_of_column,  # (V,)
    num_rows,
    vocab_size,
    scale,
    softcap,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`gradients_kernel` for a block of columns of all rows, and what the gradient filter asks of these columns."""
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
        there = rows < num_rows
        by_log_sum = tl.load(log_sum_slope + rows, mask=there, other=0.0)
        by_target = tl.load(target_slope + rows, mask=there, other=0.0)
        alive = (by_log_sum != 0.0) | (by_target != 0.0)
        by_weighted = None
        if weighted_slope is not None:
            by_weighted = tl.load(weighted_slope + rows, mask=there, other=0.0)
            alive |= by_weighted != 0.0
            by_weighted = by_weighted[:, None]
        by_mean = None
        mean = None
        if mean_slope is not None:
            by_mean = tl.load(mean_slope + rows, mask=there, other=0.0)
            alive |= by_mean != 0.0
            by_mean = by_mean[:, None]
            mean = tl.load(row_mean + rows, mask=there, other=0.0)[:, None]

        mask = there[:, None] & inside[None, :]
        read = alive[:, None] & mask
        block = tl.load(products + rows[:, None] * row_stride + places * column_stride, mask=read, other=0.0)
        z = _logits(block, scale, softcap)
        maximum = tl.load(row_maximum + rows, mask=there, other=0.0)[:, None]
        log_sum = tl.load(row_log_sum + rows, mask=there, other=0.0)[:, None]
        gradients = _of_softmax(z, maximum, log_sum, mean, by_log_sum[:, None], by_mean)
        seen = tl.where(read, _through_softcap(gradients, z, softcap), 0.0)
        largest = tl.maximum(largest, tl.max(tl.abs(seen), 0))
        sign = tl.where(by_log_sum > 0.0, 1.0, tl.where(by_log_sum < 0.0, -1.0, 0.0))
        total += tl.sum(sign[:, None] * seen, 0)
        column_of_target = tl.load(target + rows, mask=there, other=-1)[:, None]
        at_target = tl.load(row_target + rows, mask=there, other=0.0)[:, None]
        at_target = _at_target(at_target, log_sum, mean, by_log_sum[:, None], by_target[:, None], by_mean)
        gradients = tl.where(columns[None, :] == column_of_target, at_target, gradients)
        if weighted_slope is not None:
            if class_weight is not None:
                by_weighted = by_weighted * weight
            gradients += by_weighted
        gradients = tl.where(read, _through_softcap(gradients, z, softcap), 0.0).to(out.dtype.element_ty)
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
    """``factor * source``. In place and with a factor of 1 nothing is read, and no host has to know the factor."""
    value = tl.load(factor)
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = places < size
    if IN_PLACE:
        mask = places < tl.where(value == 1.0, 0, size)
    scaled = tl.load(source + places, mask=mask, other=0.0).to(tl.float32) * value.to(tl.float32)
    tl.store(out + places, scaled.to(out.dtype.element_ty), mask=mask)
