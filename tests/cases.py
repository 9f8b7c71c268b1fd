"""Inputs for the tests, and the checks of a call against the reference."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from chunked_ce import ChunkOptions, cross_entropy, linear_cross_entropy, linear_logprobs
from tests.reference import linear_rows, rows

# Without instructions for bf16, products of it take fifty times as long, and memory for copies of their factors.
HAS_BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
needs_bf16 = pytest.mark.skipif(not HAS_BF16, reason="this CPU has no instructions for bf16")

WAYS = ("forward", "backward")
REDUCTIONS = ("mean", "sum", "none")
# Each (reduction, way) that may be asked for: per-token upstream gradients do not exist in the forward.
REDUCTIONS_AND_WAYS = [(r, g) for r in REDUCTIONS for g in WAYS if (r, g) != ("none", "forward")]

# Errors allowed, in units of epsilon * scale (see tests/reference.py). Plain torch operations reach 1.5 in
# 9,000 random cases; test_values.py shows that small mistakes exceed the bound.
ROUNDINGS = 3.0


@dataclass(frozen=True)
class Problem:
    """Leaf tensors of one call."""

    hidden: Tensor  # (N, D)
    head: Tensor  # (V, D)
    target: Tensor  # (N,)
    bias: Tensor | None = None  # (V,)
    ignore_index: int = -100

    def leaves(self):
        return [x for x in (self.hidden, self.head, self.bias) if x is not None and x.requires_grad]

    def fresh(self, **changes):
        """The same numbers in new leaves."""
        copies = {
            name: x.detach().clone().requires_grad_(x.requires_grad)
            for name, x in vars(self).items()
            if isinstance(x, Tensor)
        }
        return replace(self, **{**copies, **changes})

    def keywords(self):
        """What a call takes from the problem besides the three tensors: nothing that is the default."""
        found = {} if self.bias is None else {"linear_bias": self.bias}
        return found if self.ignore_index == -100 else {**found, "ignore_index": self.ignore_index}

    def rows(self, **terms):
        bias = None if self.bias is None else array(self.bias)
        tensors = array(self.hidden), array(self.head), array(self.target)
        return linear_rows(*tensors, bias=bias, ignore_index=self.ignore_index, **arrays(terms))

    def loss(self, **options):
        return linear_cross_entropy(self.hidden, self.head, self.target, **self.keywords(), **options)

    def logprobs(self, **options):
        return linear_logprobs(self.hidden, self.head, self.target, **self.keywords(), **options)


def problem(n, d, vocab, *, dtype=torch.float32, bias=False, ignored=0.25, ignore_index=-100, spread=1.0, seed=0):
    """Random inputs: `ignored` is the share of ignored tokens, `spread` the logits' standard deviation."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    target = torch.randint(vocab, (n,), generator=g)
    target[torch.rand(n, generator=g) < ignored] = ignore_index
    return Problem(
        hidden=normal(n, d).to(dtype).requires_grad_(),
        head=(spread * d**-0.5 * normal(vocab, d)).to(dtype).requires_grad_(),
        target=target,
        bias=normal(vocab).to(dtype).requires_grad_() if bias else None,
        ignore_index=ignore_index,
    )


def chunks(size, gradients="auto", **options):
    return ChunkOptions(chunk_size=size, gradients=gradients, **options)


def array(x):
    """A tensor as a numpy array, float64 if it holds floats."""
    x = x.detach()
    return (x.double() if x.is_floating_point() else x).cpu().numpy()


def arrays(options):
    return {k: array(v) if isinstance(v, Tensor) else v for k, v in options.items()}


