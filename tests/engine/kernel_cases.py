"""Each Triton kernel against its torch twin, on the device there is or in Triton's interpreter.

`test_triton_rows.py` runs this file in a process of its own, where TRITON_INTERPRET=1 is set before triton is
imported; `test_cuda.py` runs it on a GPU. The reference is the twin in float64 on the same products, and the bound the
twin's own error in the products' dtype.
"""

import itertools
import mmap

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from chunked_ce import devices
from chunked_ce.rows import torch_rows, triton_kernels, triton_rows
from chunked_ce.rows.backend import INTERPRETED
from chunked_ce.rows.columns import ColumnSums
from chunked_ce.rows.statistics import (
    NOTHING,
    Logits,
    PerRow,
    RowStatistics,
    merge_shards,
    names_of,
    num_columns,
    statistics_of,
)
from tests.cases import array
from tests.engine.interpreter import round_as_devices_do
from tests.precision import MAX_SLACK

round_as_devices_do()

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FEW_DTYPES = [*DTYPES[:2], pytest.param(torch.float16, marks=pytest.mark.thorough)]
# Rows and columns: one of each, below a block, at its edge, over several blocks.
SHAPES = ((1, 1), (1, 7), (3, 128), (5, 129), (2, 4096), (2, 4097), (3, 9000))
ALL = names_of(("weighted", "mean", "correct", "squares"))
LOGITS = (Logits(), Logits(0.7), Logits(1.5, 5.0))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def products_of(n, vocab, dtype, *, offset=0.0, spread=3.0, seed=0):
    return (offset + spread * normal(n, vocab, seed=seed)).to(dtype).to(DEVICE)


