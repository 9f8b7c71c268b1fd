"""Rows of logits divided among threads: the same bits, and nothing that the caller could notice."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from chunked_ce import Teacher, linear_cross_entropy, logits_loss
from chunked_ce.objectives import Divergence
from chunked_ce.rows import sizes, threads, torch_rows
from chunked_ce.rows.columns import ColumnSums
from chunked_ce.rows.exponential import exp_
from chunked_ce.rows.statistics import STATISTICS, Logits, PerRow, RowStatistics, names_of
from tests.cases import REDUCTIONS_AND_WAYS, assert_equal, check_loss, chunks, problem
from tests.objectives.teachers import divergence

ROWS = names_of([name for name in STATISTICS if not STATISTICS[name].of_teacher and name != "at_ids"])


@pytest.fixture(autouse=True)
def three_threads(monkeypatch):
    """Three threads, which visit few enough logits at a time that all of them take part."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    monkeypatch.setattr(threads, "_MOST", 3)
    monkeypatch.setattr(sizes, "_CACHED_ELEMENTS", 64)
    yield
    torch.set_num_threads(before)


def new_threads_number():
    """The number of threads that a new thread computes on."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


def in_threads(function, count=3, items=12):
    """The results of ``function()`` for each of so many items, and the threads that called it."""
    results, callers = [], set()

    def work(taken):
        for _ in taken:
            time.sleep(0.002)
            results.append(function())
            callers.add(threading.get_ident())

    threads.share(range(items), work, count)
    return results, callers


def test_each_item_is_worked_on_once_and_not_by_the_caller():
    seen = []
    threads.share(range(100), lambda taken: seen.extend(taken), 3)
    assert sorted(seen) == list(range(100))
    _, callers = in_threads(int)
    assert len(callers) > 1 and threading.get_ident() not in callers


@pytest.mark.parametrize(("items", "count"), [(0, 3), (1, 3), (5, 1)])
def test_one_thread_is_the_caller(items, count):
    results, callers = in_threads(int, count, items)
    assert len(results) == items and callers <= {threading.get_ident()}


def test_numbers_of_threads():
    """Operations of such a thread take no other one; the caller and threads to come keep their numbers."""
    results, _ = in_threads(lambda: (torch.get_num_threads(), threads.num_threads()))
    assert set(results) == {(1, 1)}
    assert torch.get_num_threads() == 3 == new_threads_number()
    assert threads.num_threads() == 3


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere OpenMP may be hidden")
def test_the_number_of_new_threads_is_left_alone(monkeypatch):
    """Not even while threads of ours start: a thread of the user's that starts then would keep a single one."""
    threads._forget()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "set_num_threads", lambda number: pytest.fail("sets it for new threads too"))
        assert set(in_threads(torch.get_num_threads)[0]) == {1}


def test_a_thread_that_has_a_number_of_its_own():
    def call():
        torch.set_num_threads(2)
        results, _ = in_threads(torch.get_num_threads)
        return set(results), torch.get_num_threads(), threads.num_threads()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(call).result() == ({1}, 2, 2)


@pytest.mark.parametrize("count", [1, 3])
def test_denormals_count_as_zero_in_the_work_alone(count):
    torch.set_num_threads(count)
    tiny = torch.full((64,), 1e-40)
    results, _ = in_threads(lambda: (tiny * 1).sum().item(), count)
    assert set(results) == {0.0}
    assert (tiny * 1).sum() > 0 and 5e-324 > 0
    with pytest.raises(RuntimeError, match="stop"):
        threads.share(range(3), lambda taken: fail(), count)
    assert (tiny * 1).sum() > 0
    torch.set_flush_denormal(True)
    try:
        in_threads(int, count)
        assert (tiny * 1).sum() == 0
    finally:
        torch.set_flush_denormal(False)


def test_threads_of_openmp_keep_their_denormals():
    """They inherit how the thread computes that makes OpenMP start them, which may be in the work."""
    tiny = torch.full((64,), 1e-40)
    results, callers = in_threads(lambda: (tiny * 1).sum().item(), 1)
    assert min(results) > 0 and callers == {threading.get_ident()}


def fail(*_):
    raise RuntimeError("stop")


def test_an_error_stops_all_and_is_raised():
    done = []

    def work(taken):
        for item in taken:
            if item == 5:
                fail()
            time.sleep(0.002)
            done.append(item)

    with pytest.raises(RuntimeError, match="stop"):
        threads.share(range(1000), work, 3)
    count = len(done)
    assert count < 100
    time.sleep(0.01)
    assert len(done) == count


@pytest.mark.parametrize("count", [1, 3])
def test_an_error_keeps_no_tensors(count):
    """The garbage collector need not find them."""

    def failed():
        tensor = torch.empty(3)
        reference = weakref.ref(tensor)
        with contextlib.suppress(RuntimeError):
            threads.share(range(9), lambda taken: fail(tensor), count)
        return reference

    gc.disable()
    try:
        assert failed()() is None
    finally:
        gc.enable()


