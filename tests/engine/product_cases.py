"""The product whose epilogue takes exponentials, against its twin and float64; run as `exponential_cases.py` is."""

import pytest
import torch

from chunked_ce.rows import exponentials as twin
from chunked_ce.rows import torch_rows
from chunked_ce.rows import triton_product as ours
from chunked_ce.rows.backend import INTERPRETED
from chunked_ce.rows.exponentials import statistics_and_sums
from chunked_ce.rows.statistics import NOTHING, Logits, PerRow
from tests.cases import chunks, gradients, problem
from tests.engine.kernel_cases import DEVICE, normal, targets_of
from tests.engine.one_pass import install, install_product

PLAIN = Logits()
HALF_ULP = 2.0**-8  # of bf16


def factors(n, hidden, vocab, *, spread=3.0):
    x = normal(n, hidden).bfloat16().to(DEVICE)
    return x, (spread * hidden**-0.5 * normal(vocab, hidden, seed=1)).bfloat16().to(DEVICE)


def room(n, vocab):
    """Rows that begin at multiples of 16, as those of a chunk do."""
    return torch.full((n, vocab + -vocab % 16), torch.nan, dtype=torch.bfloat16, device=DEVICE)[:, :vocab]


def checked(x, weight, column, *, bias=None, logits=PLAIN, per_row=NOTHING):
    """The statistics, sums and exponentials of the kernels, compared with the twin's and with float64."""
    found = []
    for kernels in (ours, twin):
        out = room(len(x), len(weight))
        part = kernels.product_exponentials(x, weight, bias, column, logits, out, per_row=per_row)
        found.append((*statistics_and_sums(part, column), out))
    products = x.double() @ weight.double().t()
    products = products if bias is None else products + bias.double()
    per_row = PerRow(None if per_row.temperature is None else per_row.temperature.double())
    right = torch_rows.statistics(products, column, None, logits, twin.STATISTICS, overwrite=False, per_row=per_row)
    size = (x.double().abs() @ weight.double().abs().t()).max() * logits.scale
    for name in twin.STATISTICS:
        values = [getattr(rows, name) for rows in (found[0][0], found[1][0], right)]
        rounding = 32 * torch.finfo(torch.float32).eps * size  # of the products
        assert ((values[0].double() - values[2]).abs() <= rounding).all(), name
    probabilities = (logits(products, per_row.temperature) - right.lse.unsqueeze(1)).exp()
    for _, sums, values in found:
        share = values.double() / sums.double().unsqueeze(1)
        assert ((share - probabilities).abs() <= 1.02 * HALF_ULP * probabilities + 1e-15).all()
    return found[0]


@pytest.mark.parametrize(
    ("n", "hidden", "vocab"), [(1, 8, 1), (3, 64, 255), (130, 72, 256), (129, 128, 530), (5, 200, 1025)]
)
def test_shapes(n, hidden, vocab):
    """One token; factors and tiles below, at and beyond an edge."""
    x, weight = factors(n, hidden, vocab)
    checked(x, weight, targets_of(n, vocab))


def test_terms():
    x, weight = factors(20, 64, 300)
    bias = normal(300, seed=5).bfloat16().to(DEVICE)
    per_row = PerRow(torch.linspace(0.5, 2.0, 20, device=DEVICE))
    checked(x, weight, targets_of(20, 300), bias=bias, logits=Logits(0.7))
    checked(x, weight, targets_of(20, 300), bias=bias, logits=Logits(1.5), per_row=per_row)


@pytest.mark.parametrize("rise", [20.0, 40.0, 300.0])
def test_rows_that_outrun_their_targets(rise):
    """Some rows of a tile, by less and by more than is allowed, and by more than exponentials bear."""
    x, weight = factors(70, 64, 600, spread=1.0)
    bias = torch.zeros(600, device=DEVICE)
    bias[[3, 299, 598]] = rise
    target = targets_of(70, 600)
    target[::3] = 299
    rows, _, values = checked(x, weight, target, bias=bias)
    assert values.isfinite().all() and (values.amax(1) <= 1.1e13).all()
    assert rows.nll.isfinite().all()


