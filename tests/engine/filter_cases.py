"""The gradient filter's Triton kernels against their torch twins, on the device there is or in Triton's interpreter.

Run by `test_triton_rows.py` and `test_cuda.py` as `kernel_cases.py` is.
"""

import itertools

import pytest
import torch

from chunked_ce import ChunkOptions
from chunked_ce.engine import sweep
from chunked_ce.rows import torch_filter, triton_filter
from chunked_ce.rows.backend import INTERPRETED
from chunked_ce.rows.torch_filter import PADDED, padded
from tests.cases import gradients
from tests.engine.interpreter import round_as_devices_do
from tests.engine.test_filtered import zipf_problem

round_as_devices_do()

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FEW_DTYPES = [*DTYPES[:2], pytest.param(torch.float16, marks=pytest.mark.thorough)]
# Rows, columns and the share that is kept: none, all, one row and column, tiles that none of the sizes divides.
SHAPES = ((1, 1, 0.0), (1, 1, 1.0), (3, 70, 0.0), (5, 300, 1.0), (17, 257, 0.1), (33, 1030, 0.3))
GROUPS = 4


def flag(value):
    """Not 0 if a chunk's results are skipped, (), on the device."""
    return torch.full((), value, dtype=torch.int32, device=DEVICE)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=generator(seed)).to(dtype).to(DEVICE)


def places_of(vocab, share, seed=0):
    """The place of each kept column, -1 - the group of each dropped one, and the number of kept ones."""
    kept = torch.rand(vocab, generator=generator(seed)) < share
    group = torch.randint(GROUPS, (vocab,), generator=generator(seed + 1))
    place = torch.where(kept, kept.cumsum(0) - 1, -1 - group).int()
    return place.to(DEVICE), int(kept.sum())


@pytest.mark.parametrize("dtype", FEW_DTYPES, ids=str)
@pytest.mark.parametrize(("n", "vocab", "share"), SHAPES)
def test_compact(n, vocab, share, dtype):
    whole = normal(n, vocab + 5, dtype=dtype)  # rows that begin anywhere
    place, count = places_of(vocab, share)
    for values, width in itertools.product((whole[:, :vocab], whole[:, :vocab].contiguous()), (PADDED, padded(count))):
        kept, left = triton_filter.compact_at(values, place, flag(0), GROUPS, width)
        expected, sums = torch_filter.compact_at(values.float(), place, flag(0), GROUPS, width)
        known = min(count, width)
        assert torch.equal(kept[:, :known].float(), expected[:, :known])
        torch.testing.assert_close(left, sums, rtol=1e-5, atol=1e-5)


def test_compact_splits_columns_among_programs(monkeypatch):
    values, (place, count) = normal(20, 3000, dtype=torch.bfloat16), places_of(3000, 0.2)
    found = []
    for programs in (1, 1024):
        monkeypatch.setattr(triton_filter, "_PROGRAMS", programs)
        kept, left = triton_filter.compact_at(values, place, flag(0), GROUPS, padded(count))
        found.append((kept[:, :count], left))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-5)


def test_a_chunk_that_is_skipped_is_neither_read_nor_written(monkeypatch):
    place, _ = places_of(300, 0.5)
    memory = torch.full((3 * 192,), 7.0, device=DEVICE)
    make = torch.Tensor.new_empty

    def new_empty(self, *shape, **keywords):
        return memory.view(shape) if shape == (3, 192) else make(self, *shape, **keywords)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    kept, _ = triton_filter.compact_at(normal(3, 300), place, flag(1), GROUPS, 192)
    assert kept.shape == (3, 192) and (memory == 7).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tails", [4, 5])
def test_tail_columns(num_tails, dtype):
    for n, count, width in ((1, 0, 64), (17, 5, 64), (20, 52, 64), (20, 53, 128), (3, 60, 64), (3, 70, 64)):
        left = normal(n, num_tails)
        found = []
        for kernels in (triton_filter, torch_filter):
            kept = torch.full((n, width), 9.0, dtype=dtype, device=DEVICE)
            kernels.tail_columns_(kept, left, torch.tensor(count, dtype=torch.int32, device=DEVICE), 8.0)
            found.append(kept)
        assert torch.equal(*found)
        assert (found[0][:, :count] == 9).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("vocab", "hidden"), [(1, 1), (30, 8), (300, 129), (1025, 64)])