def assert_close(actual, expected, scale, dtype, what="value", roundings=ROUNDINGS):
    """|actual - expected| <= roundings * epsilon * scale, element by element."""
    actual, expected = array(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    limits = torch.finfo(dtype)
    allowed = roundings * (limits.eps * np.asarray(scale) + limits.tiny)
    with np.errstate(invalid="ignore"):
        wrong = ~((abs(actual - expected) <= allowed) | (actual == expected))  # NaN is wrong
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise AssertionError(
            f"{what}{list(at)} is {actual[at]!r}, expected {expected[at]!r} within "
            f"{np.asarray(allowed)[at]:.3g}; {wrong.sum()} of {wrong.size} elements are off"
        )


def loss_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def gradients(value, case, upstream=None, **keywords):
    """The gradients of the leaves of `case`."""
    return torch.autograd.grad(value, case.leaves(), upstream, **keywords)


def assert_equal(first, second):
    """Two lists of tensors, bit by bit."""
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def full_loss(hidden, head, target, bias=None, **keywords):
    """The loss that holds all the logits: what everything here replaces."""
    logits = F.linear(hidden, head, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, target, **keywords)


def check_loss(case, *, reduction="mean", num_tokens=None, options=None, upstream=None, roundings=ROUNDINGS, **terms):
    """Value and every gradient of linear_cross_entropy against the reference, for any upstream gradient."""
    extra = {} if num_tokens is None else {"num_tokens": num_tokens}
    value = case.loss(reduction=reduction, options=options, **extra, **terms)
    reference = case.rows(**terms)
    dtype = case.hidden.dtype
    assert value.dtype == loss_dtype(dtype)
    assert_close(value, *reference.reduce(reduction, num_tokens), dtype, "loss", roundings)

    upstream = random_like(value) if upstream is None else upstream
    coefficient = array(upstream) * reference.coefficient(reduction, num_tokens)
    expected = reference.gradients("loss", array(case.hidden), array(case.head), coefficient)
    check_gradients(case, value, upstream, expected, roundings)


def check_logprobs(case, *, options=None, entropy=False, roundings=ROUNDINGS, **terms):
    """linear_logprobs, and its entropy, with their gradients against the reference."""
    reference = case.rows(**terms)
    dtype = case.hidden.dtype
    returned = case.logprobs(options=options, return_entropy=entropy, **terms)
    names = ("logprob", "entropy") if entropy else ("logprob",)
    returned = returned if entropy else (returned,)
    assert isinstance(returned, tuple) and len(returned) == len(names)
    total, parts = 0.0, []
    for name, value in zip(names, returned, strict=True):
        assert value.dtype == loss_dtype(dtype)
        expected, scale = getattr(reference, name), getattr(reference, f"{name}_scale")
        assert_close(value, expected, scale, dtype, name, roundings)
        upstream = random_like(value, seed=len(parts))
        parts.append(reference.gradients(name, array(case.hidden), array(case.head), array(upstream)))
        total = total + (value * upstream).sum()
    expected = [(sum(p[i][0] for p in parts), sum(p[i][1] for p in parts)) for i in range(3)]
    check_gradients(case, total, torch.ones_like(total), expected, roundings)


def check_gradients(case, value, upstream, expected, roundings):
    named = zip(("input", "linear_weight", "linear_bias"), (case.hidden, case.head, case.bias), expected, strict=True)
    wanted = [(name, leaf, *pair) for name, leaf, pair in named if leaf is not None and leaf.requires_grad]
    for (name, leaf, reference, scale), gradient in zip(wanted, gradients(value, case, upstream), strict=True):
        assert gradient.dtype == leaf.dtype
        assert_close(gradient, reference, scale, leaf.dtype, f"gradient of {name}", roundings)


def check_cross_entropy(logits, target, *, reduction="mean", num_tokens=None, options=None, **terms):
    """Value and gradient of cross_entropy (N, V) against the reference."""
    extra = {} if num_tokens is None else {"num_tokens": num_tokens}
    value = cross_entropy(logits, target, reduction=reduction, options=options, **extra, **terms)
    reference = rows(array(logits), array(target), **arrays(terms))
    assert value.dtype == loss_dtype(logits.dtype)
    assert_close(value, *reference.reduce(reduction, num_tokens), logits.dtype, "loss")
    upstream = random_like(value)
    (gradient,) = torch.autograd.grad(value, logits, upstream)
    coefficient = (array(upstream) * reference.coefficient(reduction, num_tokens))[:, None]
    assert gradient.dtype == logits.dtype
    scale = abs(coefficient) * reference.d_loss_scale
    assert_close(gradient, coefficient * reference.d_loss, scale, logits.dtype, "gradient of logits")


def random_like(value, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(value.shape, generator=g, dtype=torch.float64).to(value.dtype)
