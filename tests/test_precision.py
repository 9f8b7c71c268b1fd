"""Errors against the float64 reference of the same rounded inputs, within those of the plain loss (peers 15)."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from chunked_ce import ChunkOptions, cross_entropy, linear_cross_entropy
from tests.cases import REDUCTIONS_AND_WAYS, WAYS, array, chunks, full_loss, gradients, problem
from tests.fuzz import Case, Ratios, check, inputs, ours, plain
from tests.precision import (
    FP32,
    LOW,
    NAMES,
    RMS_SLACK,
    assert_gradients_no_worse,
    assert_no_worse,
    errors,
    plain_and_expected,
)

DTYPES = (*LOW, torch.float32)

SHAPES = {
    "one_chunk": (200, 64, 501, 200),
    "several_chunks": (200, 64, 501, 33),
    "wide": (150, 700, 301, 50),  # peers 7: D beyond the 512 of a block
    "256_chunks": (512, 32, 301, 2),
}


# A bias is a sum over tokens of its own; many chunks without one take longest, and only leave it out.
SHAPES_AND_BIASES = [
    pytest.param(shape, bias, id=f"{name}-{bias}", marks=[pytest.mark.thorough] * (name == "256_chunks" and not bias))
    for name, shape in SHAPES.items()
    for bias in (False, True)
]


@pytest.mark.parametrize(("reduction", "way"), REDUCTIONS_AND_WAYS)
@pytest.mark.parametrize(("shape", "bias"), SHAPES_AND_BIASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_worse_than_plain(dtype, bias, shape, reduction, way):
    """peers 1, 7, 15: loss and gradients of many chunks are as exact as those of one product."""
    n, d, vocab, size = shape
    case = problem(n, d, vocab, dtype=dtype, bias=bias, spread=2.0)
    (plain, plain_gradients), (expected, expected_gradients) = plain_and_expected(case, reduction=reduction)
    value = case.loss(reduction=reduction, options=chunks(size, way))
    assert value.dtype == torch.float32
    if reduction == "none":
        assert_no_worse(value, plain, expected)
    got = gradients(value, case, torch.ones_like(value))
    assert {g.dtype for g in got} == {dtype}
    assert_gradients_no_worse(got, plain_gradients, expected_gradients, way, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("terms", [{}, {"softcap": 5.0}], ids=["plain", "softcap"])
def test_log_probabilities_no_worse_than_plain(dtype, terms):
    case = problem(200, 64, 501, dtype=dtype, spread=2.0)
    reference = case.rows(**terms)
    logprobs, entropy = case.logprobs(options=chunks(33), return_entropy=True, **terms)
    assert logprobs.dtype == entropy.dtype == torch.float32
    z = F.linear(case.hidden, case.head).float()
    z = z if not terms else terms["softcap"] * torch.tanh(z / terms["softcap"])
    logp = z.log_softmax(1)
    counted = case.target != -100
    plain = logp.gather(1, case.target.clamp(min=0)[:, None])[:, 0] * counted
    assert_no_worse(logprobs, plain, reference.logprob)
    assert_no_worse(entropy, -(logp.exp() * logp).sum(1) * counted, reference.entropy)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_scalar_loss_over_256_chunks(dtype, reduction, way):
    """peers 1: torch 2.13 sums chunks in bf16 and returns 8.000 for 8.1625 at 256 chunks."""
    case = problem(1024, 16, 3000, dtype=dtype, ignored=0.0, spread=0.1)
    reference = case.rows()
    expected, _ = reference.reduce(reduction)
    assert reference.reduce("mean")[0] > 8
    value = case.loss(reduction=reduction, options=chunks(4, way))
    # The logits of 1,024 tokens carry independent roundings, whose mean is 32 times smaller than one of them.
    rounding_of_a_token, _ = errors(full_loss(case.hidden, case.head, case.target, reduction="none"), reference.loss)
    allowed = 5 * rounding_of_a_token / 32 + 8 * FP32 * reference.reduce("mean")[0]
    assert abs(value.item() - expected) <= allowed * (1 if reduction == "mean" else 1024)
    assert allowed < 1e-3


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", LOW)
def test_large_true_sum(dtype, way):
    """peers 1: torch 2.13 returns 24064 for a true sum of 28650; in fp16 the sum would not even exist."""
    case = problem(2000, 8, 100, dtype=dtype, ignored=0.0, spread=30.0)
    (plain, plain_gradients), (expected, expected_gradients) = plain_and_expected(case, reduction="sum")
    assert expected > 100_000  # beyond fp16's 65,504
    value = case.loss(reduction="sum", options=chunks(100, way))
    assert value.item() == pytest.approx(expected, rel=1e-5)
    assert plain.item() == pytest.approx(expected, rel=1e-5)
    assert_gradients_no_worse(gradients(value, case), plain_gradients, expected_gradients, way, dtype)


@pytest.mark.parametrize("way", WAYS)
def test_head_gradient_over_256_equal_chunks(way):
    """peers 1: 256 equal parts added up in bf16 stop growing; Liger's default doubles dW's error."""
    row = problem(2, 8, 30, dtype=torch.bfloat16, ignored=0.0)
    case = row.fresh(hidden=row.hidden.detach().repeat(256, 1).requires_grad_(), target=row.target.repeat(256))
    (_, plain), (_, expected) = plain_and_expected(case, reduction="sum")
    got = gradients(case.loss(reduction="sum", options=chunks(2, way)), case)
    # All parts are rounded alike and do not average out: one bf16 rounding of a part, one of the sum.
    assert errors(got[1], expected[1])[0] <= 2 * errors(plain[1], expected[1])[0]
    stalled = torch.zeros_like(row.head.detach())
    part = (expected[1] / 256).astype("float32")
    for _ in range(256):
        stalled += torch.from_numpy(part).bfloat16()
    assert errors(stalled, expected[1])[0] > 4 * errors(plain[1], expected[1])[0]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gap", [5.0, 8.0, 10.0, 12.0, 14.0])
@pytest.mark.parametrize("offset", [0.0, 64.0])
def test_confident_prediction(gap, offset, dtype, way):
    """peers 6: `p - 1` rounded to bf16 is 0 or -1/256 when the target's p is within 1e-6 of 1 (Liger, fixed).

    The logits are exact in every format. A row's own offset must not cost precision either, as it costs the
    plain loss none: p is formed from logits less their maximum.
    """
    logits = torch.tensor([[gap + offset, offset, offset], [offset, offset + gap, offset]], dtype=torch.float64)
    expected = logits.softmax(1) - F.one_hot(torch.tensor([0, 1]), 3)
    assert 1e-6 < -expected[0, 0] < 0.014
    hidden = torch.eye(2, dtype=dtype, requires_grad=True)
    head = logits.t().to(dtype).requires_grad_()
    value = linear_cross_entropy(hidden, head, torch.tensor([0, 1]), reduction="sum", options=chunks(1, way))
    # With one-hot hidden states, column i of the head's gradient is the gradient of row i's logits.
    got = torch.autograd.grad(value, head)[0].t().double()
    doubt = -expected[0, 0].item()  # 1 - p
    allowed = 2 * torch.finfo(dtype).eps + 2 * FP32 / doubt
    assert ((got - expected).abs() <= allowed * expected.abs()).all(), got / expected - 1
    ours = linear_cross_entropy(hidden, head, torch.tensor([0, 1]), reduction="none").double()
    exact = -logits.log_softmax(1).diagonal()
    assert ((ours - exact).abs() <= FP32 * (1 + exact)).all(), ours - exact  # the rounding of a sum just above 1


def test_confident_prediction_of_logits():
    """peers 6: the same for logits that exist."""
    for dtype in DTYPES:
        for gap in (5.0, 8.0, 12.0, 14.0):
            logits = torch.tensor([[gap + 64, 64.0, 64.0]], dtype=dtype, requires_grad=True)
            (got,) = torch.autograd.grad(cross_entropy(logits, torch.tensor([0])), logits)
            expected = logits.detach().double().softmax(1) - torch.tensor([[1.0, 0.0, 0.0]])
            allowed = 2 * torch.finfo(dtype).eps + 2 * FP32 / expected[0, 0].abs()
            assert ((got.double() - expected).abs() <= allowed * expected.abs()).all(), (dtype, gap)


@pytest.mark.parametrize("offset", [0.0, 256.0, 8192.0, -8192.0])
@pytest.mark.parametrize("way", WAYS)
def test_shifted_logits(offset, way):
    """A constant added to all logits (exactly: they are quarters) costs the plain loss nothing, so nor us."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randint(-3, 4, (40, 6), generator=g).float().requires_grad_()
    head = (torch.randint(-3, 4, (50, 6), generator=g) / 4).requires_grad_()
    bias = torch.full((50,), offset, requires_grad=True)
    target = torch.randint(50, (40,), generator=g)
    case = problem(1, 1, 1).fresh(hidden=hidden, head=head, bias=bias, target=target)
    (plain, plain_gradients), (expected, expected_gradients) = plain_and_expected(case, reduction="none")
    value = case.loss(reduction="none", options=chunks(7))
    assert_no_worse(value, plain, expected)
    total = case.loss(reduction="sum", options=chunks(7, way))
    for g, p, e in zip(gradients(total, case), plain_gradients, expected_gradients, strict=True):
        assert_no_worse(g, p, e)