def targets_of(n, vocab):
    return torch.randint(vocab, (n,), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def weights_of(vocab):
    return normal(vocab, seed=2).abs().float().to(DEVICE)


def slopes_of(n, *, weighted=True, mean=True, squares=True):
    values = normal(5, n, seed=3).float().to(DEVICE)
    asked = {"weighted": weighted, "mean": mean, "squares": squares}
    more = {name: values[at] for at, name in enumerate(asked, 2) if asked[name]}
    return RowStatistics(None, values[0], values[1], **more)


def double(parts):
    return parts.map(torch.Tensor.double)


def none_or_double(values):
    return None if values is None else values.double()


def assert_no_worse(ours, twin, expected, what, roundings=4.0):
    """The largest error within that of the twin, and a few roundings of the largest value.

    A logarithm may be in error by a few roundings of the sum that it is of.
    """
    ours, twin, expected = map(array, (ours, twin, expected))
    error, bound = abs(ours - expected).max(), MAX_SLACK * abs(twin - expected).max()
    size = max(abs(expected).max(), float(what in ("log_sum", "squares")))
    bound += roundings * torch.finfo(torch.float32).eps * size
    assert error <= bound, f"{what}: error {error:.3g}, allowed {bound:.3g}"


def check_statistics(products, target, class_weight, logits, wanted=ALL, per_row=NOTHING):
    asked = {"overwrite": False, "per_row": per_row}
    ours = triton_rows.statistics(products, target, class_weight, logits, wanted, **asked)
    twin = torch_rows.statistics(products, target, class_weight, logits, wanted, **asked)
    double_weight = none_or_double(class_weight)
    expected = torch_rows.statistics(products.double(), target, double_weight, logits, wanted, **asked)
    for name, a, b, c in zip(RowStatistics._fields, ours, twin, expected, strict=True):
        if c is None:
            assert a is None
            continue
        assert a.shape == c.shape and a.dtype == torch.float32
        if name == "correct" or (name == "maximum" and logits.softcap is None):
            assert torch.equal(a, b), name
        else:
            assert_no_worse(a, b, c, name)
    return double(expected)


def check_gradients(products, target, class_weight, logits, slopes, known=None, per_row=NOTHING):
    if known is None:
        known = torch_rows.statistics(
            products.double(), target, none_or_double(class_weight), logits, ALL, overwrite=False, per_row=per_row
        )
    single = known.map(torch.Tensor.float)
    found = []
    for kernels in (triton_rows, torch_rows):
        kept = products.clone()
        out = torch.full_like(products, torch.nan)
        kernels.logit_gradients(products, target, class_weight, logits, slopes, single, out, per_row=per_row)
        assert torch.equal(products, kept)
        found.append(out)
    expected = torch.empty_like(products, dtype=torch.float64)
    torch_rows.logit_gradients(
        products.double(),
        target,
        none_or_double(class_weight),
        logits,
        double(slopes),
        known,
        expected,
        per_row=per_row,
    )
    assert_no_worse(*found, expected, "gradients")
    in_place = products.clone()
    triton_rows.logit_gradients(in_place, target, class_weight, logits, slopes, single, in_place, per_row=per_row)
    assert torch.equal(in_place, found[0])


@pytest.mark.parametrize("logits", LOGITS, ids=str)
@pytest.mark.parametrize("dtype", FEW_DTYPES, ids=str)
def test_shapes(dtype, logits):
    for n, vocab in SHAPES:
        arguments = products_of(n, vocab, dtype), targets_of(n, vocab), weights_of(vocab), logits
        known = check_statistics(*arguments)
        check_gradients(*arguments, slopes_of(n), known)


@pytest.mark.parametrize("logits", LOGITS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_temperatures(dtype, logits):
    for n, vocab in ((1, 7), (3, 4500)):
        per_row = PerRow(torch.rand(n, generator=torch.Generator().manual_seed(4)).to(DEVICE) + 0.5)
        arguments = products_of(n, vocab, dtype), targets_of(n, vocab), weights_of(vocab), logits
        known = check_statistics(*arguments, per_row=per_row)
        check_gradients(*arguments, slopes_of(n), known, per_row)


@pytest.mark.parametrize("wanted", [(), ("weighted",), ("mean",), ("correct",), ("squares",)], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_what_is_asked_for(wanted, weighted):
    for logits in LOGITS:
        arguments = products_of(3, 4500, torch.bfloat16), targets_of(3, 4500), weights_of(4500) if weighted else None
        check_statistics(*arguments, logits, names_of(wanted))
        check_gradients(
            *arguments, logits, slopes_of(3, **{name: name in wanted for name in ("weighted", "mean", "squares")})
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_total(weighted, dtype):
    """The sum of the logits, with class weights and without, beside that of the weighted ones."""
    names = names_of(("weighted", "mean", "total"))
    for logits, (n, vocab) in itertools.product(LOGITS, ((1, 1), (3, 4500))):
        weight = weights_of(vocab) if weighted else None
        arguments = products_of(n, vocab, dtype), targets_of(n, vocab), weight, logits
        known = check_statistics(*arguments, names)
        slopes = slopes_of(n)._replace(squares=None, total=normal(n, seed=9).float().to(DEVICE))
        check_gradients(*arguments, slopes, known)
        check_gradients(*arguments, slopes._replace(weighted=None), known)


def test_large_offset():
    """Statistics are relative to the largest logit: an offset of all costs nothing."""
    products = products_of(4, 5000, torch.float32).round() + 10_000
    near = products - 10_000
    target = targets_of(4, 5000)
    found, expected = (
        triton_rows.statistics(p, target, None, Logits(), ALL, overwrite=False) for p in (products, near)
    )
    assert torch.equal(found.maximum, expected.maximum + 10_000)
    for a, b in zip(found[1 : len(ALL)], expected[1 : len(ALL)], strict=True):
        assert torch.equal(a, b)
    check_gradients(products, target, None, Logits(), slopes_of(4))


def test_growing_logits():
    """Every block rescales what was summed before."""
    ramp = torch.linspace(-60, 60, 20_000, device=DEVICE).expand(2, -1).contiguous()
    for products in (ramp, ramp.flip(1)):
        check_statistics(products, targets_of(2, 20_000), weights_of(20_000), Logits())


def test_a_confident_row():
    """p - 1 is formed before it is rounded: in bf16 it would be 0."""
    products = torch.zeros(2, 300, device=DEVICE, dtype=torch.bfloat16)
    products[:, 7] = 14.0
    target = torch.tensor([7, 9], device=DEVICE)
    slopes = RowStatistics(None, torch.ones(2, device=DEVICE), -torch.ones(2, device=DEVICE))
    check_gradients(products, target, None, Logits(), slopes)
    known = triton_rows.statistics(products, target, None, Logits(), names_of(()), overwrite=False)
    triton_rows.logit_gradients(products, target, None, Logits(), slopes, known, products)
    assert -1e-3 < products[0, 7] < 0


def test_softcap_of_small_values():
    """tanh keeps the relative precision of values near 0."""
    products = torch.logspace(-6, 1, 60, device=DEVICE).unsqueeze(-1)
    found = triton_rows.statistics(
        products,
        torch.zeros(60, dtype=torch.int64, device=DEVICE),
        None,
        Logits(1.0, 2.0),
        names_of(()),
        overwrite=False,
    )
    expected = Logits(1.0, 2.0)(products.double()).squeeze(-1)
    error = (found.maximum.double() - expected).abs() / expected
    assert error.max() < 4 * torch.finfo(torch.float32).eps


@triton.jit
def capped_kernel(products, out, softcap, inverse_cap, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    tl.store(out + places, triton_kernels._logits(tl.load(products + places), None, softcap, inverse_cap))


@pytest.mark.parametrize("exponential", [-1, 0, 1])
@pytest.mark.parametrize("reciprocal", [-1, 0, 1])
def test_softcap_to_ulps(exponential, reciprocal, monkeypatch):
    """Four ulps at any argument, as far off as a device's exponential and reciprocal may be."""
    if INTERPRETED:
        off = {"create_exp2": exponential * 2.0**-22.5, "create_fdiv": reciprocal * 2.0**-23}
        for name, error in off.items():
            monkeypatch.setattr(triton.runtime.interpreter.InterpreterBuilder, name, inexact(name, error))
    size, softcap = 2**15, 30.0
    half = np.concatenate([np.geomspace(1e-30, 1e30, size // 4), np.linspace(15, 30, size // 4)]).astype(np.float32)
    products = torch.from_numpy(np.concatenate([half, -half])).to(DEVICE)
    found = torch.empty_like(products)
    capped_kernel[(1,)](products, found, softcap, 1 / softcap, SIZE=size, num_warps=8)
    expected = softcap * np.tanh(array(products).astype(np.float64) / softcap)
    errors = abs(array(found).astype(np.float64) - expected) / np.spacing(abs(expected).astype(np.float32))
    assert errors.max() < 4
    ends = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0], device=DEVICE)
    capped_kernel[(1,)](ends, found, softcap, 1 / softcap, SIZE=4, num_warps=1)
    torch.testing.assert_close(found[:4], torch.tensor([30.0, -30.0, torch.nan, 0.0], device=DEVICE), equal_nan=True)


def inexact(name, error):
    """The interpreter's operation ``name`` with a relative error."""
    exact = getattr(triton.runtime.interpreter.InterpreterBuilder, name)

    def operation(self, *arguments):
        result = exact(self, *arguments)
        result.data = (result.data.astype(np.float64) * (1 + error)).astype(result.data.dtype)
        return result

    return operation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_padded_rows(dtype):
    """What lies behind the vocabulary in padded rows is read and counted nowhere; results are those of dense rows."""
    for vocab in (1, 129, 4097):
        dense, target, weight = products_of(3, vocab, dtype), targets_of(3, vocab), weights_of(vocab)
        padded = torch.full((3, devices.padded_row(vocab)), torch.nan, dtype=dtype, device=DEVICE)[:, :vocab]
        assert triton_rows._width(padded) == devices.padded_row(vocab) and triton_rows._width(dense) == vocab
        padded.copy_(dense)
        found = [
            triton_rows.statistics(rows, target, weight, Logits(1.5, 5.0), ALL, overwrite=False)
            for rows in (dense, padded)
        ]
        for ours, expected in zip(*found, strict=True):
            assert ours is expected is None or torch.equal(ours, expected)
        arguments = target, weight, Logits(1.5, 5.0), slopes_of(3), found[0]
        outs, sums = [torch.empty_like(dense), torch.empty_like(dense), padded], []
        for rows, out in zip((dense, padded, padded), outs, strict=True):
            triton_rows.logit_gradients(rows, *arguments, out)
        assert torch.equal(outs[1], outs[0]) and torch.equal(outs[2], outs[0])
        padded.copy_(dense)
        for rows in (dense, padded):
            sums.append(ColumnSums(vocab, torch.float32, DEVICE))
            triton_rows.logit_gradients(rows, *arguments, rows, sums[-1])
        assert torch.equal(padded, dense)
        assert torch.equal(sums[1].largest, sums[0].largest) and torch.equal(sums[1].total, sums[0].total)


def test_rows_that_are_not_padded():
    """Rows of a wider tensor are padded if all begin at a multiple of 16 elements, and the last has room as well."""
    whole = torch.zeros(100, device=DEVICE)
    for strides, offset, width in (
        ((32, 1), 0, 32),
        ((32, 1), 4, 32),
        ((32, 1), 5, 18),
        ((30, 1), 0, 18),
        ((16, 1), 0, 18),
        ((32, 2), 0, 18),
    ):
        assert triton_rows._width(whole.as_strided((3, 18), strides, offset)) == width


@pytest.mark.parametrize("kept", [slice(6000, 6003), slice(0, 2), slice(4095, 4097)], ids=str)
def test_masked_words(kept):
    """Logits of -inf, whole blocks of them too."""
    products = torch.full((2, 9000), -torch.inf, device=DEVICE)
    products[:, kept] = products_of(2, kept.stop - kept.start, torch.float32)
    target = torch.full((2,), kept.start, device=DEVICE)
    check_statistics(products, target, None, Logits(), names_of(("mean", "correct")))
    check_gradients(products, target, None, Logits(), slopes_of(2, weighted=False))
    found = triton_rows.statistics(products, target, None, Logits(), ALL, overwrite=False)
    assert (found.weighted == -torch.inf).all()


def test_rows_without_a_finite_logit():
    for value in (-torch.inf, torch.inf, torch.nan):
        products = torch.zeros(2, 300, device=DEVICE)
        products[0] = value
        found = triton_rows.statistics(products, targets_of(2, 300), None, Logits(), names_of(()), overwrite=False)
        assert found.nll.isnan().tolist() == [True, False]


def test_target_out_of_range_is_never_finite():
    target = torch.tensor([300, -1, 299], device=DEVICE)
    found = triton_rows.statistics(torch.zeros(3, 300, device=DEVICE), target, None, Logits(), ALL, overwrite=False)
    assert found.nll.isnan().tolist() == [True, True, False]


def test_first_of_equals():
    products = torch.zeros(4, 9000, device=DEVICE)
    products[1, [5, 6, 8999]] = products[2, [4095, 4096]] = 2.0
    products[3] = -torch.inf
    target = torch.tensor([0, 5, 4096, 0], device=DEVICE)
    found = triton_rows.statistics(products, target, None, Logits(), names_of(("correct",)), overwrite=False)
    assert found.correct.tolist() == [1.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_rows(dtype):
    """Part of a wider tensor, and columns that lie side by side."""
    wide = products_of(4, 700, dtype)
    tall = products_of(300, 4, dtype)
    for products in (wide[:, 3:303], wide[::2, 100:], tall.t()):
        n, vocab = products.shape
        arguments = targets_of(n, vocab), weights_of(vocab), Logits(0.7)
        known = check_statistics(products, *arguments)
        out = torch.zeros(n, vocab + 9, dtype=dtype, device=DEVICE)[:, 5:-4]
        single = known.map(torch.Tensor.float)
        triton_rows.logit_gradients(products, *arguments, slopes_of(n), single, out)
        expected = torch.empty(n, vocab, dtype=dtype, device=DEVICE)
        triton_rows.logit_gradients(products.contiguous(), *arguments, slopes_of(n), single, expected)
        assert torch.equal(out, expected)
        assert out._base[:, :5].count_nonzero() == out._base[:, -4:].count_nonzero() == 0


def far_apart(rows, stride, vocab):
    """Rows of bf16 ``stride`` elements apart."""
    size = (rows - 1) * stride + vocab
    if DEVICE.type == "cpu":  # pages that nobody touches take no memory
        memory = mmap.mmap(-1, 2 * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        whole = torch.frombuffer(memory, dtype=torch.bfloat16)
    else:
        whole = torch.empty(size, dtype=torch.bfloat16, device=DEVICE)
    return whole.as_strided((rows, vocab), (stride, 1))


@pytest.mark.parametrize(("rows", "stride"), [(2, 2**31 + 64), (5, 2**29 + 64)])
def test_offsets_beyond_31_bits(rows, stride):
    """The stride needs them, or only its product with the row's number does."""
    products = far_apart(rows, stride, 4200)
    near = products_of(rows, 4200, torch.bfloat16)
    products.copy_(near)
    arguments = targets_of(rows, 4200), weights_of(4200), Logits()
    known = check_statistics(products, *arguments).map(torch.Tensor.float)
    for columns in (None, ColumnSums(4200, torch.float32, DEVICE)):
        for block in (products, near):
            triton_rows.logit_gradients(block, *arguments, slopes_of(rows), known, block, columns)
        assert torch.equal(products, near)


@pytest.mark.parametrize("logits", LOGITS, ids=str)
@pytest.mark.parametrize("dtype", FEW_DTYPES, ids=str)
def test_shards(dtype, logits):
    """Uneven shards, one of them empty, combined; a target is in one of them."""
    n, vocab, bounds = 5, 6000, (0, 37, 37, 5000, 6000)
    products, target, weight = products_of(n, vocab, dtype), targets_of(n, vocab), weights_of(vocab)
    products[0, :5000] = -torch.inf  # a shard whose words are all masked
    target[0] = 5500
    products[1] = 0.0  # equals in all shards
    target[1] = 0
    for wanted in (names_of(()), names_of(("mean", "correct")), ALL):
        parts = []
        for kernels in (triton_rows, torch_rows):
            of_shards = []
            for start, stop in itertools.pairwise(bounds):
                column = target - start
                here = (column >= 0) & (column < stop - start)
                of_shards.append(
                    kernels.shard_statistics(
                        products[:, start:stop],
                        column.where(here, -1),
                        weight[start:stop],
                        logits,
                        wanted,
                        start,
                    )
                )
            assert all(part.shape == (n, num_columns(wanted)) for part in of_shards)
            parts.append(statistics_of(merge_shards(torch.stack(of_shards), wanted), target, wanted))
        expected = torch_rows.statistics(products.double(), target, weight.double(), logits, wanted, overwrite=False)
        for name, ours, twin, right in zip(RowStatistics._fields, *parts, expected, strict=True):
            if right is None or name == "correct" or (name == "maximum" and logits.softcap is None):
                assert ours is right is None or torch.equal(ours, twin)
            elif name == "weighted" and logits.softcap is None:
                assert (ours[0] == -torch.inf) and (right[0] == -torch.inf)
                assert_no_worse(ours[1:], twin[1:], right[1:], name)
            else:
                assert_no_worse(ours, twin, right, name)


def test_rows_without_slopes_are_not_read():
    """What an ignored token's logits hold reaches no gradient."""
    products = products_of(3, 4200, torch.float32)
    products[1] = torch.nan
    slopes = slopes_of(3).map(torch.Tensor.clone)
    for values in slopes.named().values():
        values[1] = 0.0
    known = torch_rows.statistics(products, targets_of(3, 4200), weights_of(4200), Logits(), ALL, overwrite=False)
    per_row = PerRow(counted=torch.tensor([True, False, True], device=DEVICE))
    for kernels in (triton_rows, torch_rows):
        out = torch.full_like(products, torch.nan)
        arguments = products, targets_of(3, 4200), weights_of(4200), Logits(), slopes, known, out
        kernels.logit_gradients(*arguments, per_row=per_row)
        assert out[1].count_nonzero() == 0 and not out.isnan().any()
    found = []
    for kernels in (triton_rows, torch_rows):
        columns, out = ColumnSums(4200, torch.float32, DEVICE), torch.full_like(products, torch.nan)
        arguments = (products, targets_of(3, 4200), weights_of(4200), Logits(), slopes, known, out, columns)
        kernels.logit_gradients(*arguments, per_row=per_row)
        assert columns.largest.isfinite().all() and columns.total.isfinite().all()
        found.append(out)
    torch.testing.assert_close(*found)
    assert not found[0].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_and_gradients(dtype):
    products, target = products_of(4, 4500, dtype), targets_of(4, 4500)
    slopes, seen = slopes_of(4, mean=False, squares=False), []

    def of(block, rows):
        seen.append(rows)
        return slopes.at(rows)

    gradients = products.clone()
    found = triton_rows.statistics_and_gradients_(
        gradients, target, None, Logits(0.7, 9.0), names_of(("weighted",)), of
    )
    twin = products.clone()
    torch_rows.statistics_and_gradients_(twin, target, None, Logits(0.7, 9.0), names_of(("weighted",)), of)
    known = check_statistics(products, target, None, Logits(0.7, 9.0), names_of(("weighted",)))
    expected = torch.empty_like(products, dtype=torch.float64)
    torch_rows.logit_gradients(products.double(), target, None, Logits(0.7, 9.0), double(slopes), known, expected)
    assert seen[0] == slice(None)
    assert_no_worse(gradients, twin, expected, "gradients")
    assert_no_worse(found.log_sum, known.log_sum.float(), known.log_sum, "log_sum")


@pytest.mark.parametrize("logits", LOGITS, ids=str)
@pytest.mark.parametrize("dtype", FEW_DTYPES, ids=str)
def test_gradients_and_columns(dtype, logits):
    """The gradients of one kernel and of the other, and what the filter asks of their columns."""
    for n, vocab in ((1, 1), (5, 129), (32, 128), (33, 300)):
        products, target, weight = products_of(n, vocab, dtype), targets_of(n, vocab), weights_of(vocab)
        known = torch_rows.statistics(products.double(), target, None, logits, ALL, overwrite=False)
        for slopes in (slopes_of(n), slopes_of(n, weighted=False, mean=False)):
            arguments = target, weight, logits, slopes, known.map(torch.Tensor.float)
            ours, twin, expected = (
                ColumnSums(vocab, kind, DEVICE) for kind in (torch.float32, torch.float32, torch.float64)
            )
            alone, together, out = torch.empty_like(products), products.clone(), torch.empty_like(products)
            unsmoothed = slopes._replace(weighted=None)
            triton_rows.logit_gradients(products, target, weight, logits, unsmoothed, arguments[-1], alone)
            triton_rows.logit_gradients(together, *arguments, together, ours)
            torch.testing.assert_close(together, alone)
            torch_rows.logit_gradients(products, *arguments, out, twin)
            torch.testing.assert_close(together, out)
            arguments = target, weight.double(), logits, double(slopes), known
            torch_rows.logit_gradients(products.double(), *arguments, out.double(), expected)
            assert_no_worse(ours.largest, twin.largest, expected.largest, "largest")
            assert_no_worse(ours.total, twin.total, expected.total, "total")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_into(dtype):
    source = normal(70, 80).to(dtype).to(DEVICE)
    for factor in (1.0, -2.5):
        value = torch.tensor(factor, device=DEVICE)
        for narrow in (dtype, torch.bfloat16):
            out = torch.full_like(source, torch.nan, dtype=narrow)
            assert triton_rows.scale_into(source, value, out) is out
            assert torch.equal(out, (source.float() * factor).to(narrow))
        in_place = source.clone()
        triton_rows.scale_into(in_place, value, in_place)
        assert torch.equal(in_place, (source.float() * factor).to(dtype))


def test_nothing_to_do():
    """No rows, and no columns."""
    for n, vocab in ((0, 5), (3, 0)):
        products = torch.empty(n, vocab, device=DEVICE)
        target = torch.zeros(n, dtype=torch.int64, device=DEVICE)
        zeros = torch.zeros(n, device=DEVICE)
        triton_rows.logit_gradients(
            products,
            target,
            None,
            Logits(),
            RowStatistics(None, zeros, zeros),
            RowStatistics(zeros, zeros, zeros),
            products,
        )
    found = triton_rows.statistics(products.new_empty(0, 5), target[:0], None, Logits(), ALL, overwrite=False)
    assert [len(part) for part in found.named().values()] == [0] * len(ALL)
    triton_rows.scale_into(zeros[:0], torch.ones((), device=DEVICE), zeros[:0])


def test_twice_the_same():
    products, target, weight = products_of(5, 9000, torch.bfloat16), targets_of(5, 9000), weights_of(9000)
    first, second = (
        triton_rows.statistics(products, target, weight, Logits(0.7, 9.0), ALL, overwrite=False) for _ in range(2)
    )
    for name in ALL:
        assert torch.equal(getattr(first, name), getattr(second, name))