@pytest.mark.skipif(os.name == "nt", reason="needs signals")
def test_an_interrupt_stops_all():
    done = []

    def work(taken):
        for item in taken:
            if item == 5:
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.002)
            done.append(item)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            threads.share(range(1000), work, 3)
    finally:
        signal.signal(signal.SIGINT, before)
    count = len(done)
    assert count < 500
    time.sleep(0.01)
    assert len(done) == count


def test_many_callers_and_calls_within_the_work():
    def inner():
        seen = []
        threads.share(range(4), lambda taken: seen.extend(taken), threads.num_threads())
        return seen

    with ThreadPoolExecutor(8) as pool:
        found = [pool.submit(in_threads, inner, 3, 5) for _ in range(16)]
        assert all(one.result(timeout=60)[0] == [[0, 1, 2, 3]] * 5 for one in found)


def test_grad_mode_and_inference_mode():
    state = lambda: (torch.is_grad_enabled(), torch.is_inference_mode_enabled())  # noqa: E731
    assert set(in_threads(state)[0]) == {(False, False)}
    with torch.inference_mode():
        assert set(in_threads(state)[0]) == {(False, True)}


class Functions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Dispatches(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Functions, Dispatches, torch.profiler.profile])
def test_who_watches_sees_every_operation(mode):
    with mode():
        assert threads.num_threads() == 1
    assert threads.num_threads() == 3


def test_transforms_and_tracers_see_every_operation():
    seen = []

    def function(x):
        seen.append(threads.num_threads())
        return x * 2

    torch.func.vmap(function)(torch.ones(2))
    torch.jit.trace(function, torch.ones(2), check_trace=False)
    assert set(seen) == {1}
    assert threads.num_threads(torch.nn.Parameter(torch.ones(2))) == 1
    assert threads.num_threads(torch.empty(2, device="meta")) == 1


def test_the_profiler_sees_the_rows():
    """The operations of a call with the profiler are those of one thread."""
    case = problem(32, 8, 64, ignored=0.0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        case.loss(options=chunks(8)).backward()
    assert sum(event.name == "aten::exp2_" for event in profile.events()) >= 32


PROGRAM = """
import os, sys, torch
from chunked_ce import Teacher, linear_cross_entropy, logits_loss
from chunked_ce.objectives import Divergence
from chunked_ce.rows import sizes, threads
torch.set_num_threads(2)
threads._MOST, sizes._CACHED_ELEMENTS = 2, 64
hidden, head, target = torch.randn(40, 8), torch.randn(64, 8), torch.randint(64, (40,))
def loss():
    return linear_cross_entropy(hidden, head, target).item()
first = loss()
"""
FORKS = """
assert threads._pool is not None
child = os.fork()
if child == 0:
    torch.set_num_threads(2)
    work = []
    threads.share(range(10), lambda taken: work.extend(taken), 2)
    os._exit(0 if sorted(work) == list(range(10)) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
EXITS = """
import atexit
atexit.register(lambda: print(loss() == first))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_threads_of_its_own():
    subprocess.run([sys.executable, "-c", PROGRAM + FORKS], check=True, timeout=120)


def test_an_interpreter_that_exits():
    """It does not wait, and a loss that is computed at the very end takes one thread."""
    done = subprocess.run([sys.executable, "-c", PROGRAM + EXITS], check=True, timeout=120, capture_output=True)
    assert done.stdout.decode().split() == ["True"] and not done.stderr


# ---- rows ----


def rows_of(dtype, n, vocab, *, softcap=None, columns=False):
    """All that the row kernels compute of some logits, with gradients."""
    generator = torch.Generator().manual_seed(n)
    products = (4 * torch.randn(n, vocab, generator=generator)).to(dtype)
    target = torch.randint(vocab, (n,), generator=generator)
    weight = torch.rand(vocab, generator=generator)
    per_row = PerRow(torch.rand(n, generator=generator) + 0.5, None)
    work = torch.promote_types(dtype, torch.float32)
    some = torch.rand(n, generator=generator).to(work)
    slopes = RowStatistics(None, log_sum=some, target=-some, weighted=0.1 * some, mean=0.2 * some)
    logits, keywords = Logits(0.7, softcap), {"per_row": per_row}
    weight, per_row = weight.to(work), per_row._replace(temperature=per_row.temperature.to(work))
    part = torch_rows.shard_statistics(products, target, weight, logits, ROWS, 0, **keywords)
    rows = torch_rows.statistics(products, target, weight, logits, ROWS, overwrite=False, **keywords)
    out, fused, apart = torch.empty_like(products), products.clone(), torch.zeros(n, dtype=work)
    sums = ColumnSums(vocab, work, products.device) if columns else None
    torch_rows.logit_gradients(products, target, weight, logits, slopes, rows, out, sums, **keywords)
    names = ("weighted", "mean")
    again = torch_rows.statistics_and_gradients_(
        fused, target, weight, logits, ROWS, lambda _, at: slopes.at(at), names, apart=apart, **keywords
    )
    found = [part, *rows.named().values(), out, fused, apart, *again.named().values()]
    return found + ([sums.largest, sums.total] if columns else [])


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("n", "vocab"), [(1, 7), (3, 63), (37, 13), (50, 130), (9, 1)])
def test_bits_do_not_depend_on_the_number_of_threads(n, vocab, dtype, softcap):
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(rows_of(dtype, n, vocab, softcap=softcap))
    for one, two, three in zip(*found, strict=True):
        assert_equal(one, two)
        assert_equal(one, three)