@pytest.mark.parametrize("way", WAYS)
def test_fp16_mean_over_many_tokens(way):
    """A share of a mean over a million tokens is below fp16's smallest number; its scaled gradient is not.

    Gradients divided by the count before they are rounded to fp16 would be 0.
    """
    case = problem(256, 16, 100, dtype=torch.float16, ignored=0.0)
    (_, plain), (_, expected) = plain_and_expected(case, torch.tensor(65536e-6), "sum")
    assert torch.finfo(torch.float16).smallest_normal > 50e-6
    got = gradients(case.loss(num_tokens=10**6, options=chunks(64, way)) * 65536, case)
    assert_gradients_no_worse(got, plain, expected, way, torch.float16)


@pytest.mark.parametrize("way", WAYS)
def test_fp16_loss_scale(way):
    """A gradient scaler's 65,536 is the upstream gradient: it goes in once, at the end."""
    case = problem(1024, 16, 1000, dtype=torch.float16, ignored=0.0, spread=0.5)
    reference = case.rows()
    coefficient = 65536 * reference.coefficient("mean")
    expected = reference.gradients("loss", array(case.hidden), array(case.head), coefficient)
    got = gradients(case.loss(options=chunks(256, way)) * 65536, case)
    for g, (e, _) in zip(got, expected, strict=False):
        assert g.isfinite().all()
        assert errors(g, e)[0] <= 2**-10 * math.sqrt((e**2).mean())


