"""torch.compile(fullgraph=True): the same values and gradients for tokens of any pattern, in one graph."""

import shutil

import pytest
import torch

from chunked_ce import LinearCrossEntropyLoss, cross_entropy, linear_cross_entropy, linear_logprobs
from tests.cases import REDUCTIONS_AND_WAYS, WAYS, assert_close, chunks, gradients, problem


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function, backend="aot_eager", **keywords):
    return torch.compile(function, fullgraph=True, backend=backend, **keywords)


def assert_same(case, function, reference):
    """Compiled against eager: value and gradients within a few roundings."""
    value, expected = function(case), reference(case)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    assert value.dtype == expected.dtype
    upstream = torch.linspace(0.5, 2.0, value.numel()).reshape(value.shape)
    got, want = (gradients(v, case, upstream) for v in (value, expected))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("reduction", "way"), REDUCTIONS_AND_WAYS)
def test_linear_cross_entropy(reduction, way):
    options = chunks(5, way)

    def loss(hidden, head, bias, target):
        return linear_cross_entropy(hidden, head, target, linear_bias=bias, reduction=reduction, options=options)

    fast = compiled(loss)
    for seed in range(2):
        assert_same(
            problem(24, 6, 11, bias=True, seed=seed),
            lambda x: fast(x.hidden, x.head, x.bias, x.target),
            lambda x: loss(x.hidden, x.head, x.bias, x.target),
        )


def test_every_option():
    weight, token_weight = torch.rand(11), torch.rand(24)
    terms = {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0, "logit_scale": 0.5}

    def loss(hidden, head, bias, target):
        return linear_cross_entropy(
            hidden, head, target, linear_bias=bias, weight=weight, token_weight=token_weight, **terms
        )

    fast = compiled(loss)
    assert_same(
        problem(24, 6, 11, bias=True),
        lambda x: fast(x.hidden, x.head, x.bias, x.target),
        lambda x: loss(x.hidden, x.head, x.bias, x.target),
    )


@pytest.mark.parametrize("way", WAYS)
def test_one_graph_for_any_pattern_of_ignored_tokens(way):
    """The number of tokens that count changes with every batch: it may not be a constant of the graph."""
    fast = compiled(lambda h, w, y: linear_cross_entropy(h, w, y, options=chunks(5, way)))
    case = problem(24, 6, 11, ignored=0.5)
    fast(case.hidden, case.head, case.target)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for ignored in (0.0, 0.3, 0.9, 1.1):
            assert_same(
                problem(24, 6, 11, ignored=ignored),
                lambda x: fast(x.hidden, x.head, x.target),
                lambda x: x.loss(options=chunks(5, way)),
            )


def test_other_numbers_of_tokens():
    fast = compiled(linear_cross_entropy)
    for n in (8, 9, 30, 31):
        assert_same(problem(n, 6, 11), lambda x: fast(x.hidden, x.head, x.target), lambda x: x.loss())


def test_cross_entropy():
    target = torch.tensor([1, 3, -100, 0])
    logits = torch.randn(4, 6, requires_grad=True)
    fast = compiled(lambda x: cross_entropy(x, target, label_smoothing=0.1))
    value, expected = fast(logits), cross_entropy(logits, target, label_smoothing=0.1)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, logits), torch.autograd.grad(expected, logits))


def test_linear_logprobs():
    fast = compiled(lambda h, w, y: torch.stack(linear_logprobs(h, w, y, return_entropy=True)))
    assert_same(
        problem(24, 6, 11),
        lambda x: fast(x.hidden, x.head, x.target),
        lambda x: torch.stack(x.logprobs(return_entropy=True)),
    )


def test_stats():
    fast = compiled(lambda h, w, y: linear_cross_entropy(h, w, y, return_stats=True))
    case = problem(24, 6, 11)
    value, stats = fast(case.hidden, case.head, case.target)
    expected, expected_stats = case.loss(return_stats=True)
    torch.testing.assert_close(value, expected)
    for name in ("loss_sum", "num_tokens", "num_correct", "entropy_sum", "lse_max"):
        torch.testing.assert_close(getattr(stats, name), getattr(expected_stats, name))
        assert not getattr(stats, name).requires_grad


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
FACTORS_OF_ONE = [("sum", None), ("mean", 1), ("mean", 1.0), ("mean", None), ("none", None)]


