"""Shapes, layouts and contents at the edge: nothing to count, garbage where nothing counts, huge logits."""

import pytest
import torch
import torch.nn.functional as F

from chunked_ce import LinearCrossEntropyLoss, cross_entropy, linear_cross_entropy, linear_logprobs
from tests.cases import (
    REDUCTIONS,
    REDUCTIONS_AND_WAYS,
    WAYS,
    assert_equal,
    check_cross_entropy,
    check_logprobs,
    check_loss,
    chunks,
    full_loss,
    gradients,
    problem,
)


@pytest.mark.parametrize(("reduction", "way"), REDUCTIONS_AND_WAYS)
@pytest.mark.parametrize("n", [1, 2, 13, 16, 17, 33])
@pytest.mark.parametrize("vocab", [1, 2, 33])
def test_sizes(n, vocab, reduction, way):
    """One token, a prime number of tokens, one more than a chunk; a vocabulary of one word, an odd one."""
    check_loss(problem(n, 3, vocab, ignored=0.0), reduction=reduction, options=chunks(16, way))


@pytest.mark.parametrize("gradients_of", ["linear_cross_entropy", "cross_entropy", "linear_logprobs"])
@pytest.mark.parametrize("width", [1, 7])
def test_width_of_one(gradients_of, width):
    case = problem(9, width, 5, bias=True)
    if gradients_of == "linear_cross_entropy":
        check_loss(case)
    elif gradients_of == "cross_entropy":
        check_cross_entropy(F.linear(case.hidden, case.head).detach().requires_grad_(), case.target)
    else:
        check_logprobs(case, entropy=True)


# --- nothing counts ---


def assert_zero(value, leaves):
    assert value.requires_grad
    assert torch.equal(value, torch.zeros_like(value))
    for x, g in zip(leaves, torch.autograd.grad(value.sum(), leaves, retain_graph=True), strict=True):
        assert torch.equal(g, torch.zeros_like(x))