def assert_case(**changes):
    """The rule of `tests.fuzz` for one of its cases."""
    case = replace(PLAIN, **changes)
    assert [finding for finding in check(case) if finding.fails] == []


PLAIN = Case(
    number=0,
    dtype=torch.float32,
    tokens=200,
    hidden=32,
    vocab=300,
    way="forward",
    reduction="mean",
    chunk=40,
    upstream=1.0,
    spread=1.0,
    confidence=0.0,
    bias=True,
    ignored=0.2,
    label_smoothing=0.0,
    z_loss=0.0,
    softcap=None,
    logit_scale=1.0,
    class_weight=None,
    token_weight=None,
    decades=1.0,
    num_tokens=None,
    accumulate=None,
)


@pytest.mark.parametrize("kind", ["class_weight", "token_weight"])
@pytest.mark.parametrize("size", [2e-5, 1e-7, 1e5])
def test_fp16_weights_of_all_sizes(size, kind):
    """Their mean is no smaller and no larger than that of weights of one: so are the gradients of a chunk's logits."""
    for chunk in (1, 40, None):
        assert_case(dtype=torch.float16, chunk=chunk, **{kind: size})


@pytest.mark.parametrize("way", WAYS)
def test_fp16_loss_scale_of_confident_tokens(way):
    """What 65,536 lifts into the range of fp16 in the plain loss does not vanish in ours."""
    case = replace(PLAIN, dtype=torch.float16, way=way, upstream=65536.0, confidence=10.0)
    given = inputs(case)
    _, _, got, _ = ours(case, given)
    _, _, expected, _ = plain(case, given, torch.float16)
    assert (got == 0).sum() <= (expected == 0).sum()
    assert_case(**{name: getattr(case, name) for name in ("dtype", "way", "upstream", "confidence")})


