"""Values and gradients against the float64 reference: random problems, every option, torch's functions."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from chunked_ce import LinearCrossEntropyLoss, cross_entropy, linear_cross_entropy
from tests.cases import (
    REDUCTIONS,
    REDUCTIONS_AND_WAYS,
    WAYS,
    assert_close,
    check_cross_entropy,
    check_logprobs,
    check_loss,
    chunks,
    gradients,
    problem,
)

OPTIONS = {
    "plain": {},
    "label_smoothing": {"label_smoothing": 0.2},
    "uniform": {"label_smoothing": 1.0},
    "weight": {"weight": True},
    "token_weight": {"token_weight": True},
    "z_loss": {"z_loss": 0.05},
    "softcap": {"softcap": 1.5},
    "logit_scale": {"logit_scale": 0.3},
    "negative_scale": {"logit_scale": -0.5},
    "smoothing_and_weight": {"label_smoothing": 0.3, "weight": True, "token_weight": True},
    "all": {
        "label_smoothing": 0.1,
        "weight": True,
        "token_weight": True,
        "z_loss": 0.01,
        "softcap": 4.0,
        "logit_scale": 2.0,
    },
}


def weights(size, dtype, seed=0, zeros=0.0):
    g = torch.Generator().manual_seed(seed)
    kept = torch.rand(size, generator=g) >= zeros
    return ((0.1 + 2 * torch.rand(size, generator=g)) * kept).to(dtype)


def with_tensors(options, case):
    sizes = {"weight": len(case.head), "token_weight": len(case.target)}
    return {k: weights(sizes[k], case.hidden.dtype) if v is True else v for k, v in options.items()}


@st.composite
def problems(draw):
    """A problem of any small shape, with an ignore_index inside or outside the vocabulary."""
    vocab = draw(st.integers(1, 24))
    return problem(
        draw(st.integers(0, 40)),
        draw(st.integers(1, 12)),
        vocab,
        dtype=draw(st.sampled_from([torch.float64, torch.float32])),
        bias=draw(st.booleans()),
        ignored=draw(st.sampled_from([0.0, 0.3, 0.9, 1.0])),
        ignore_index=draw(st.sampled_from([-100, -1, 0, vocab - 1, vocab, 10**6])),
        spread=draw(st.sampled_from([0.1, 1.0, 8.0])),
        seed=draw(st.integers(0, 2**20)),
    )


@st.composite
def terms(draw, case):
    """Any combination of the options that enter the formula."""
    options = {}
    for name, values in {
        "label_smoothing": [0.0, 0.1, 0.5, 1.0],
        "z_loss": [0.0, 1e-4, 0.3],
        "softcap": [None, 1.5, 30.0],
        "logit_scale": [1.0, 0.25, 3.0, -0.5],
    }.items():
        if draw(st.booleans()):
            options[name] = draw(st.sampled_from(values))
    for name, size in {"weight": len(case.head), "token_weight": len(case.target)}.items():
        if draw(st.booleans()):
            zeros = draw(st.sampled_from([0.0, 0.2]))
            options[name] = weights(size, case.hidden.dtype, draw(st.integers(0, 2**20)), zeros)
    return options


def needs_a_denominator(case, options):
    rows = case.rows(**options)
    assume(rows.share.sum() > 0 or not rows.counted.any())


@settings(max_examples=250)
@given(st.data())
def test_linear_cross_entropy_on_random_problems(data):
    case = data.draw(problems())
    options = data.draw(terms(case))
    reduction, way = data.draw(st.sampled_from(REDUCTIONS_AND_WAYS))
    num_tokens = data.draw(st.sampled_from([None, 7, 1000.5])) if reduction == "mean" else None
    if reduction == "mean" and num_tokens is None:
        needs_a_denominator(case, options)
    size = data.draw(st.integers(1, len(case.target) + 1))
    check_loss(case, reduction=reduction, num_tokens=num_tokens, options=chunks(size, way), **options)


@settings(max_examples=80)
@given(st.data())
def test_cross_entropy_on_random_problems(data):
    case = data.draw(problems())
    options = data.draw(terms(case))
    reduction = data.draw(st.sampled_from(REDUCTIONS))
    if reduction == "mean":
        needs_a_denominator(case, options)
    size = data.draw(st.integers(1, len(case.target) + 1))
    logits = F.linear(case.hidden, case.head, case.bias).detach().requires_grad_()
    check_cross_entropy(
        logits,
        case.target,
        ignore_index=case.ignore_index,
        reduction=reduction,
        options=chunks(size),
        **options,
    )


@settings(max_examples=80)
@given(st.data())
def test_linear_logprobs_on_random_problems(data):
    case = data.draw(problems())
    options = {k: v for k, v in data.draw(terms(case)).items() if k in ("softcap", "logit_scale")}
    size = data.draw(st.integers(1, len(case.target) + 1))
    check_logprobs(case, entropy=data.draw(st.booleans()), options=chunks(size), **options)


@pytest.mark.parametrize(("reduction", "way"), REDUCTIONS_AND_WAYS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_each_option(options, bias, reduction, way):
    case = problem(23, 6, 13, bias=bias)
    check_loss(case, reduction=reduction, options=chunks(5, way), **with_tensors(options, case))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_are_chosen_when_none_are_given(options):
    case = problem(23, 6, 13, bias=True)
    for reduction in REDUCTIONS:
        check_loss(case, reduction=reduction, **with_tensors(options, case))
    logits = F.linear(case.hidden, case.head, case.bias).detach().requires_grad_()
    check_cross_entropy(logits, case.target, **with_tensors(options, case))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", [{}, OPTIONS["all"]], ids=["plain", "all"])
def test_width_beyond_512(way, bias, options):
    """peers 7: CCE subtracted the bias once per block of D, which tests with D <= 128 cannot see."""
    for d in (513, 1100):
        case = problem(9, d, 37, bias=bias)
        check_loss(case, options=chunks(4, way), **with_tensors(options, case))
        check_logprobs(case, entropy=True, options=chunks(4))


@pytest.mark.parametrize("way", WAYS)
def test_softcap_of_a_vocabulary_of_odd_size(way):
    """peers 8: CCE masked padding before the softcap, so that padded columns joined the sum."""
    for vocab in (1, 3, 31, 65, 127, 257):
        case = problem(11, 5, vocab, bias=True, spread=20.0)
        for softcap in (0.5, 2.0, 50.0):
            check_loss(case, softcap=softcap, options=chunks(4, way))


@pytest.mark.parametrize("num_tokens", [1, 3, 2.5, torch.tensor(7), torch.tensor(7.0)])
@pytest.mark.parametrize("way", WAYS)
def test_num_tokens_is_the_denominator_of_the_mean(num_tokens, way):
    case = problem(11, 5, 7)
    weighted = {"token_weight": weights(11, torch.float32), "weight": weights(7, torch.float32)}
    for options in ({}, weighted):
        value = case.loss(num_tokens=num_tokens, options=chunks(4, way), **options)
        assert value.shape == ()
        expected = case.loss(reduction="sum", options=chunks(4, way), **options) / float(num_tokens)
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=0.0)
        for got, want in zip(gradients(value, case), gradients(expected, case), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_num_tokens_leaves_the_other_reductions_alone():
    case = problem(11, 5, 7)
    for reduction in ("sum", "none"):
        torch.testing.assert_close(
            case.loss(reduction=reduction, num_tokens=3), case.loss(reduction=reduction), rtol=0, atol=0
        )


@pytest.mark.parametrize("way", WAYS)
def test_chunk_size_does_not_matter(way):
    case = problem(29, 6, 13, dtype=torch.float64)
    whole = case.loss(options=chunks(29, way))
    expected = gradients(whole, case)
    for size in (1, 2, 7, 28, 30, 10**9):
        value = case.loss(options=chunks(size, way))
        torch.testing.assert_close(value, whole, rtol=1e-14, atol=0.0)
        for got, want in zip(gradients(value, case), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("changed", "reference"),
    [
        ({"label_smoothing": 0.1001}, {"label_smoothing": 0.1}),
        ({"z_loss": 1.0001e-2}, {"z_loss": 1e-2}),
        ({"softcap": 3.001}, {"softcap": 3.0}),
        ({"logit_scale": 1.00005}, {}),
        ({"token_weight": torch.full((23,), 1.00001)}, {}),
    ],
    ids=lambda x: ",".join(x),
)
def test_the_bounds_notice_small_mistakes(changed, reference):
    """peers 15: a tolerance that cannot fail is a defect; these mistakes are of 1e-5 to 1e-3."""
    case = problem(23, 6, 13)
    value, scale = case.rows(**reference).reduce("sum")
    assert_close(case.loss(reduction="sum", **reference), value, scale, torch.float32)
    with pytest.raises(AssertionError, match="elements are off"):
        assert_close(case.loss(reduction="sum", **changed), value, scale, torch.float32)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_same_call_as_torch(reduction, label_smoothing, weighted, bias):
    """Changing the import of torch's linear_cross_entropy changes nothing else."""
    theirs = pytest.importorskip("torch", minversion="2.13").nn.functional.linear_cross_entropy
    case = problem(23, 6, 13, bias=bias)
    keywords = {"reduction": reduction, "label_smoothing": label_smoothing, "linear_bias": case.bias}
    keywords["weight"] = weights(13, torch.float32) if weighted else None
    for ignored in ({}, {"ignore_index": -100}, {"ignore_index": 3}):
        expected = theirs(case.hidden, case.head, case.target.where(case.target >= 0, 3), **keywords, **ignored)
        value = linear_cross_entropy(
            case.hidden, case.head, case.target.where(case.target >= 0, 3), **keywords, **ignored
        )
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
        for got, want in zip(
            gradients(value.sum(), case),
            gradients(expected.sum(), case),
            strict=True,
        ):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_cross_entropy_is_torchs(reduction):
    logits, target = torch.randn(9, 5, requires_grad=True), torch.tensor([0, 4, -100, 2, 2, 1, -100, 3, 0])
    keywords = {"weight": torch.rand(5), "label_smoothing": 0.1, "reduction": reduction}
    torch.testing.assert_close(cross_entropy(logits, target, **keywords), F.cross_entropy(logits, target, **keywords))


