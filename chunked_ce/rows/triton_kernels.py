"""The row kernels in Triton: one program reads a row of logits once, in registers and fp32.

Launched by `chunked_ce.rows.triton_rows`. Whether an optional argument is None is known when a kernel is
compiled, so a statistic that was not requested costs nothing. Offsets are 64-bit: N * V passes 2^31. No addition is
atomic, so every run gives the same result.
"""

# Kernels are compiled for the types of their arguments, which no annotation gives.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, operator"
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOptionalOperand=false

import triton.language as tl

from chunked_ce.rows.backend import INTERPRETED
from chunked_ce.rows.triton_jit import jit

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
_LOWEST = tl.constexpr(-1e30)  # stands for a maximum or a difference of -inf where this would give NaN
_LOG2_E = tl.constexpr(1.4426950408889634)
_INTERPRETED = tl.constexpr(INTERPRETED)


@jit
def _exp(x):
    """One multiplication and one instruction; unlike `tl.exp`, results below 2^-126 are 0."""
    return tl.exp2(x * _LOG2_E)


@jit
def _reciprocal(x):
    """Of numbers from 1 on, to 1 ulp in one instruction; a division takes eight."""
    if _INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@jit
def _logits(products, scale, softcap, inverse_cap):
    """`chunked_ce.rows.logits.Logits` in fp32, before the temperature; ``inverse_cap`` is ``1 / softcap``.

    Near 0, a minimax fit of (tanh(x) / x - 1) / x^2 keeps the precision of small logits. Elsewhere,
    tanh(|x|) = 1 - 2 / (exp(2 |x|) + 1), by one exponential and one reciprocal.
    """
    products = products.to(tl.float32)
    z = products
    if scale is not None:
        z = products * scale
    if softcap is not None:
        x = products * inverse_cap
        if scale is not None:
            x = products * (scale * inverse_cap)
        square = x * x
        fit = tl.fma(square, -0.005138662178069353, 0.020091969519853592)
        fit = tl.fma(square, fit, -0.05355885997414589)
        fit = tl.fma(square, fit, 0.1332911103963852)
        fit = tl.fma(square, fit, -0.3333319127559662)
        near = tl.fma(square * fit, z, z)
        far = tl.fma(_reciprocal(tl.exp2(tl.abs(x) * (2.0 * _LOG2_E)) + 1.0), -2.0 * softcap, softcap)
        sign = x.to(tl.int32, bitcast=True) & -(2**31)
        far = (far.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
        z = tl.where(tl.abs(x) < 0.7, near, far)
    return z


@jit(**_VARYING)
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
    width,  # entries of a row that may be read: V, or more of padded rows
    scale,  # or None
    softcap,  # or None
    inverse_cap,  # 1 / softcap, or None
    start,  # index of the first column in the whole vocabulary
    WHOLE: tl.constexpr,  # whether these are all columns: a target outside them then gives NaN
    LOG_SUM: tl.constexpr,  # column of each statistic in the part, -1 if it was not requested
    TARGET: tl.constexpr,
    WEIGHTED: tl.constexpr,
    MEAN: tl.constexpr,
    CORRECT: tl.constexpr,
    SQUARES: tl.constexpr,
    TOTAL: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The part of a row's statistics by an online softmax: a larger logit rescales the sums so far.

    A ``GROUP`` of columns that one thread holds of a block has sums of its own, so that threads wait for each other
    once per row. Sums are those of the logits before the temperature, which multiplies exponents.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_of_row = products + row * row_stride
    to_exponent = _LOG2_E
    heat = None
    if temperature is not None:
        heat = tl.load(temperature + row)
        to_exponent = _LOG2_E / heat
    maximum = tl.full((BLOCK // GROUP,), -float("inf"), tl.float32)
    sum_exp = tl.zeros((BLOCK // GROUP,), tl.float32)
    weighted = tl.zeros((BLOCK // GROUP,), tl.float32)
    weight_sum = tl.zeros((BLOCK // GROUP,), tl.float32)
    moment = tl.zeros((BLOCK // GROUP,), tl.float32)
    squares = tl.zeros((BLOCK // GROUP,), tl.float32)
    total = tl.zeros((BLOCK // GROUP,), tl.float32)
    best = tl.zeros((BLOCK // GROUP,), tl.int32)
    full = vocab_size // BLOCK * BLOCK
    for LAST in tl.static_range(2):  # the full blocks, whose columns need no mask, then the rest
        for first in range(full * LAST, vocab_size if LAST else full, BLOCK):
            columns = first + tl.arange(0, BLOCK // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
            places = columns.to(tl.int64) * column_stride
            inside = columns < vocab_size
            if LAST:
                block = tl.load(logits_of_row + places, mask=columns < width, other=0.0)
                z = tl.where(inside, _logits(block, scale, softcap, inverse_cap), -float("inf"))
            else:
                z = _logits(tl.load(logits_of_row + places), scale, softcap, inverse_cap)
            largest = tl.max(z, 1)
            if CORRECT >= 0:
                at = tl.min(tl.where(z == largest[:, None], columns, vocab_size), 1)
                best = tl.where(largest > maximum, at, best)
            higher = tl.maximum(maximum, largest)
            base = tl.maximum(higher, _LOWEST)  # a group may begin with entries masked by -inf
            shift = maximum - base
            rescale = tl.exp2(shift * to_exponent)
            shift = tl.maximum(shift, _LOWEST)
            relative = z - base[:, None]
            exponentials = tl.exp2(relative * to_exponent)
            if MEAN >= 0:
                moment = (moment + sum_exp * shift) * rescale
                moment += tl.sum(exponentials * tl.maximum(relative, _LOWEST), 1)
            if WEIGHTED >= 0:
                weight = tl.where(inside, 1.0, 0.0)
                if class_weight is not None:
                    weight = tl.load(class_weight + columns, mask=inside, other=0.0)
                weighted += weight_sum * shift + tl.sum(weight * tl.where(inside, relative, 0.0), 1)
                weight_sum += tl.sum(weight, 1)
            if TOTAL >= 0:
                total += tl.sum(tl.where(inside, z, 0.0), 1)
            if SQUARES >= 0:
                squares = squares * (rescale * rescale) + tl.sum(exponentials * exponentials, 1)
            sum_exp = sum_exp * rescale + tl.sum(exponentials, 1)
            maximum = higher

    highest = tl.max(maximum, 0)
    shift = maximum - tl.maximum(highest, _LOWEST)
    rescale = tl.exp2(shift * to_exponent)
    shift = tl.maximum(shift, _LOWEST)
    column = tl.load(target + row)
    known = (column >= 0) & (column < vocab_size)  # an out-of-range target, reported elsewhere, must not be read
    at_target = tl.load(logits_of_row + column.to(tl.int64) * column_stride, mask=known, other=float("nan"))
    at_target = _logits(at_target, scale, softcap, inverse_cap) - highest
    masked = highest == -float("inf")  # whether every entry of the row is masked
    if not WHOLE:
        at_target = tl.where(column < 0, -float("inf"), at_target)
    out = part + row * part_row_stride
    tl.store(out, _over(highest, heat))
    tl.store(out + LOG_SUM * part_column_stride, tl.where(masked, 0.0, tl.sum(sum_exp * rescale, 0)))
    tl.store(out + TARGET * part_column_stride, tl.where(masked, -float("inf"), _over(at_target, heat)))
    if WEIGHTED >= 0:
        weighted = _over(tl.sum(weighted + weight_sum * shift, 0), heat)
        tl.store(out + WEIGHTED * part_column_stride, tl.where(masked, -float("inf"), weighted))
        tl.store(out + (WEIGHTED + 1) * part_column_stride, tl.sum(weight_sum, 0))
    if MEAN >= 0:
        moment = _over(tl.sum((moment + sum_exp * shift) * rescale, 0), heat)
        tl.store(out + MEAN * part_column_stride, tl.where(masked, 0.0, moment))
    if SQUARES >= 0:
        squares = tl.sum(squares * (rescale * rescale), 0)
        tl.store(out + SQUARES * part_column_stride, tl.where(masked, 0.0, squares))
    if TOTAL >= 0:
        tl.store(out + TOTAL * part_column_stride, _over(tl.sum(total, 0), heat))
    if CORRECT >= 0:
        best = tl.min(tl.where(maximum == highest, best, vocab_size), 0)
        tl.store(out + CORRECT * part_column_stride, (best + start).to(tl.float32))


@jit
def _over(values, heat):
    """A row's ``values`` over its temperature, if there is one, rounded to nearest."""
    if heat is not None:
        values = tl.math.div_rn(values, heat)
    return values


@jit
def _relative(z, maximum, heat):
    """The logits, over the temperature, relative to the row's maximum, which was divided by the temperature."""
    if heat is not None:
        warm = maximum * heat
        lost = tl.fma(maximum, heat, -warm)  # in rounding
        relative = (z - warm) * (1.0 / heat) - lost / heat
    else:
        relative = z - maximum
    return relative


@jit
def _factor(relative, exponentials, log_sum, mean, squares, by_log_sum, by_mean, by_squares):
    """The factor of the probability in the gradient of a logit that is given ``relative`` to the maximum."""
    factor = by_log_sum
    if by_mean is not None:
        factor = factor + by_mean * (tl.maximum(relative, _NO_EXP) + (1.0 - mean))
    if by_squares is not None:
        factor = factor + exponentials * (2.0 * by_squares * _exp(log_sum - squares))
    return factor


@jit
def _of_softmax(relative, log_sum, mean, squares, by_log_sum, by_mean, by_squares):
    """The terms of the statistics of the softmax in the gradients of the logits ``relative`` to the maximum."""
    exponentials = _exp(relative)
    factor = _factor(relative, exponentials, log_sum, mean, squares, by_log_sum, by_mean, by_squares)
    return exponentials * (factor * _exp(-log_sum))


@jit
def _at_target(relative, log_sum, mean, squares, by_log_sum, by_target, by_mean, by_squares):
    """The gradients of the targets' logits, which are given ``relative`` to the maximum."""
    factor = _factor(relative, _exp(relative), log_sum, mean, squares, by_log_sum, by_mean, by_squares)
    return _exp(relative - log_sum) * factor + by_target


@jit
def _through_softcap(gradients, z, inverse_cap):
    """Gradients chained through the softcap, if there is one, given the logits before the temperature."""
    if inverse_cap is not None:
        capped = z * inverse_cap
        gradients *= tl.fma(-capped, capped, 1.0)
    return gradients


@jit(**_VARYING)
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
    width,  # entries of a row that may be read and written: V, or more of padded rows
    blocks,  # per row
    scale,  # or None
    softcap,  # or None
    inverse_cap,  # 1 / softcap, or None
    BLOCK: tl.constexpr,
):
    """The gradients of a block of a row by the formula of `chunked_ce.rows.statistics`, chained through the softcap."""
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    first = (program % blocks) * BLOCK
    columns = first + tl.arange(0, BLOCK)
    by_log_sum = tl.load(log_sum_slope + row)
    by_target = tl.load(target_slope + row)
    alive = (by_log_sum != 0.0) | (by_target != 0.0)
    by_weighted = None
    if weighted_slope is not None:
        by_weighted = tl.load(weighted_slope + row)
        alive |= by_weighted != 0.0
    by_mean = None
    if mean_slope is not None:
        by_mean = tl.load(mean_slope + row)
        alive |= by_mean != 0.0
    by_squares = None
    if squares_slope is not None:
        by_squares = tl.load(squares_slope + row)
        alive |= by_squares != 0.0

    # Nothing else of a row without slopes is read: its gradients are finite numbers times 0.
    maximum = tl.load(row_maximum + row, mask=alive, other=0.0)
    log_sum = tl.load(row_log_sum + row, mask=alive, other=0.0)
    mean = None
    if mean_slope is not None:
        mean = tl.load(row_mean + row, mask=alive, other=0.0)
    squares = None
    if squares_slope is not None:
        squares = tl.load(row_squares + row, mask=alive, other=0.0)
    heat = None
    if temperature is not None:
        heat = tl.load(temperature + row, mask=alive, other=1.0)
    places = columns.to(tl.int64)
    read = columns < tl.where(alive, width, 0)
    block = tl.load(products + row * row_stride + places * column_stride, mask=read, other=0.0)
    z = _logits(block, scale, softcap, inverse_cap)
    relative = _relative(z, maximum, heat)
    gradients = _of_softmax(relative, log_sum, mean, squares, by_log_sum, by_mean, by_squares)
    column = tl.load(target + row) - first
    if (column >= 0) & (column < BLOCK):
        at_target = tl.load(row_target + row, mask=alive, other=0.0)
        at_target = _at_target(at_target, log_sum, mean, squares, by_log_sum, by_target, by_mean, by_squares)
        gradients = tl.where(tl.arange(0, BLOCK) == column.to(tl.int32), at_target, gradients)
    if weighted_slope is not None:
        if class_weight is not None:
            by_weighted = by_weighted * tl.load(class_weight + columns, mask=columns < vocab_size, other=0.0)
        gradients += by_weighted
    gradients = _through_softcap(gradients, z, inverse_cap).to(out.dtype.element_ty)
    tl.store(out + row * out_row_stride + places * out_column_stride, gradients, mask=columns < width)


@jit(**_VARYING)
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
    width,  # entries of a row that may be read and written: V, or more of padded rows
    scale,  # or None
    softcap,  # or None
    inverse_cap,  # 1 / softcap, or None
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`gradients_kernel` for a block of columns of all rows, with the column sums of the gradient filter."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocab_size
    accessed = (columns < width)[None, :]
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
        sign = tl.where(by_log_sum > 0.0, 1.0, tl.where(by_log_sum < 0.0, -1.0, 0.0))[:, None]
        by_log_sum, by_target = by_log_sum[:, None], by_target[:, None]
        by_weighted = None
        if weighted_slope is not None:
            by_weighted = tl.load(weighted_slope + rows, mask=row_mask, other=0.0)
            alive |= by_weighted != 0.0
            by_weighted = by_weighted[:, None]
        by_mean = None
        if mean_slope is not None:
            by_mean = tl.load(mean_slope + rows, mask=row_mask, other=0.0)
            alive |= by_mean != 0.0
            by_mean = by_mean[:, None]
        by_squares = None
        if squares_slope is not None:
            by_squares = tl.load(squares_slope + rows, mask=row_mask, other=0.0)
            alive |= by_squares != 0.0
            by_squares = by_squares[:, None]

        maximum = tl.load(row_maximum + rows, mask=alive, other=0.0)[:, None]
        log_sum = tl.load(row_log_sum + rows, mask=alive, other=0.0)[:, None]
        mean = None
        if mean_slope is not None:
            mean = tl.load(row_mean + rows, mask=alive, other=0.0)[:, None]
        squares = None
        if squares_slope is not None:
            squares = tl.load(row_squares + rows, mask=alive, other=0.0)[:, None]
        heat = None
        if temperature is not None:
            heat = tl.load(temperature + rows, mask=alive, other=1.0)[:, None]
        read = alive[:, None] & accessed
        block = tl.load(products + rows[:, None] * row_stride + places * column_stride, mask=read, other=0.0)
        z = _logits(block, scale, softcap, inverse_cap)
        relative = _relative(z, maximum, heat)
        gradients = _of_softmax(relative, log_sum, mean, squares, by_log_sum, by_mean, by_squares)
        seen = _through_softcap(gradients, z, inverse_cap)
        largest = tl.maximum(largest, tl.max(tl.abs(seen), 0))
        total += tl.sum(sign * seen, 0)
        column = tl.load(target + rows, mask=alive, other=-1).to(tl.int32)[:, None]
        at_target = tl.load(row_target + rows, mask=alive, other=0.0)[:, None]
        at_target = _at_target(at_target, log_sum, mean, squares, by_log_sum, by_target, by_mean, by_squares)
        gradients = tl.where(columns[None, :] == column, at_target, gradients)
        if weighted_slope is not None:
            if class_weight is not None:
                by_weighted = by_weighted * weight
            gradients += by_weighted
        gradients = _through_softcap(gradients, z, inverse_cap).to(out.dtype.element_ty)
        mask = row_mask[:, None] & accessed
        tl.store(out + rows[:, None] * out_row_stride + places * out_column_stride, gradients, mask=mask)
    tl.store(largest_of_column + columns, largest, mask=inside)
    tl.store(total_of_column + columns, total, mask=inside)


@jit
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