@pytest.mark.parametrize(("reduction", "way"), [*REDUCTIONS_AND_WAYS, *((r, "auto") for r in REDUCTIONS)])
@pytest.mark.parametrize("n", [0, 1, 9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_no_token_counts(n, dtype, reduction, way):
    """peers 4: torch and CCE return NaN when all is ignored, Liger divides by zero on an empty batch."""
    case = problem(n, 3, 5, bias=True, ignored=1.1, dtype=dtype)
    value = case.loss(reduction=reduction, options=chunks(4, way))
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert value.shape == ((n,) if reduction == "none" else ())
    assert_zero(value, case.leaves())


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("n", [0, 9])
def test_no_token_counts_with_every_option(n, reduction):
    """peers 4: class weights, smoothing, z-loss and token weights find nothing to divide by either."""
    case = problem(n, 3, 5, bias=True, ignored=1.1)
    terms = {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0, "logit_scale": 2.0}
    value = case.loss(reduction=reduction, weight=torch.rand(5), token_weight=torch.rand(n), **terms)
    assert_zero(value, case.leaves())


@pytest.mark.parametrize("n", [0, 9])
def test_no_token_counts_in_the_other_functions(n):
    """peers 4: the same for logits and log-probabilities."""
    case = problem(n, 3, 5, bias=True, ignored=1.1)
    for reduction in REDUCTIONS:
        logits = torch.randn(n, 5, requires_grad=True)
        assert_zero(cross_entropy(logits, case.target, reduction=reduction), [logits])
    assert_zero(case.logprobs(), case.leaves())
    for value in case.logprobs(return_entropy=True):
        assert_zero(value, case.leaves())


@pytest.mark.parametrize("num_tokens", [0, 0.0, torch.tensor(0), 12, torch.tensor(12.0)])
def test_no_token_counts_here_but_elsewhere(num_tokens):
    """peers 4: a rank without tokens divides its 0 by the global count, which may be 0 too."""
    case = problem(9, 3, 5, ignored=1.1)
    assert_zero(case.loss(num_tokens=num_tokens), case.leaves())


@pytest.mark.parametrize("way", WAYS)
def test_every_weight_is_zero(way):
    """The denominator of the mean is 0: never NaN."""
    case = problem(9, 3, 5)
    assert_zero(case.loss(token_weight=torch.zeros(9), options=chunks(4, way)), case.leaves())


@pytest.mark.parametrize("way", WAYS)
def test_some_chunks_hold_no_token(way):
    case = problem(24, 3, 5, ignored=0.0)
    case.target[:8] = -100
    case.target[16:] = -100
    check_loss(case, options=chunks(4, way))


# --- garbage in ignored rows ---


@pytest.mark.parametrize(("reduction", "way"), REDUCTIONS_AND_WAYS)
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_garbage_in_ignored_rows(garbage, reduction, way):
    """Value and gradients are those of a clean input bit by bit, and an ignored row gets exactly 0."""
    clean = problem(24, 4, 7, bias=True)
    ignored = clean.target == -100
    dirty = clean.fresh()
    with torch.no_grad():
        dirty.hidden[ignored] = garbage
    token_weight = torch.ones(24)
    terms = {"label_smoothing": 0.1, "z_loss": 0.1, "options": chunks(5, way), "reduction": reduction}
    expected = clean.loss(token_weight=token_weight, **terms)
    value = dirty.loss(token_weight=token_weight.masked_fill(ignored, garbage), **terms)
    assert torch.equal(value, expected)
    got = gradients(value.sum(), dirty)
    assert_equal(got, gradients(expected.sum(), clean))
    assert (got[0][ignored] == 0).all()


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
def test_garbage_in_ignored_rows_of_the_other_functions(garbage):
    case = problem(24, 4, 7)
    ignored = case.target == -100
    for reduction in REDUCTIONS:
        logits = F.linear(case.hidden, case.head).detach()
        dirty = torch.where(ignored[:, None], garbage, logits).requires_grad_()
        clean = logits.clone().requires_grad_()
        terms = {"label_smoothing": 0.1, "reduction": reduction, "options": chunks(5)}
        value, expected = (cross_entropy(x, case.target, **terms) for x in (dirty, clean))
        assert torch.equal(value, expected)
        (got,), (want,) = torch.autograd.grad(value.sum(), dirty), torch.autograd.grad(expected.sum(), clean)
        assert torch.equal(got, want)
    dirty = case.fresh()
    with torch.no_grad():
        dirty.hidden[ignored] = garbage
    for value, expected in zip(dirty.logprobs(return_entropy=True), case.logprobs(return_entropy=True), strict=True):
        assert torch.equal(value, expected)
        assert (value[ignored] == 0).all()
        got = gradients(value.sum(), dirty, retain_graph=True)
        assert_equal(got, gradients(expected.sum(), case, retain_graph=True))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nan_in_a_counted_row_is_not_hidden(reduction):
    case = problem(8, 4, 7, ignored=0.0)
    with torch.no_grad():
        case.hidden[3, 0] = torch.nan
    value = case.loss(reduction=reduction)
    assert torch.isnan(value.sum())
    assert reduction != "none" or (torch.isnan(value) == (torch.arange(8) == 3)).all()
    assert torch.isnan(gradients(value.sum(), case)[0][3]).any()


# --- huge logits ---


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("terms", [{}, {"label_smoothing": 0.1}, {"z_loss": 1e-3}, {"softcap": 30.0}])
def test_huge_logits(dtype, terms, way):
    case = problem(13, 5, 11, dtype=dtype, bias=True, spread=1e4)
    value = case.loss(options=chunks(4, way), **terms)
    assert value.isfinite()
    check_loss(case, options=chunks(4, way), **terms)
    check_loss(case, reduction="none", options=chunks(4), **terms)
    check_logprobs(case, entropy=True)


@pytest.mark.parametrize("way", WAYS)
def test_masked_words(way):
    """A bias of -inf takes words out of the vocabulary: a probability of 0, no NaN from 0 * inf."""
    case = problem(13, 5, 11, bias=True, ignored=0.0)
    with torch.no_grad():
        case.bias[[0, 7, 10]] = -torch.inf
    case.target[:] = torch.tensor([1, 2, 3, 4, 5, 6, 8, 9, 1, 2, 3, 4, 5])
    for terms in ({}, {"z_loss": 0.1}, {"softcap": None, "logit_scale": 0.5}):
        for reduction in REDUCTIONS:
            check_loss(case, reduction=reduction, options=chunks(4, way if reduction != "none" else "auto"), **terms)
    logits = F.linear(case.hidden, case.head, case.bias).detach().requires_grad_()
    check_cross_entropy(logits, case.target)
    check_logprobs(case, entropy=True, options=chunks(4))


@pytest.mark.parametrize("way", WAYS)
def test_target_of_probability_zero(way):
    """The loss of an impossible word is infinite, as torch's."""
    case = problem(4, 5, 11, bias=True, ignored=0.0)
    with torch.no_grad():
        case.bias[case.target[0]] = -torch.inf
    assert case.loss(options=chunks(4, way)).item() == torch.inf


# --- shapes and layouts ---


@pytest.mark.parametrize(("reduction", "way"), REDUCTIONS_AND_WAYS)
@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 3, 4), (0,), (2, 0), (2, 1, 0, 3)])
def test_leading_dimensions(shape, reduction, way):
    flat = problem(max(1, torch.Size(shape).numel()), 4, 7, bias=True)
    n = torch.Size(shape).numel()
    hidden = flat.hidden.detach()[:n].reshape(*shape, 4).requires_grad_()
    target, token_weight = flat.target[:n].reshape(shape), torch.rand(n).reshape(shape)
    terms = {"linear_bias": flat.bias, "reduction": reduction, "options": chunks(4, way)}
    value = linear_cross_entropy(hidden, flat.head, target, token_weight=token_weight, **terms)
    assert value.shape == (shape if reduction == "none" else ())
    expected_hidden = hidden.detach().reshape(-1, 4).requires_grad_()
    expected = linear_cross_entropy(
        expected_hidden, flat.head, target.flatten(), token_weight=token_weight.flatten(), **terms
    )
    assert_equal([value.flatten()], [expected.flatten()])
    got = torch.autograd.grad(value.sum(), [hidden, flat.head, flat.bias])
    want = torch.autograd.grad(expected.sum(), [expected_hidden, flat.head, flat.bias])
    assert got[0].shape == hidden.shape
    assert_equal([got[0].reshape(-1, 4), *got[1:]], want)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 0)])
