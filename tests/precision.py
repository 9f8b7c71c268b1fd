"""The bound on rounding errors: those of the plain loss in the same dtype, against the float64 reference.

peers 15: `F.cross_entropy(F.linear(h, W).float(), y)` of the same dtype sets the bound, so no bound is tuned.
Errors are compared as root mean square (which a few unlucky elements cannot move) and as maximum.
"""

import math

import torch

from tests.cases import array, full_loss, gradients

LOW = (torch.bfloat16, torch.float16)
FP32 = torch.finfo(torch.float32).eps

# The plain loss and ours round the same logits, but sum the products in other orders, so that single
# roundings fall differently: 5% of the rms and 25% of the maximum cover that over the elements compared here.
RMS_SLACK, MAX_SLACK = 1.05, 1.25


def errors(actual, expected):
    """Root mean square and maximum."""
    difference = array(actual) - expected
    return math.sqrt((difference**2).mean()), abs(difference).max()


def assert_no_worse(actual, plain, expected, what="value", parts_in=None, max_slack=MAX_SLACK):
    """rms and maximal error of `actual` within those of `plain`, and a few fp32 roundings.

    `parts_in` is for a sum over chunks whose products come rounded to that dtype, where the device gives no
    fp32 product. The plain loss has one product, so the roundings of the parts come on top. Parts are
    together about as large as their sum: that equals one rounding of the sum, independent of other errors.
    """
    floor = 4 * FP32 * abs(expected).max()
    ours, theirs = errors(actual, expected), errors(plain, expected)
    part_rms, part_max = (0.0, 0.0) if parts_in is None else errors(rounded(expected, parts_in), expected)
    for name, error, bound in (
        ("rms", ours[0], RMS_SLACK * math.hypot(theirs[0], part_rms)),
        ("max", ours[1], max_slack * (theirs[1] + part_max)),
    ):
        assert error <= bound + floor, f"{name} error of {what}: {error:.3g}, allowed {bound:.3g}"


def rounded(x, dtype):
    return torch.from_numpy(x).to(dtype)


def parts_in(name, way, dtype):
    """The dtype of the parts of a gradient that is a sum over chunks, of tokens or of words."""
    return dtype if dtype in LOW and (name, way) in PARTS else None


PARTS = {("linear_weight", "forward"), ("input", "backward")}  # sums over tokens, over words
NAMES = ("input", "linear_weight", "linear_bias")


def assert_gradients_no_worse(got, plain, expected, way, dtype):
    for name, g, p, e in zip(NAMES, got, plain, expected, strict=False):
        assert_no_worse(g, p, e, f"gradient of {name}", parts_in(name, way, dtype))


def plain_and_expected(case, upstream=None, reduction="mean"):
    """Value and gradients of the full-logits loss, and the reference for both."""
    value = full_loss(
        case.hidden, case.head, case.target, case.bias, reduction=reduction, ignore_index=case.ignore_index
    )
    upstream = torch.ones_like(value) if upstream is None else upstream
    reference = case.rows()
    coefficient = array(upstream) * reference.coefficient(reduction)
    expected = reference.gradients("loss", array(case.hidden), array(case.head), coefficient)
    return (
        (value, gradients(value, case, upstream)),
        (reference.reduce(reduction)[0], [pair[0] for pair in expected]),
    )
