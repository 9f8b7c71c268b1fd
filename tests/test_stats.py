"""LossStats: the sums of the reference, detached, and nothing when they are not asked for."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from chunked_ce import LossStats, cross_entropy
from tests.cases import REDUCTIONS, REDUCTIONS_AND_WAYS, WAYS, chunks, gradients, problem
from tests.reference import rows

FIELDS = ("loss_sum", "num_tokens", "num_correct", "entropy_sum", "lse_max")
TERMS = {
    "plain": {},
    "label_smoothing": {"label_smoothing": 0.2},
    "z_loss": {"z_loss": 0.1},
    "softcap": {"softcap": 2.0, "logit_scale": 1.5},
    "flipped": {"logit_scale": -1.0},
}


def assert_stats(stats, expected, rtol=1e-5):
    assert isinstance(stats, LossStats)
    for name in FIELDS:
        value = getattr(stats, name)
        assert isinstance(value, Tensor), name
        assert (value.shape, value.dtype, value.requires_grad) == ((), torch.float32, False), name
        assert value.item() == pytest.approx(expected[name], rel=rtol, abs=1e-5), name


@pytest.mark.parametrize(("reduction", "way"), REDUCTIONS_AND_WAYS)
@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stats(dtype, terms, reduction, way):
    case = problem(29, 6, 5, dtype=dtype, bias=True)
    value, stats = case.loss(reduction=reduction, options=chunks(4, way), return_stats=True, **terms)
    assert_stats(stats, case.rows(**terms).stats())
    alone = case.loss(reduction=reduction, options=chunks(4, way), **terms)
    assert isinstance(alone, Tensor)
    torch.testing.assert_close(value, alone)
    torch.testing.assert_close(gradients(value.sum(), case), gradients(alone.sum(), case))


@pytest.mark.parametrize("way", WAYS)
def test_stats_with_weights(way):
    """`loss_sum` / `num_tokens` is the mean; hits and entropies are counted once per token that counts."""
    case = problem(29, 6, 5)
    weights = {"weight": torch.rand(5), "token_weight": torch.rand(29)}
    value, stats = case.loss(return_stats=True, options=chunks(4, way), **weights)
    assert_stats(stats, case.rows(**weights).stats())
    torch.testing.assert_close(stats.loss_sum / stats.num_tokens, value.detach())


@pytest.mark.parametrize("num_tokens", [3, torch.tensor(1000.0)])
def test_num_tokens_given_does_not_change_the_local_sums(num_tokens):
    case = problem(29, 6, 5)
    _, stats = case.loss(return_stats=True, num_tokens=num_tokens)
    assert_stats(stats, case.rows().stats())


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_stats_of_cross_entropy(reduction):
    case = problem(29, 6, 5)
    logits = F.linear(case.hidden, case.head).detach().requires_grad_()
    value, stats = cross_entropy(logits, case.target, reduction=reduction, return_stats=True, softcap=3.0)
    assert value.shape == ((29,) if reduction == "none" else ())
    assert_stats(stats, rows(logits.detach().double().numpy(), case.target.numpy(), softcap=3.0).stats())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("n", [0, 9])
def test_stats_of_no_token(n, way):
    """Zeros, and the -inf that any maximum absorbs."""
    case = problem(n, 6, 5, ignored=1.1)
    value, stats = case.loss(return_stats=True, options=chunks(4, way))
    assert value.item() == 0.0
    assert_stats(stats, dict.fromkeys(FIELDS, 0.0) | {"lse_max": -torch.inf})


def test_stats_combine_over_parts():
    """Sums add, the maximum is taken: two halves give the whole."""
    whole = problem(30, 6, 5)
    parts = [
        whole.fresh(hidden=h, target=t) for h, t in zip(whole.hidden.split(13), whole.target.split(13), strict=True)
    ]
    found = [part.loss(return_stats=True)[1] for part in parts]
    combined = {name: sum(getattr(s, name).item() for s in found) for name in FIELDS}
    combined["lse_max"] = max(s.lse_max.item() for s in found)
    assert_stats(whole.loss(return_stats=True)[1], combined)


def test_garbage_in_ignored_rows_stays_out_of_the_stats():
    case = problem(29, 6, 5)
    expected = case.rows().stats()
    with torch.no_grad():
        case.hidden[case.target == -100] = torch.nan
    assert_stats(case.loss(return_stats=True)[1], expected)


def test_stats_are_not_part_of_the_graph():
    case = problem(29, 6, 5)
    value, stats = case.loss(return_stats=True)
    value.backward()
    for name in FIELDS:
        assert getattr(stats, name).grad_fn is None


@pytest.mark.parametrize(("reduction", "way"), REDUCTIONS_AND_WAYS)
@pytest.mark.parametrize("num_tokens", [None, 1])
@pytest.mark.parametrize("n", [1, 9])
def test_stats_share_no_memory_with_the_loss(n, num_tokens, reduction, way):
    """A running sum that is kept in a statistic changes neither the loss nor its gradient."""
    case = problem(n, 6, 5, ignored=0.0)
    logits = F.linear(case.hidden, case.head).detach().requires_grad_()
    keywords = {"reduction": reduction, "num_tokens": num_tokens, "return_stats": True}
    calls = (
        (case.leaves(), lambda: case.loss(options=chunks(4, way), **keywords)),
        ([logits], lambda: cross_entropy(logits, case.target, **keywords)),
    )
    for leaves, call in calls:
        (expected, untouched), (value, stats) = call(), call()
        for field in stats:
            field.mul_(3)
        assert torch.equal(value, expected)
        for got, want in zip(*(torch.autograd.grad(x.sum(), leaves) for x in (value, expected)), strict=True):
            assert torch.equal(got, want)
        value.detach().mul_(5)
        assert torch.equal(torch.stack(list(stats)), 3 * torch.stack(list(untouched)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stats_of_half_precision(dtype):
    """peers 1: counts and sums beyond what the format can count exactly (bf16 stops at 256)."""
    case = problem(4000, 8, 5, dtype=dtype, ignored=0.0)
    _, stats = case.loss(return_stats=True, options=chunks(64))
    expected = case.rows().stats()
    assert stats.num_tokens.item() == 4000
    assert stats.num_correct.item() == pytest.approx(expected["num_correct"], rel=0.01)
    assert stats.loss_sum.item() == pytest.approx(expected["loss_sum"], rel=1e-3)
    assert stats.entropy_sum.item() == pytest.approx(expected["entropy_sum"], rel=1e-3)