def test_summed_tail(vocab, hidden, dtype):
    for num_tails in (4, 5):
        right = normal(vocab, num_tails).abs()
        right /= right.sum(0)
        weight = normal(vocab, hidden, dtype=dtype)
        got = triton_filter.summed_tail(right, weight, flag(0))
        expected = torch_filter.summed_tail(right.double(), weight.double(), flag(0))
        assert got.shape == expected.shape and got.dtype == torch.float32
        # In two parts, the tail's shares are as good as in fp32; products of them are exact.
        assert (got - expected).abs().max() <= 2.0**-15 * expected.abs().max()


@pytest.mark.parametrize("dtype", FEW_DTYPES, ids=str)
@pytest.mark.parametrize(("vocab", "hidden", "share"), [(1, 1, 0.0), (1, 3, 1.0), (100, 8, 0.0), (333, 130, 0.2)])
def test_head_rows(vocab, hidden, share, dtype):
    weight, tail, (place, count) = normal(vocab, hidden, dtype=dtype), normal(4, hidden), places_of(vocab, share)
    width = padded(count + 12)
    found = [kernels.head_rows(weight, place, tail, count, width, 0.5) for kernels in (triton_filter, torch_filter)]
    assert torch.equal(*found)
    assert (found[0][count + 12 :] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunks", [0, 1, 3])
@pytest.mark.parametrize("with_total", [False, True])
def test_finished(with_total, chunks, dtype):
    for vocab, hidden in ((1, 1), (33, 129), (100, 64)):
        places, rows = [], 0
        for seed in range(chunks):
            place, count = places_of(vocab, 0.3 if vocab > 1 else 1.0, seed)
            places.append(place.where(place < 0, place + rows))
            rows += count
        places = torch.stack(places) if places else torch.empty(0, vocab, dtype=torch.int32, device=DEVICE)
        parts, right, left = normal(rows, hidden), normal(vocab, 4 * chunks + 1), normal(4 * chunks + 1, hidden)
        total = normal(vocab, hidden, dtype=dtype) if with_total else None
        for factor in (None, torch.tensor(-0.7, device=DEVICE)):
            out = torch.full((vocab, hidden), torch.nan, dtype=dtype, device=DEVICE)
            got = triton_filter.finished(out, total, parts, places, right, left, factor)
            assert got is out
            wide = torch.empty(vocab, hidden, dtype=torch.float64, device=DEVICE)
            arguments = (None if part is None else part.double() for part in (total, parts))
            expected = torch_filter.finished(wide, *arguments, places, right.double(), left.double(), factor)
            once = torch.finfo(dtype).eps / 2 + 2.0**-20
            assert ((got - expected).abs() <= once * expected.abs() + 2.0**-18).all()
            if total is not None:
                in_place = total.clone()
                triton_filter.finished(in_place, in_place, parts, places, right, left, factor)
                assert torch.equal(in_place, out)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("dtype", FEW_DTYPES, ids=str)
def test_all_of_it(dtype, way, smoothing, monkeypatch):
    """The kernels together, in a loss of several chunks, filter as their twins do."""
    case = zipf_problem(30, 16, 300, dtype=dtype, bias=True)
    case = case.fresh(
        hidden=case.hidden.detach().to(DEVICE).requires_grad_(),
        head=case.head.detach().to(DEVICE).requires_grad_(),
        target=case.target.to(DEVICE),
        bias=case.bias.detach().to(DEVICE).requires_grad_(),
    )
    options = ChunkOptions(chunk_size=12, gradients=way, gradient_filter=1e-3, backend="triton")
    upstream = torch.tensor(0.7, device=DEVICE)
    got = gradients(case.loss(options=options, label_smoothing=smoothing), case, upstream)
    exact = gradients(case.loss(options=ChunkOptions(chunk_size=12), label_smoothing=smoothing), case, upstream)
    monkeypatch.setattr(sweep, "filter_kernels", lambda specification, device: torch_filter)
    expected = gradients(case.loss(options=options, label_smoothing=smoothing), case, upstream)
    for g, e, x in zip(got, expected, exact, strict=True):
        assert (g - e).double().norm() <= 4 * torch.finfo(dtype).eps * e.double().norm()
        assert (g - x).double().norm() <= 0.05 * x.double().norm()
    assert not torch.allclose(got[1], exact[1], rtol=1e-6, atol=0)
