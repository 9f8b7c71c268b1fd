"""An out-of-memory error in the loss: once more with a quarter of the logits at a time, and no more than once."""

import warnings

import pytest
import torch

from chunked_ce import ChunkOptions, linear_cross_entropy, plan
from chunked_ce.engine import device_memory, sources
from chunked_ce.plan import predict_memory
from tests.cases import WAYS, assert_equal, gradients, problem

BUDGET = 4 * 40 * 101  # 40 tokens


class Device:
    """A device on which a chunk's logits may take `most` bytes."""

    def __init__(self, monkeypatch, most):
        self.asked = []
        make = sources.logits_scratch

        def limited(tokens, words, *, dtype, device, keep):
            self.asked.append(tokens * words * dtype.itemsize)
            if self.asked[-1] > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is.")
            return make(tokens, words, dtype=dtype, device=device, keep=keep)

        monkeypatch.setattr(sources, "logits_scratch", limited)


def step(case, options):
    loss = case.loss(options=options)
    return [loss, *gradients(loss, case)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quarter_of_the_logits_is_tried(monkeypatch, way, dtype):
    case = problem(80, 6, 101, bias=True, ignored=0.0, dtype=dtype)
    budget = BUDGET // 4 * dtype.itemsize
    expected = step(case, ChunkOptions(gradients=way, memory_budget=budget // 4))
    device = Device(monkeypatch, most=budget // 2)
    with pytest.warns(UserWarning, match=rf"out of memory with .* at a time.*memory_budget={budget // 4}\)"):
        got = step(case, ChunkOptions(gradients=way, memory_budget=budget))
    assert_equal(got, expected)
    assert max(device.asked) > budget // 2
    assert min(device.asked) <= budget // 4


@pytest.mark.parametrize("trained", [True, False])
def test_a_filtered_backward_is_cut_by_tokens(monkeypatch, trained):
    """From the plan's own budget, which depends on whether a gradient of the head is summed."""
    monkeypatch.setattr(plan, "_LEAST_BUDGET", 4 * 101 * 8)
    case = problem(80, 200, 101, ignored=0.0)
    case.head.requires_grad_(trained)
    loss = case.loss(options=ChunkOptions(gradients="backward", gradient_filter=1e-3))
    tokens = 80 if trained else 8
    device = Device(monkeypatch, most=4 * 101 * tokens - 1)
    with pytest.warns(UserWarning, match=f"out of memory with {tokens} of 80 tokens at a time"):
        loss.backward()
    assert device.asked == [4 * 101 * tokens, 4 * 101 * tokens // 4]


@pytest.mark.parametrize("way", WAYS)
def test_the_warning_names_the_caller(monkeypatch, way):
    case = problem(80, 6, 101, ignored=0.0)
    Device(monkeypatch, most=BUDGET // 2)
    with pytest.warns(UserWarning, match="out of memory") as caught:
        linear_cross_entropy(case.hidden, case.head, case.target, options=ChunkOptions("auto", BUDGET, way)).backward()
    assert {warning.filename for warning in caught} == {__file__}


@pytest.mark.parametrize("way", WAYS)
def test_only_once(monkeypatch, way):
    case = problem(80, 6, 101, ignored=0.0)
    device = Device(monkeypatch, most=0)
    with pytest.warns(UserWarning, match="out of memory"), pytest.raises(torch.OutOfMemoryError):
        step(case, ChunkOptions(gradients=way, memory_budget=BUDGET))
    assert len(device.asked) == 2


@pytest.mark.parametrize("way", WAYS)
def test_a_chunk_size_that_was_chosen_stays(monkeypatch, way):
    case = problem(80, 6, 101, ignored=0.0)
    device = Device(monkeypatch, most=0)
    with warnings.catch_warnings(), pytest.raises(torch.OutOfMemoryError):
        warnings.simplefilter("error")
        step(case, ChunkOptions(gradients=way, chunk_size=40))
    assert len(device.asked) == 1


def test_one_chunk_in_bf16_becomes_several(monkeypatch):
    """The sum over several chunks is wider than was planned for one."""
    case = problem(64, 16, 101, ignored=0.0, dtype=torch.bfloat16)
    Device(monkeypatch, most=2 * 64 * 101 - 1)
    with pytest.warns(UserWarning, match="out of memory with 64 of 64 tokens"):
        got = step(case, None)
    expected = step(case, ChunkOptions(memory_budget=2 * 16 * 101))
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == e.dtype
        assert (g - e).norm() <= 1e-2 * e.norm()


def test_logits_are_halved_where_memory_is_short(monkeypatch):
    """The plan is that of the shapes, whatever is free, until the loss would not fit."""
    case, most = problem(80, 6, 101, ignored=0.0), 80 * 4 * 101
    device = Device(monkeypatch, most=2**40)
    law = predict_memory(80, 101, 6, dtype=torch.float32)
    monkeypatch.setattr(plan, "_LEAST_BUDGET", 8 * 4 * 101)
    monkeypatch.setattr(plan, "budget", lambda *sizes, **_: plan.Budget(sizes[2] or most, "usual"))
    monkeypatch.setattr(device_memory, "_is_known", lambda device: True)
    for lacking, expected in ((0, most), (1, most // 2), (most // 2 + 1, most // 4), (2**40, most // 8)):
        monkeypatch.setattr(device_memory, "_free_bytes", lambda device, enough, less=lacking: law.peak - less)
        device_memory._predicted.cache_clear()
        step(case, None)
        assert device.asked.pop() == expected
    step(case, ChunkOptions(memory_budget=3 * 4 * 101))
    assert device.asked.pop() == 3 * 4 * 101
    device_memory._predicted.cache_clear()


@pytest.mark.parametrize(("known", "expected"), [(True, 30 + 500), (False, 500)])
def test_what_is_free(known, expected, monkeypatch):
    """What torch's allocator keeps and the driver has; another allocator may have no statistics."""

    def memory_stats(device):
        if not known:
            raise RuntimeError("CUDAPluggableAllocator does not yet support getDeviceStats.")
        return {"reserved_bytes.all.current": 100, "allocated_bytes.all.current": 70}

    monkeypatch.setattr(torch.cuda, "memory_stats", memory_stats)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (500, 1000))
    assert device_memory._free_bytes(torch.device("cuda"), enough=31) == expected
