"""Scratch memory that a process keeps between calls."""

import gc
import mmap
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from chunked_ce import ChunkOptions, linear_cross_entropy
from chunked_ce.engine import scratch
from chunked_ce.plan import predict_memory

pytestmark = pytest.mark.skipif(not hasattr(mmap, "MADV_FREE"), reason="the system cannot take pages back later")
MIB = 2**20
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_kept():
    scratch.release()
    yield
    scratch.release()


def piece(size, keep=True):
    return scratch.scratch(size // 4, dtype=torch.float32, device=CPU, keep=keep)


def kept():
    return [len(memory) for memory in scratch._kept]


def test_memory_is_kept_once_no_tensor_uses_it():
    tensor = piece(16 * MIB).fill_(1)
    view, place = tensor[10:], tensor.data_ptr()
    del tensor
    assert kept() == [] and view.min() == 1
    del view
    assert kept() == [16 * MIB]
    again = piece(12 * MIB)
    assert again.data_ptr() == place and len(again) == 3 * MIB and kept() == []


def test_two_calls_never_share_memory():
    first = piece(16 * MIB)
    del first
    first, second = piece(16 * MIB).fill_(1), piece(16 * MIB).fill_(2)
    assert first.min() == first.max() == 1 and second.min() == second.max() == 2
    del first, second
    assert kept() == [16 * MIB]

    def call(value):
        for _ in range(20):
            tensor = piece(8 * MIB).fill_(value)
            if not (tensor == value).all():
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(4)))
    assert len(kept()) == 1


@pytest.mark.parametrize(("size", "keep"), [(4 * MIB, True), (257 * MIB, True), (16 * MIB, False)])
def test_what_is_not_kept(size, keep):
    tensor = piece(size, keep)
    del tensor
    assert kept() == []


def test_one_piece_is_kept():
    """The largest; one that is too small is given back before another is taken."""
    large, small = piece(32 * MIB), piece(16 * MIB)
    del large, small
    assert kept() == [32 * MIB]
    tensor = piece(48 * MIB)
    assert kept() == []
    del tensor
    assert kept() == [48 * MIB]
    scratch.release()
    assert kept() == []


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs Linux's figures of a process")
def test_the_system_may_take_its_pages():
    def lazily_free():
        with open("/proc/self/smaps_rollup") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("LazyFree"))

    tensor = piece(32 * MIB).fill_(1)
    before = lazily_free()
    del tensor
    assert lazily_free() - before >= 31 * MIB
    tensor = piece(32 * MIB).fill_(1)
    assert lazily_free() <= before + MIB and tensor.min() == 1


@pytest.mark.parametrize(("dtype", "keeps"), [(torch.float32, True), (torch.bfloat16, False)])
def test_what_a_loss_keeps(dtype, keeps):
    """No logits beside a wider sum of the head's gradient: they would add to the peak of the backward."""
    n, d, vocab = 512, 8, 16384
    hidden, head = (torch.randn(*shape).to(dtype).requires_grad_() for shape in ((n, d), (vocab, d)))
    target = torch.randint(vocab, (n,))
    options = ChunkOptions(memory_budget=10 * MIB)
    for _ in range(2):
        linear_cross_entropy(hidden, head, target, options=options).backward()
        gc.collect()
        law = predict_memory(n, vocab, d, dtype=dtype, options=options)
        assert bool(kept()) == ("logits" in law.backward) == keeps
        assert not keeps or kept() == [law.backward["logits"]]
    linear_cross_entropy(hidden, head, target, options=ChunkOptions(gradients="backward")).backward()
    assert kept()
