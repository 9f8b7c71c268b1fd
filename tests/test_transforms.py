"""Second derivatives, forward mode and torch.func: right, or refused in clear words; never silently wrong."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradgradcheck

from chunked_ce import linear_cross_entropy, linear_logprobs
from tests.cases import REDUCTIONS_AND_WAYS, WAYS, chunks, full_loss, problem

# What a clear refusal names: the function, the transform or the derivative that is not there.
REFUSAL = re.compile(
    r"linear_cross_entropy|chunked_ce|torch\.func|functorch|vmap|jvp|setup_context|forward.(mode|AD)"
    r"|differentiat|twice|second|create_graph|double.backward",
    re.IGNORECASE,
)
Refused = (RuntimeError, NotImplementedError, TypeError, ValueError)


def assert_clear(error):
    assert REFUSAL.search(str(error)), f"{type(error).__name__}: {error}"


def right_or_refused(call, expected):
    """Run `call`; what it returns must be `expected`, what it raises must say what is not supported."""
    try:
        got = call()
    except Refused as error:
        return assert_clear(error)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("outer", [lambda x: x, torch.square], ids=["loss", "squared"])
def test_gradient_penalty(way, outer):
    """First gradients in the loss: a backward that forgets their derivative would be silently wrong."""
    case = problem(7, 3, 5, dtype=torch.float64)

    def penalised(loss):
        hidden, head = (x.detach().clone().requires_grad_() for x in (case.hidden, case.head))
        value = outer(loss(hidden, head))
        (g,) = torch.autograd.grad(value, hidden, create_graph=True)
        return torch.autograd.grad(value + g.square().sum(), (hidden, head))

    right_or_refused(
        lambda: penalised(lambda h, w: linear_cross_entropy(h, w, case.target, options=chunks(3, way))),
        penalised(lambda h, w: full_loss(h, w, case.target)),
    )


@pytest.mark.parametrize(("reduction", "way"), REDUCTIONS_AND_WAYS)
def test_gradgradcheck(reduction, way):
    case = problem(4, 3, 5, dtype=torch.float64)

    def loss(hidden, head):
        return linear_cross_entropy(hidden, head, case.target, reduction=reduction, options=chunks(2, way))

    try:
        assert gradgradcheck(loss, case.leaves())
    except Refused as error:
        if isinstance(error, torch.autograd.gradcheck.GradcheckError):
            raise
        assert_clear(error)


def test_second_derivative_of_logprobs():
    case = problem(4, 3, 5, dtype=torch.float64)
    upstream = torch.randn(4, dtype=torch.float64)

    def second(logprobs):
        hidden = case.hidden.detach().clone().requires_grad_()
        (g,) = torch.autograd.grad(logprobs(hidden), hidden, upstream, create_graph=True)
        return torch.autograd.grad(g.square().sum() + hidden.sum(), hidden)

    right_or_refused(
        lambda: second(lambda h: linear_logprobs(h, case.head, case.target, options=chunks(2))),
        second(lambda h: -F.cross_entropy(F.linear(h, case.head), case.target, reduction="none")),
    )


TRANSFORMS = {
    "grad": lambda f, h: torch.func.grad(f)(h),
    "vjp": lambda f, h: torch.func.vjp(f, h)[1](torch.ones((), dtype=h.dtype))[0],
    "jvp": lambda f, h: torch.func.jvp(f, (h,), (torch.ones_like(h),))[1],
    "jacrev": lambda f, h: torch.func.jacrev(f)(h),
    "jacfwd": lambda f, h: torch.func.jacfwd(f)(h),
    "vmap": lambda f, h: torch.func.vmap(f)(torch.stack([h, 2 * h])),
    "vmap_of_grad": lambda f, h: torch.func.vmap(torch.func.grad(f))(torch.stack([h, 2 * h])),
    "hessian": lambda f, h: torch.func.hessian(f)(h),
    "autograd_jvp": lambda f, h: torch.autograd.functional.jvp(f, h, torch.ones_like(h))[1],
    "autograd_hessian": lambda f, h: torch.autograd.functional.hessian(f, h),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("way", [*WAYS, "auto"])
def test_torch_func(transform, way):
    case = problem(6, 3, 5, dtype=torch.float64)
    hidden, head = case.hidden.detach(), case.head.detach()
    right_or_refused(
        lambda: transform(lambda h: linear_cross_entropy(h, head, case.target, options=chunks(2, way)), hidden),
        transform(lambda h: full_loss(h, head, case.target), hidden),
    )


def test_forward_mode_dual_numbers():
    case = problem(6, 3, 5, dtype=torch.float64)
    hidden, head, target = case.hidden.detach(), case.head.detach(), case.target

    def tangent(loss):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(hidden, torch.ones_like(hidden))
            found = torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent
            assert found is not None, "the tangent was dropped without a word"
            return found

    right_or_refused(
        lambda: tangent(lambda h: linear_cross_entropy(h, head, target, options=chunks(2))),
        tangent(lambda h: full_loss(h, head, target)),
    )
