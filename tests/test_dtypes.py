"""Mixed dtypes and autocast: where the products run, and what comes back in which dtype."""

import pytest
import torch

from chunked_ce import LinearCrossEntropyLoss, cross_entropy
from tests.cases import REDUCTIONS, REDUCTIONS_AND_WAYS, WAYS, chunks, full_loss, gradients, problem
from tests.precision import (
    NAMES,
    assert_gradients_no_worse,
    assert_no_worse,
    parts_in,
    plain_and_expected,
)

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def autocast(dtype=torch.bfloat16):
    return torch.autocast("cpu", dtype)


@pytest.mark.parametrize(("reduction", "way"), REDUCTIONS_AND_WAYS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_loss_dtype(dtype, reduction, way):
    """float32, or float64 for float64 input, under every way to compute it."""
    case = problem(9, 4, 7, dtype=dtype)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert case.loss(reduction=reduction, options=chunks(4, way)).dtype == expected
    assert case.loss(reduction=reduction).dtype == expected
    with torch.no_grad():
        assert case.loss(reduction=reduction, options=chunks(4, way)).dtype == expected
    assert [x.dtype for x in case.logprobs(return_entropy=True)] == [expected] * 2
    logits = torch.randn(9, 7, dtype=dtype, requires_grad=True)
    assert cross_entropy(logits, case.target, reduction=reduction).dtype == expected


@pytest.mark.parametrize(("reduction", "way"), REDUCTIONS_AND_WAYS)
@pytest.mark.parametrize("hidden_dtype", FLOATS)
@pytest.mark.parametrize("head_dtype", FLOATS)
def test_input_and_head_of_different_dtypes(hidden_dtype, head_dtype, reduction, way):
    """The products run in the input's dtype; each tensor gets its gradient in its own."""
    case = problem(200, 32, 101, dtype=torch.float32, bias=True)
    hidden = case.hidden.detach().to(hidden_dtype).requires_grad_()
    mixed = case.fresh(hidden=hidden, head=case.head.detach().to(head_dtype).requires_grad_())
    value = mixed.loss(reduction=reduction, options=chunks(33, way))
    assert value.dtype == (torch.float64 if hidden_dtype == torch.float64 else torch.float32)
    got = gradients(value.sum(), mixed)
    assert [g.dtype for g in got] == [hidden_dtype, head_dtype, torch.float32]
    # The head as the product sees it, and the plain loss of one dtype.
    seen = case.fresh(
        hidden=hidden.detach().clone().requires_grad_(),
        head=mixed.head.detach().to(hidden_dtype).requires_grad_(),
        bias=case.bias.detach().to(hidden_dtype).requires_grad_(),
    )
    (plain, plain_gradients), (expected, expected_gradients) = plain_and_expected(seen, reduction=reduction)
    if reduction == "none":
        assert_no_worse(value, plain, expected)
    for name, g, p, e in zip(NAMES, got, plain_gradients, expected_gradients, strict=True):
        assert_no_worse(g, p.to(g.dtype), e, f"gradient of {name}", parts_in(name, way, hidden_dtype))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("inside", [False, True], ids=["backward_outside", "backward_inside"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype, inside, way):
    """Products in bf16, gradients in the parameters' dtype, as exact as the plain loss under autocast."""
    case = problem(200, 32, 101, dtype=torch.float32, bias=True)
    case = case.fresh(hidden=case.hidden.detach().to(dtype).requires_grad_())

    def train(loss):
        with autocast():
            value = loss()
            if inside:
                return value, gradients(value, case)
        return value, gradients(value, case)

    value, got = train(lambda: case.loss(options=chunks(33, way)))
    _, plain_gradients = train(lambda: full_loss(case.hidden, case.head, case.target, case.bias))
    assert value.dtype == torch.float32
    assert [g.dtype for g in got] == [dtype, torch.float32, torch.float32]
    seen = case.fresh(
        **{name: getattr(case, name).detach().bfloat16().requires_grad_() for name in ("hidden", "head", "bias")}
    )
    _, (expected, expected_gradients) = plain_and_expected(seen)
    assert value.item() == pytest.approx(expected, rel=2e-3)
    assert_gradients_no_worse(got, plain_gradients, expected_gradients, way, torch.bfloat16)


def test_autocast_rounds_the_products():
    """Under autocast the inputs are rounded to bf16 first; that shows in the value."""
    case = problem(200, 32, 101, ignored=0.0)
    rounded = case.fresh(hidden=case.hidden.detach().bfloat16().float(), head=case.head.detach().bfloat16().float())
    with autocast():
        value = case.loss(reduction="none")
    exact, seen = case.rows().loss, rounded.rows().loss
    difference = torch.from_numpy(seen - exact).abs().max()
    assert torch.from_numpy(exact).sub(value.detach()).abs().max() > 0.3 * difference


def test_autocast_leaves_float64_alone():
    case = problem(9, 4, 7, dtype=torch.float64)
    expected = case.loss()
    with autocast():
        value = full_loss(case.hidden, case.head, case.target)
        assert value.dtype == torch.float64
        torch.testing.assert_close(case.loss(), expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_cross_entropy_under_autocast(reduction):
    """The logits are there: autocast changes nothing."""
    logits, target = torch.randn(9, 7, requires_grad=True), torch.arange(9) % 7
    expected = cross_entropy(logits, target, reduction=reduction)
    with autocast():
        assert torch.equal(cross_entropy(logits, target, reduction=reduction), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", WAYS)
def test_weights_in_float32(dtype, way):
    """Class and token weights keep their precision whatever the input's dtype."""
    case = problem(60, 16, 31, dtype=dtype)
    weights = {"weight": torch.rand(31) + 1e-3, "token_weight": torch.rand(60) + 1e-3}
    _, stats = case.loss(options=chunks(13, way), return_stats=True, **weights)
    assert stats.num_tokens.item() == pytest.approx(case.rows(**weights).share.sum(), rel=1e-6)
    value = case.loss(options=chunks(13, way), **weights)
    assert value.item() == pytest.approx(case.rows(**weights).reduce("mean")[0], rel=2e-3)


def test_module_moves_its_weights():
    module = LinearCrossEntropyLoss(weight=torch.rand(7)).to(torch.float64)
    case = problem(9, 4, 7, dtype=torch.float64)
    assert module(case.hidden, case.head, case.target).dtype == torch.float64


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_default_dtype_is_without_effect(dtype, way):
    """Model loaders set the default dtype; the numbers come from the inputs alone."""
    case = problem(24, 4, 7, bias=True)
    terms = {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0, "token_weight": torch.rand(24)}

    def everything():
        value, stats = case.loss(options=chunks(5, way), return_stats=True, **terms)
        return [value, *gradients(value, case), *case.logprobs(return_entropy=True)], stats.loss_sum

    expected = everything()
    torch.set_default_dtype(dtype)
    try:
        got = everything()
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