def test_column_sums_of_threads():
    """Their bits depend on the number of threads alone, and those of the largest not even on that."""
    found = {}
    for count in (1, 2, 3, 3):
        torch.set_num_threads(count)
        *_, largest, total = rows_of(torch.float32, 50, 30, columns=True)
        for before, (first, second) in found.items():
            assert_equal(largest, first)
            torch.testing.assert_close(total, second, rtol=1e-6, atol=1e-6)
            assert before != count or torch.equal(total, second)
        found[count] = largest, total


@pytest.mark.parametrize(("reduction", "way"), REDUCTIONS_AND_WAYS)
def test_losses(reduction, way):
    """Several visits in every chunk, in all three threads, with some tokens ignored."""
    check_loss(problem(50, 8, 33, bias=True), reduction=reduction, options=chunks(20, way), label_smoothing=0.1)


def test_losses_in_several_threads_at_once():
    case = problem(64, 8, 50)

    def gradients():
        leaves = [case.hidden.detach().requires_grad_(), case.head.detach().requires_grad_()]
        return torch.autograd.grad(linear_cross_entropy(*leaves, case.target, options=chunks(32)), leaves)

    expected = gradients()
    with ThreadPoolExecutor(4) as pool:
        for found in [pool.submit(gradients) for _ in range(12)]:
            for one, other in zip(found.result(timeout=60), expected, strict=True):
                torch.testing.assert_close(one, other)


# ---- exponentials ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exponentials(dtype):
    """The relative error is at most that of rounding the exponent twice, and the product by log2 e once."""
    values = -torch.linspace(0, 80, 4001, dtype=dtype)
    error = (exp_(values.clone()).double() / values.double().exp() - 1).abs()
    if dtype == torch.float64:
        error = (exp_(values.clone()) / values.exp() - 1).abs()
    eps = torch.finfo(dtype).eps
    assert (error <= eps * (2 + values.double().abs())).all()
    assert error.max() > 0
    special = torch.tensor([0.0, -torch.inf, -1e30, torch.nan], dtype=dtype)
    assert_equal(exp_(special[:3].clone()), torch.tensor([1.0, 0.0, 0.0], dtype=dtype))
    assert exp_(special)[3].isnan()


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_very_wide_logits_leave_no_denormal(dtype, count):
    """Standard deviation 30: a third of the exponentials would be denormal or 0."""
    torch.set_num_threads(count)
    products = (30 * torch.randn(20, 500)).to(dtype)
    target = torch.randint(500, (20,))
    slopes = RowStatistics(None, log_sum=torch.full((20,), 1e-3), target=torch.full((20,), -1e-3))
    expected = (
        products.double().softmax(-1).mul(1e-3).scatter_add_(1, target[:, None], torch.full((20, 1), -1e-3).double())
    )
    torch_rows.statistics_and_gradients_(products, target, None, Logits(), names_of(()), lambda _, at: slopes.at(at))
    size = products.double().abs()
    assert not ((size > 0) & (size < torch.finfo(torch.float32).tiny)).any()
    assert (size == 0).double().mean() > 0.05
    torch.testing.assert_close(products.double(), expected, rtol=torch.finfo(dtype).eps * 100, atol=1e-37)


@pytest.mark.parametrize("beta", [0.05, 0.5, 0.95])
def test_mixtures_of_very_wide_logits(beta):
    """Where exponentials are the smallest normal numbers, products with a quotient count as 0 before they do."""
    logits = torch.randint(-184, -168, (2, 40, 200), generator=torch.Generator().manual_seed(0)) / 2
    logits[..., 0] = 0.0
    logits[0, ::2, 1] = logits[1, 1::2, 1] = 0.0  # one of the two sums is twice the other
    z, t = logits.bfloat16()
    z.requires_grad_()
    loss = logits_loss(Divergence(beta), z, torch.zeros(40, dtype=torch.long), teacher=Teacher(logits=t))
    expected = divergence(z.double(), t.double(), beta).mean()
    (found,), (slopes,) = (torch.autograd.grad(value, z) for value in (loss, expected))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(found, slopes, rtol=2**-7, atol=1e-5)