def test_masked_words():
    """A bias of -inf, that of a target too: its loss is infinite, as it is in two passes."""
    x, weight = factors(5, 64, 600)
    bias = torch.zeros(600, device=DEVICE)
    bias[:300] = -torch.inf
    out, target = room(5, 600), torch.tensor([400, 5, 301, 599, 300], device=DEVICE)
    for kernels in (ours, twin):
        part = kernels.product_exponentials(x, weight, bias, target, PLAIN, out, per_row=NOTHING)
        rows, _ = statistics_and_sums(part, target)
        assert rows.nll.isfinite().tolist() == [True, False, True, True, True] and rows.nll[1] == torch.inf
        assert out[:, :300].count_nonzero() == 0 and out.isfinite().all()
    bias[:] = -torch.inf
    for kernels in (ours, twin):
        part = kernels.product_exponentials(x, weight, bias, target, PLAIN, out, per_row=NOTHING)
        assert statistics_and_sums(part, target)[0].nll.isnan().all()


@pytest.mark.parametrize("value", [torch.inf, torch.nan], ids=str)
def test_bad_hidden_states_give_no_finite_loss(value):
    x, weight = factors(5, 64, 600)
    x[1, 3] = value
    target = targets_of(5, 600)
    for kernels in (ours, twin):
        part = kernels.product_exponentials(x, weight, None, target, PLAIN, room(5, 600), per_row=NOTHING)
        assert statistics_and_sums(part, target)[0].nll.isfinite().tolist() == [True, False, True, True, True]


def test_twice_the_same():
    x, weight = factors(70, 64, 600)
    bias = torch.zeros(600, device=DEVICE)
    bias[7] = 100.0
    found = []
    for _ in range(2):
        out = room(70, 600)
        found.append(
            (out, ours.product_exponentials(x, weight, bias, targets_of(70, 600), PLAIN, out, per_row=NOTHING))
        )
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_what_descriptors_take():
    wide = torch.zeros(4, 64, dtype=torch.bfloat16)
    assert ours.takes(wide) and ours.takes(wide[:, 8:]) and ours.takes(wide[1:])
    for other in (wide.float(), wide[:, 1:], wide[:, :-1], wide.t(), torch.zeros(4, 12, dtype=torch.bfloat16)):
        assert not ours.takes(other)
    x, weight = factors(5, 64, 300)
    strided = torch.zeros(5, 129, dtype=torch.bfloat16, device=DEVICE)[:, 1:].copy_(torch.cat([x, x], 1))[:, :64]
    assert not ours.takes(strided)
    parts = [
        ours.product_exponentials(each, weight, None, targets_of(5, 300), PLAIN, room(5, 300), per_row=NOTHING)
        for each in (x, strided)
    ]
    assert torch.equal(*parts)


@pytest.mark.skipif(not INTERPRETED, reason="test_cuda_one_pass.py tests whole losses on a device")
def test_whole_losses(monkeypatch):
    """The same loss and gradients, but for the last bit, from this product and from its twin; logits of no dtype."""
    for terms in ({}, {"z_loss": 0.1, "logit_scale": 0.7, "temperature": torch.linspace(0.5, 2.0, 40)}):
        found = []
        for product in (ours, twin):
            install(monkeypatch, twin)
            seen = install_product(monkeypatch, product)
            case = problem(40, 8, 304, dtype=torch.bfloat16, bias=True, spread=3.0)
            value = case.loss(options=chunks(13), **terms)
            assert seen.count("product_exponentials") >= 3
            found.append((value, gradients(value, case)))
        torch.testing.assert_close(found[0][0], found[1][0], rtol=2e-6, atol=0)
        for one, other in zip(found[0][1], found[1][1], strict=True):
            assert (one - other).norm() <= torch.finfo(torch.bfloat16).eps * other.norm()
