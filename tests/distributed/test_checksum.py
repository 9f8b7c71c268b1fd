import itertools

import pytest
import torch

from chunked_ce.parallel import checksum as module
from chunked_ce.parallel.checksum import checksum

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_places_tell(dtype):
    """Every vector of three small values has a number of its own, whatever its strides."""
    vectors = [torch.tensor(vector).to(dtype) for vector in itertools.product((0, 1, 3), repeat=3)]
    found = {tuple(vector.tolist()): checksum(vector) for vector in vectors}
    assert len(set(found.values())) == len(found)
    for vector in vectors:
        assert checksum(vector.expand(2, 3).t().contiguous().t()[1]) == found[tuple(vector.tolist())]


def test_equal_values_are_alike():
    values = torch.tensor([0.0, torch.nan, torch.inf, 1.0])
    twin = torch.tensor([-0.0, -torch.nan, torch.inf, 1.0])
    twin.view(torch.int32)[1] += 1  # another NaN
    assert twin[1].isnan() and checksum(twin) == checksum(values)
    assert checksum(values.half()) == checksum(twin.half())


def test_blocks(monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 10)
    values = torch.randn(7, 11)
    assert checksum(values) == checksum(values.clone())
    orders = [values.flatten().roll(at) for at in range(values.numel())]
    assert len({checksum(order) for order in orders}) == len(orders)
    assert checksum(values[:0]) == 0


def test_a_bit_tells():
    values = torch.randn(1000)
    for at in (0, 500, 999):
        changed = values.clone()
        changed.view(torch.int32)[at] ^= 1
        assert checksum(changed) != checksum(values)