def test_leading_dimensions_of_the_other_functions(shape):
    logits, target = torch.randn(*shape, 7, requires_grad=True), torch.randint(7, shape)
    value = cross_entropy(logits, target, reduction="none")
    assert value.shape == shape
    expected = F.cross_entropy(logits.reshape(-1, 7), target.flatten(), reduction="none")
    torch.testing.assert_close(value.flatten(), expected)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), logits), torch.autograd.grad(expected.sum(), logits))
    hidden, head = torch.randn(*shape, 4), torch.randn(7, 4)
    logprobs, entropy = linear_logprobs(hidden, head, target, return_entropy=True)
    assert logprobs.shape == entropy.shape == shape
    expected = full_loss(hidden.reshape(-1, 4), head, target.flatten(), reduction="none")
    torch.testing.assert_close(-logprobs.flatten(), expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_unbatched_token_that_is_ignored(reduction):
    hidden, head = torch.randn(4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    value = linear_cross_entropy(hidden, head, torch.tensor(-100), reduction=reduction)
    assert value.shape == ()
    assert_zero(value, [hidden, head])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_integer_targets(dtype, way):
    case = problem(24, 4, 7)
    typed = case.fresh(target=case.target.to(dtype), hidden=case.hidden, head=case.head)
    assert_equal([typed.loss(options=chunks(5, way))], [case.loss(options=chunks(5, way))])
    assert_equal(typed.logprobs(return_entropy=True), case.logprobs(return_entropy=True))
    logits = F.linear(case.hidden, case.head)
    assert_equal([cross_entropy(logits, typed.target)], [cross_entropy(logits, case.target)])
    nothing_ignored = case.target.clamp(min=0)
    value = linear_cross_entropy(case.hidden, case.head, nothing_ignored.to(dtype), ignore_index=2**40)
    assert_equal([value], [linear_cross_entropy(case.hidden, case.head, nothing_ignored)])


LAYOUTS = {
    "transposed": lambda x: x.detach().t().contiguous().t(),
    "strided": lambda x: x.detach().repeat_interleave(2, 0)[::2],
    "offset": lambda x: torch.cat([x.detach().new_zeros(3, *x.shape[1:]), x.detach()])[3:],
    "columns": lambda x: torch.cat([x.detach(), x.detach()], -1)[:, : x.shape[1]],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(layout, way):
    case = problem(24, 4, 7)
    laid_out = case.fresh(
        hidden=layout(case.hidden).requires_grad_(),
        head=layout(case.head).requires_grad_(),
        target=case.target.repeat_interleave(3)[::3],
    )
    assert torch.equal(laid_out.hidden, case.hidden)
    check_loss(laid_out, options=chunks(5, way))
    check_logprobs(laid_out, entropy=True, options=chunks(5))
    logits = layout(F.linear(case.hidden, case.head)).requires_grad_()
    check_cross_entropy(logits, laid_out.target)


@pytest.mark.parametrize("way", WAYS)
def test_expanded_tensors(way):
    """Stride 0: one hidden state and one target for all tokens, one token weight."""
    hidden, head = (
        torch.randn(1, 4, dtype=torch.float64, requires_grad=True),
        torch.randn(7, 4).double().requires_grad_(),
    )
    target, token_weight = torch.tensor([3]).expand(6), torch.ones(1).double().expand(6)
    value = linear_cross_entropy(hidden.expand(6, 4), head, target, token_weight=token_weight, options=chunks(4, way))
    expected = full_loss(hidden, head, target[:1])
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(
        torch.autograd.grad(value, [hidden, head]), torch.autograd.grad(expected, [hidden, head])
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ignore_index", [-100, -1, 3, 0, 6, 7, 2**31 - 1])
def test_ignore_index(ignore_index, way):
    check_loss(problem(24, 4, 7, ignore_index=ignore_index), options=chunks(5, way))


@pytest.mark.parametrize("way", WAYS)
def test_shifted_labels_of_a_model(way):
    """(B, T, D) states and labels shifted by one: slices that are not contiguous."""
    hidden, head = torch.randn(2, 9, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    labels = torch.randint(7, (2, 9))
    labels[0, :4] = -100
    value = linear_cross_entropy(hidden[:, :-1], head, labels[:, 1:], options=chunks(5, way))
    expected = full_loss(hidden[:, :-1].reshape(-1, 4), head, labels[:, 1:].reshape(-1))
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(
        torch.autograd.grad(value, [hidden, head]), torch.autograd.grad(expected, [hidden, head])
    )


@pytest.mark.parametrize("way", WAYS)
def test_tensors_are_made_on_the_device_of_the_inputs(way):
    """With another default device, a tensor made without a device would not match the inputs."""
    case = problem(24, 4, 7, bias=True)
    weights = {"weight": torch.rand(7), "token_weight": torch.rand(24)}
    terms = {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0, "num_tokens": 5}
    expected = gradients(case.loss(options=chunks(5, way), **weights, **terms), case)
    with torch.device("meta"):
        value, stats = case.loss(options=chunks(5, way), return_stats=True, **weights, **terms)
        assert_equal(gradients(value, case), expected)
        assert {getattr(stats, name).device.type for name in ("num_tokens", "num_correct", "lse_max")} == {"cpu"}
        nothing = case.fresh(target=torch.full_like(case.target, -100))
        assert_zero(nothing.loss(), nothing.leaves())
        assert {x.device.type for x in case.logprobs(return_entropy=True)} == {"cpu"}
        assert cross_entropy(case.hidden, case.target % 4).device.type == "cpu"


@pytest.mark.parametrize("way", WAYS)
def test_deterministic_algorithms(way):
    """No operation that torch refuses when asked for deterministic ones."""
    case = problem(24, 4, 7, bias=True)
    expected = gradients(case.loss(options=chunks(5, way)), case)
    torch.use_deterministic_algorithms(True)
    try:
        assert_equal(gradients(case.loss(options=chunks(5, way)), case), expected)
        gradients(sum(x.sum() for x in case.logprobs(return_entropy=True)), case)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_ignore_index_is_that_of_torch(reduction):
    """`torch.nn.functional.linear_cross_entropy` has None as the default of its ignore_index."""
    hidden, head, target = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, -100, 4, 2])
    keywords = {"ignore_index": None, "reduction": reduction}
    expected = F.cross_entropy(hidden @ head.t(), target, reduction=reduction)
    torch.testing.assert_close(linear_cross_entropy(hidden, head, target, **keywords), expected)
    torch.testing.assert_close(LinearCrossEntropyLoss(**keywords)(hidden, head, target), expected)