def test_fp16_sum_of_large_weights_and_a_small_upstream_gradient():
    """What is infinite before the upstream gradient is known may be small with it."""
    assert_case(dtype=torch.float16, reduction="sum", token_weight=1e5, upstream=1e-6)
    case = problem(20, 8, 50, dtype=torch.float16)
    weight = torch.full((20,), 1e5)
    for grad in gradients(case.loss(reduction="sum", token_weight=weight) * 0.0, case):
        assert grad.count_nonzero() == 0


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("chunk", [None, 33])
@pytest.mark.parametrize("dtype", LOW)
def test_any_upstream_gradient(dtype, chunk, reduction):
    """A gradient that is scaled in the backward is rounded no more often than the plain loss's."""
    ratios = Ratios()
    for at in range(40):  # mantissas from 1 to 2: each rounds what it is a factor of in its own way
        case = replace(PLAIN, number=at, dtype=dtype, chunk=chunk, reduction=reduction, upstream=2 ** (at / 40))
        ratios.add(case, check(case))
    means = {key.split()[-1]: mean for key, mean, *_ in ratios}
    assert set(means) == {"loss", *NAMES}
    assert all(mean <= RMS_SLACK for mean in means.values()), means


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 199])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_confident_tokens_in_the_backward_way(reduction, chunk, dtype):
    """Logits formed again in another product differ by more than 1 - p: by 775 times the plain error."""
    assert_case(dtype=dtype, way="backward", reduction=reduction, chunk=chunk, confidence=30.0, ignored=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunk", [1, 7, None])
@pytest.mark.parametrize("size", [1.0, 1e3])
def test_a_gradient_added_to_a_larger_one(size, chunk, dtype):
    """A product that adds to it term by term rounds each time: 3 to 3,000 times the plain error."""
    assert_case(dtype=dtype, way="backward", chunk=chunk, accumulate=size)


@pytest.mark.parametrize("way", WAYS)
def test_the_sum_of_many_chunks(way):
    """Losses added one after another in fp32 were off by 1e-4 after 20,000 chunks."""
    assert_case(way=way, reduction="sum", tokens=5000, hidden=1, vocab=3, chunk=1, bias=False)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_denominator_without_an_inverse(dtype, way):
    """1 / 2e-39 is infinite in fp32, a weight of 1e-39 over it is not."""
    assert_case(dtype=dtype, way=way, token_weight=1e-39, tokens=3, ignored=0.0)
    assert_case(dtype=dtype, way=way, class_weight=1e-39, tokens=3, ignored=0.0)


def test_a_denominator_without_an_inverse_of_logits():
    """All tokens have the same weight, so that it has no effect on their mean."""
    logits, target = torch.randn(3, 7, requires_grad=True), torch.tensor([1, 2, 3])
    found = cross_entropy(logits, target, token_weight=torch.full((3,), 1e-39))
    expected = F.cross_entropy(logits.double(), target)
    torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=0)
    ours, exact = (torch.autograd.grad(loss, logits)[0] for loss in (found, expected))
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-8)


def test_fp16_words_that_their_sum_does_not_show():
    """The others' probabilities round to a sum of 0 beside the target's 1; 65,536 lifts each into fp16's range."""
    logits = torch.zeros(2, 8).index_fill_(1, torch.tensor([3]), 18.0)  # 1 - p is 1e-7 and lost beside 1
    hidden = torch.eye(2, dtype=torch.float16)
    head = logits.t().half().requires_grad_()
    value = linear_cross_entropy(hidden, head, torch.tensor([3, 3]), options=chunks(1)) * 65536
    (got,) = torch.autograd.grad(value, head)
    expected = 65536 / 2 * logits.double().softmax(1)
    others = [word for word in range(8) if word != 3]
    torch.testing.assert_close(got.t().double()[:, others], expected[:, others], rtol=2e-3, atol=0)


def test_fp16_chunks_whose_weights_are_far_apart():
    """A chunk of hardly any weight does not lift the sums of those before it out of the range of fp32."""
    weight = torch.tensor([1e10, 1e-35])
    case = problem(2, 8, 20, dtype=torch.float16, ignored=0.0)
    value = case.loss(reduction="sum", token_weight=weight, options=chunks(1)) * 1e-8
    (_, plain), (_, expected) = plain_and_expected(case, weight * 1e-8, "none")
    assert_gradients_no_worse(gradients(value, case), plain, expected, "forward", torch.float16)


def test_head_gradient_summed_in_float64():
    """What fp32 would drop beside a first large part: the targets' share of bf16 chunks is summed in float64 too."""
    hidden = torch.tensor([[1.0], [2.0**-30], [2.0**-30]], dtype=torch.bfloat16)
    head = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)
    options = ChunkOptions(chunk_size=1, accumulate_dtype=torch.float64)
    value = linear_cross_entropy(hidden, head, torch.zeros(3, dtype=torch.int64), reduction="sum", options=options)
    (got,) = torch.autograd.grad(value, head)
    assert got.flatten().tolist() == [-0.5 - 2.0**-30, 0.5 + 2.0**-30]