@pytest.mark.parametrize(("reduction", "way"), REDUCTIONS_AND_WAYS)
def test_module_equals_function(reduction, way):
    case = problem(12, 6, 13, bias=True)
    keywords = {
        "weight": weights(13, torch.float32),
        "label_smoothing": 0.1,
        "z_loss": 0.01,
        "softcap": 5.0,
        "logit_scale": 0.5,
        "reduction": reduction,
        "ignore_index": 3,
        "options": chunks(5, way),
    }
    call = {"linear_bias": case.bias, "token_weight": weights(12, torch.float32)}
    target = case.target.where(case.target >= 0, 3)
    module = LinearCrossEntropyLoss(**keywords)
    assert isinstance(module, torch.nn.Module)
    assert not list(module.parameters())
    value = module(case.hidden, case.head, target, **call)
    expected = linear_cross_entropy(case.hidden, case.head, target, **keywords, **call)
    torch.testing.assert_close(value, expected, rtol=0, atol=0)
    torch.testing.assert_close(gradients(value.sum(), case), gradients(expected.sum(), case))


def test_module_returns_stats():
    case = problem(12, 6, 13)
    loss, stats = LinearCrossEntropyLoss(return_stats=True)(case.hidden, case.head, case.target)
    expected, expected_stats = linear_cross_entropy(case.hidden, case.head, case.target, return_stats=True)
    assert loss.item() == expected.item()
    assert stats.loss_sum.item() == expected_stats.loss_sum.item()


@pytest.mark.parametrize("way", WAYS)
def test_same_numbers_every_time(way):
    case = problem(29, 6, 13)
    first, second = (case.loss(options=chunks(4, way)) for _ in range(2))
    assert first.item() == second.item()
    for a, b in zip(*(gradients(v, case) for v in (first, second)), strict=True):
        assert torch.equal(a, b)
