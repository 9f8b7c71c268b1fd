"""The kernels of the one-pass way against their torch twins and float64, on the device there is or in the interpreter.

`test_triton_rows.py` runs this file in an interpreting process, `test_cuda.py` on a GPU.
"""

import pytest
import torch

from chunked_ce.rows import exponentials as twin
from chunked_ce.rows import torch_rows
from chunked_ce.rows import triton_exponentials as ours
from chunked_ce.rows.backend import INTERPRETED
from chunked_ce.rows.exponentials import ScaledExponentials, statistics_and_sums
from chunked_ce.rows.statistics import NOTHING, Logits, PerRow, RowStatistics
from tests.cases import chunks, gradients, problem
from tests.engine.kernel_cases import DEVICE, assert_no_worse, far_apart, normal, products_of, targets_of
from tests.engine.one_pass import install

# Below a block, at its edge, whole blocks, and one column more or less.
SHAPES = ((1, 1), (1, 7), (3, 128), (5, 129), (2, 4096), (2, 4095), (2, 4097), (3, 9000), (2, 12288))
DTYPES = (torch.bfloat16, torch.float32)
PLAIN = Logits()
HALF_ULP = 2.0**-8  # of bf16


def checked(products, column, logits=PLAIN, per_row=NOTHING):
    """The statistics, sums and exponentials of the kernel, compared with the twin's and with float64."""
    kept, found = products.clone(), []
    for kernels in (ours, twin):
        out = torch.full_like(products, torch.nan, dtype=torch.bfloat16)
        part = kernels.exponentials(products, column, logits, out, per_row=per_row)
        assert torch.equal(products, kept) or products.isnan().any()
        found.append((*statistics_and_sums(part, column), out))
    if products.dtype == torch.bfloat16:
        in_place = products.clone()
        ours.exponentials(in_place, column, logits, in_place, per_row=per_row)
        assert torch.equal(in_place, found[0][2])
    per_row = PerRow(None if per_row.temperature is None else per_row.temperature.double())
    right = torch_rows.statistics(
        products.double(), column, None, logits, twin.STATISTICS, overwrite=False, per_row=per_row
    )
    for name in twin.STATISTICS:
        assert_no_worse(getattr(found[0][0], name), getattr(found[1][0], name), getattr(right, name), name, 8.0)
    probabilities = (logits(products.double(), per_row.temperature) - right.lse.unsqueeze(1)).exp()
    for _, sums, values in found:
        share = values.double() / sums.double().unsqueeze(1)
        # Far below the largest, rewritten exponentials have been rounded twice.
        allowed = 1.02 * HALF_ULP * probabilities + 2e-13
        assert ((share - probabilities).abs() <= allowed).all()
    return found[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("logits", [Logits(), Logits(0.7)], ids=str)
def test_shapes(dtype, logits):
    for n, vocab in SHAPES:
        checked(products_of(n, vocab, dtype), targets_of(n, vocab), logits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_temperatures(dtype):
    for n, vocab in ((1, 7), (3, 9000)):
        per_row = PerRow(torch.rand(n, generator=torch.Generator().manual_seed(4)).to(DEVICE) + 0.5)
        checked(products_of(n, vocab, dtype), targets_of(n, vocab), Logits(1.5), per_row)


@pytest.mark.parametrize("step", [25.0, 35.0, 500.0])
def test_logits_that_outrun_their_reference(step):
    """Block by block, several times, by less and by more than is rewritten, and by more than exponentials bear."""
    for vocab in (5 * 4096, 5 * 4096 + 3):
        products = products_of(3, vocab, torch.float32, spread=1.0)
        products += step * (torch.arange(vocab, device=DEVICE) // 4096)
        products[1] = products[1].flip(0)  # the largest first
        target = torch.tensor([5, 0, 3 * 4096 + 1], device=DEVICE)  # early, late, and in between
        values = checked(products, target)[2]
        assert values.isfinite().all()
        assert (values.amax(1) <= 1.1e13).all()


def test_a_large_offset():
    """Statistics are relative to the largest logit: an offset of all costs no more than it does in two passes."""
    products = products_of(4, 9000, torch.float32).round() + 10_000
    checked(products, targets_of(4, 9000))


@pytest.mark.parametrize("kept", [slice(6000, 6003), slice(0, 2), slice(4095, 4097)], ids=str)
def test_masked_words(kept):
    products = torch.full((2, 9000), -torch.inf, device=DEVICE)
    products[:, kept] = products_of(2, kept.stop - kept.start, torch.float32)
    rows, _, values = checked(products, torch.full((2,), kept.start, device=DEVICE))
    assert values[:, : kept.start].count_nonzero() == values[:, kept.stop :].count_nonzero() == 0
    out = torch.empty_like(products, dtype=torch.bfloat16)
    masked = torch.full((2,), 8999, device=DEVICE)
    for kernels in (ours, twin):
        rows, _ = statistics_and_sums(kernels.exponentials(products, masked, Logits(), out, per_row=NOTHING), masked)
        assert (rows.nll == torch.inf).all() and out.isfinite().all()


@pytest.mark.parametrize("at", [0, 5, 8999], ids=str)
@pytest.mark.parametrize("value", [-torch.inf, torch.inf, torch.nan], ids=str)
def test_rows_without_a_finite_loss(value, at):
    products = products_of(3, 9000, torch.bfloat16)
    products[0, at] = value
    products[1] = value
    target = torch.full((3,), 5, device=DEVICE)
    for kernels in (ours, twin):
        out = torch.empty_like(products)
        part = kernels.exponentials(products, target, Logits(), out, per_row=NOTHING)
        rows, _ = statistics_and_sums(part, target)
        bad = value != -torch.inf
        assert rows.log_sum.isnan().tolist() == [bad, True, False]
        assert rows.nll.isfinite().tolist() == [not bad and at != 5, False, True]


def test_target_out_of_range_is_never_finite():
    target = torch.tensor([300, -1, 299], device=DEVICE)
    products = torch.zeros(3, 300, device=DEVICE)
    out = torch.empty_like(products, dtype=torch.bfloat16)
    rows, _ = statistics_and_sums(ours.exponentials(products, target, Logits(), out, per_row=NOTHING), target)
    assert rows.nll.isnan().tolist() == [True, True, False]


def test_strided_rows():
    wide, tall = products_of(4, 9100, torch.bfloat16), products_of(300, 4, torch.bfloat16)
    for products in (wide[:, 3:9003], wide[::2, 100:], tall.t()):
        n, vocab = products.shape
        target = targets_of(n, vocab)
        expected = torch.empty(n, vocab, dtype=torch.bfloat16, device=DEVICE)
        part = ours.exponentials(products.contiguous(), target, Logits(), expected, per_row=NOTHING)
        room = torch.zeros(n, vocab + 9, dtype=torch.bfloat16, device=DEVICE)
        out = room[:, 5:-4]
        assert torch.equal(ours.exponentials(products, target, Logits(), out, per_row=NOTHING), part)
        assert torch.equal(out, expected)
        assert room[:, :5].count_nonzero() == room[:, -4:].count_nonzero() == 0


def scaled_of(n, vocab, *, few=None):
    """Gradients of random rows with random slopes, one row without any."""
    products = products_of(n, vocab, torch.bfloat16)
    target = targets_of(n, few or vocab)
    slopes = normal(2, n, seed=3).float().to(DEVICE)
    slopes[:, -1] = 0.0
    part = twin.exponentials(products, target, Logits(), products, per_row=NOTHING)
    rows, sums = statistics_and_sums(part, target)
    return ScaledExponentials.of(products, sums, target, rows, RowStatistics(None, *slopes)), rows, slopes


@pytest.mark.parametrize(("n", "vocab", "few"), [(1, 1, None), (5, 129, 2), (30, 300, None), (30, 300, 1)])
def test_the_products_terms(n, vocab, few):
    """Exponentials, factors and what is added apart are together the gradients of the logits."""
    scaled, rows, slopes = scaled_of(n, vocab, few=few)
    assert scaled.factor[-1] == scaled.taken[-1] == scaled.gradient[-1] == 0
    right = rows.logprob.double().exp() * slopes[0] + slopes[1]
    torch.testing.assert_close(scaled.gradient.double(), right, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(scaled.residual + scaled.factor * scaled.taken, scaled.gradient, rtol=1e-6, atol=1e-8)
    assert (scaled.residual.abs() <= 1.01 * HALF_ULP * scaled.gradient.abs()).all()
    x = normal(300, n, seed=6).bfloat16().to(DEVICE).t()  # hidden states need not be contiguous
    scaled_x = scaled.scaled(x)
    exact = torch.zeros(vocab, 300, dtype=torch.float64, device=DEVICE)
    exact.index_add_(0, scaled.column, scaled.gradient.double().unsqueeze(1) * x.double())
    in_product = torch.zeros_like(exact)
    in_product.index_add_(0, scaled.column, scaled.taken.double().unsqueeze(1) * scaled_x.double())
    for dtype in (torch.float32, torch.bfloat16):
        totals = []
        for kernels in (ours, twin, ours):
            total = torch.zeros(vocab, 300, dtype=dtype, device=DEVICE)
            kernels.add_targets_(total, scaled, x, scaled_x)
            totals.append(total)
        assert torch.equal(totals[0], totals[2])
        rounding = n * torch.finfo(torch.float32).eps * exact.abs().max()
        for total in totals:
            off = (total.double() - (exact - in_product)).abs()
            assert (off <= rounding + (dtype == torch.bfloat16) * HALF_ULP * total.double().abs()).all()
    expected = scaled.values.double() * scaled.factor.double().unsqueeze(1)
    expected = expected.scatter(1, scaled.column.unsqueeze(1), scaled.gradient.double().unsqueeze(1)).sum(0)
    for dtype in (torch.float32, torch.float64):
        sums = [torch.ones(vocab, dtype=dtype, device=DEVICE) for _ in range(2)]
        for total, kernels in zip(sums, (ours, twin), strict=True):
            kernels.add_columns_(total, scaled)
        assert_no_worse(sums[0] - 1, sums[1] - 1, expected, "column sums", 8.0)


@pytest.mark.parametrize(("rows", "stride"), [(2, 2**31 + 64), (5, 2**29 + 64)])
def test_offsets_beyond_31_bits(rows, stride):
    """The stride needs them, or only its product with the row's number does."""
    far, near = far_apart(rows, stride, 4200), products_of(rows, 4200, torch.bfloat16)
    far.copy_(near)
    target = targets_of(rows, 4200)
    parts = [ours.exponentials(x, target, PLAIN, x, per_row=NOTHING) for x in (far, near)]
    assert torch.equal(*parts) and torch.equal(far, near)


@pytest.mark.skipif(not INTERPRETED, reason="test_cuda.py tests whole losses on a device")
@pytest.mark.parametrize("size", [40, 13])
@pytest.mark.parametrize("ignored", ["drop", "mask"])
def test_whole_losses(size, ignored, monkeypatch):
    """The same loss and gradients, but for the last bit, from these kernels and from their twins."""
    for terms in ({}, {"z_loss": 0.1, "token_weight": torch.linspace(0.0, 1.0, 40), "logit_scale": 0.7}):
        found = []
        for kernels in (ours, twin):
            seen = install(monkeypatch, kernels)
            case = problem(40, 8, 300, dtype=torch.bfloat16, bias=True, spread=3.0)
            value = case.loss(options=chunks(size, ignored=ignored), **terms)
            assert {"exponentials", "add_targets_", "add_columns_"} == set(seen)
            found.append((value, gradients(value, case)))
        torch.testing.assert_close(found[0][0], found[1][0], rtol=2e-6, atol=0)
        for one, other in zip(found[0][1], found[1][1], strict=True):
            assert (one - other).norm() <= torch.finfo(torch.bfloat16).eps * other.norm()