@pytest.mark.parametrize(
    ("trained", "backend"),
    [
        pytest.param("both", "aot_eager", marks=pytest.mark.thorough),
        pytest.param("head", "aot_eager", marks=pytest.mark.thorough),
        pytest.param("both", "inductor", marks=[needs_compiler, pytest.mark.thorough]),
        pytest.param("head", "inductor", marks=[needs_compiler, pytest.mark.thorough]),
    ],
)
def test_a_loss_keeps_its_gradient_beside_its_sum(trained, backend):
    """A factor of one is folded away: what is left of the loss may not be the sum among the statistics."""
    module = LinearCrossEntropyLoss(reduction="sum", return_stats=True)

    def losses(hidden, head, target):
        terms = {"return_stats": True}
        found = [module(hidden, head, target)]
        for reduction, num_tokens in FACTORS_OF_ONE:
            terms |= {"reduction": reduction, "num_tokens": num_tokens}
            ways = [way for r, way in REDUCTIONS_AND_WAYS if r == reduction]
            found += [linear_cross_entropy(hidden, head, target, options=chunks(5, way), **terms) for way in ways]
            found.append(cross_entropy(hidden @ head.t(), target, **terms))
        return [(loss * 1.0, stats) for loss, stats in found]

    case = problem(24, 6, 11)
    case.hidden.requires_grad_(trained == "both")
    fast = compiled(losses, backend)(case.hidden, case.head, case.target)
    for (loss, stats), (expected, expected_stats) in zip(
        fast, losses(case.hidden, case.head, case.target), strict=True
    ):
        assert loss.requires_grad and not any(value.requires_grad for value in stats)
        torch.testing.assert_close((loss, *stats), (expected, *expected_stats))
        got, want = (gradients(value.sum(), case, retain_graph=True) for value in (loss, expected))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_module_within_a_model():
    """A layer, the loss and the rest of the step in one graph."""
    layer, head, criterion = torch.nn.Linear(6, 6), torch.nn.Linear(6, 11), LinearCrossEntropyLoss()
    tokens, target = torch.randn(24, 6), problem(24, 6, 11).target

    def step(x, y):
        return criterion(layer(x).tanh(), head.weight, y, linear_bias=head.bias) * 2

    parameters = [*layer.parameters(), *head.parameters()]
    value, expected = compiled(step)(tokens, target), step(tokens, target)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, parameters), torch.autograd.grad(expected, parameters))


def test_frozen_head():
    case = problem(24, 6, 11)
    case.head.requires_grad_(False)
    fast = compiled(linear_cross_entropy)
    assert_same(case, lambda x: fast(x.hidden, x.head, x.target), lambda x: x.loss())


def test_without_gradient():
    case = problem(24, 6, 11)
    with torch.no_grad():
        value = compiled(linear_cross_entropy)(case.hidden, case.head, case.target)
    assert not value.requires_grad
    torch.testing.assert_close(value, case.loss().detach())


def test_second_backward():
    """peers 2: also through the compiled graph, twice gives twice the same."""
    case = problem(24, 6, 11)
    value = compiled(linear_cross_entropy)(case.hidden, case.head, case.target)
    first = gradients(value * 3, case, retain_graph=True)
    kept = [g.clone() for g in first]
    for got, want in zip(gradients(value * 3, case), kept, strict=True):
        assert torch.equal(got, want)


def test_autocast():
    case = problem(24, 6, 11)

    def loss(h, w, y):
        with torch.autocast("cpu", torch.bfloat16):
            return linear_cross_entropy(h, w, y)

    value, expected = (f(case.hidden, case.head, case.target) for f in (compiled(loss), loss))
    torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(gradients(value, case), gradients(expected, case), rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("value", [11, -1])
def test_target_out_of_range(value):
    """peers 5: never a finite loss, compiled or not."""
    fast = compiled(linear_cross_entropy)
    case = problem(24, 6, 11)
    fast(case.hidden, case.head, case.target)
    case.target[7] = value
    with pytest.raises((IndexError, RuntimeError)):
        fast(case.hidden, case.head, case.target)


@pytest.mark.parametrize("name", ["reduction", "softcap"])
def test_wrong_keyword_is_reported(name):
    case = problem(24, 6, 11)
    with pytest.raises(Exception, match=name):
        compiled(linear_cross_entropy)(case.hidden, case.head, case.target, **{name: -1})


@needs_compiler
def test_inductor():
    """The default backend, both ways in one graph, and a head that is stored transposed.

    Inductor checks the strides of what an operator returns against those that it announced.
    """
    case = problem(24, 6, 11, bias=True)
    case = case.fresh(head=case.head.detach().t().contiguous().t().requires_grad_())

    def loss(hidden, head, bias, target):
        waved = hidden.sin()
        losses = [linear_cross_entropy(waved, head, target, linear_bias=bias, options=chunks(5, way)) for way in WAYS]
        return losses[0] + 2 * losses[1]

    value = compiled(loss, "inductor")(case.hidden, case.head, case.bias, case.target)
    expected, scale = case.fresh(hidden=case.hidden.detach().sin()).rows().reduce("mean")
    assert_close(value, 3 * expected, 3 * scale, torch.float32)
    want = gradients(loss(case.hidden, case.head, case.bias, case.target), case)
    torch.testing.assert_close(gradients(value, case), want, rtol=1e-4, atol=1e-6)
