"""What a call costs: products, memory and host reads, as torch's profiler sees them, in operators too."""

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from tests.cases import REDUCTIONS_AND_WAYS, WAYS, chunks, full_loss, problem

PRODUCTS = {
    "aten::mm": (0, 1),
    "aten::addmm": (1, 2),
    "aten::addmm_": (1, 2),
    "aten::bmm": (0, 1),
    "aten::baddbmm": (1, 2),
}
HOST_READS = {"aten::_local_scalar_dense", "aten::equal"}


@dataclass(frozen=True)
class Work:
    multiplications: int  # of all matrix products
    largest: int  # bytes of the largest allocation
    peak: int  # bytes alive at once, above what was there before
    host_reads: int  # tensor contents that Python looked at


def work(step):
    """The cost of one `step()`. An allocation counts until it is freed, results to the end."""
    step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True, profile_memory=True) as profile:
        kept = step()
    del kept
    multiplications = host_reads = 0
    raw = profile.profiler.kineto_results.events()  # `profile.events()` builds a tree of them, which takes far longer
    for event in raw:
        host_reads += event.name() in HOST_READS
        if event.name() in PRODUCTS:
            shapes = event.shapes()
            left, right = (shapes[i] for i in PRODUCTS[event.name()])
            multiplications += math.prod(left) * right[-1]
    sizes = [e.nbytes() for e in sorted(raw, key=lambda e: e.start_ns()) if e.name() == "[memory]"]
    alive = peak = 0
    for size in sizes:
        alive += size
        peak = max(peak, alive)
    return Work(multiplications, max(sizes, default=0), peak, host_reads)


def train(case, **options):
    """A step that returns all it made: loss and gradients."""

    def step():
        value = case.loss(**options)
        return value, torch.autograd.grad(value, case.leaves(), torch.ones_like(value)) if case.leaves() else None

    return step


def freeze(case, names):
    for name in names:
        getattr(case, name).requires_grad_(False)
    return case


N, D, V, C = 64, 32, 1024, 16
PRODUCT = N * D * V  # multiplications of one of the three products


def test_the_counter_sees_the_plain_loss():
    """Three products, and logits that exist as a whole: what every bound below is compared with."""
    case = problem(N, D, V, ignored=0.0)
    cost = work(lambda: torch.autograd.grad(full_loss(case.hidden, case.head, case.target), case.leaves()))
    assert cost.multiplications == 3 * PRODUCT
    assert cost.largest >= N * V * 4
    assert cost.peak >= 2 * N * V * 4
    assert work(lambda: F.linear(case.hidden, case.head).sum().item()).host_reads == 1


# --- products: 6 N V D in the forward way, 8 N V D in the backward way, in units of 2 N V D ---


@pytest.mark.parametrize(("reduction", "way"), REDUCTIONS_AND_WAYS)
@pytest.mark.parametrize(
    ("frozen", "forward", "backward"),
    [
        ((), 3, 4),
        (("hidden",), 2, 3),
        (("head",), 2, 3),
        (("hidden", "head"), 1, 1),
    ],
    ids=["trained", "frozen_input", "frozen_head", "frozen"],
)
def test_products(frozen, forward, backward, reduction, way):
    """peers 3: a frozen head or input drops its product (Liger's losses pay for dW with a frozen head)."""
    case = freeze(problem(N, D, V, ignored=0.0), frozen)
    cost = work(train(case, reduction=reduction, options=chunks(C, way)))
    assert cost.multiplications == (forward if way == "forward" else backward) * PRODUCT


@pytest.mark.parametrize("way", WAYS)
def test_products_of_a_trained_bias_alone(way):
    """The bias needs the gradient of the logits, no product with it."""
    case = freeze(problem(N, D, V, ignored=0.0, bias=True), ("hidden", "head"))
    cost = work(train(case, options=chunks(C, way)))
    assert cost.multiplications <= (1 if way == "forward" else 2) * PRODUCT


@pytest.mark.parametrize("way", WAYS)
def test_products_without_gradient(way):
    """`torch.no_grad()` computes the logits and nothing else, and allocates no gradient."""
    case = problem(N, D, 16 * V, ignored=0.0)
    with torch.no_grad():
        cost = work(lambda: case.loss(options=chunks(4, way)))
    assert cost.multiplications == 16 * PRODUCT
    assert cost.largest < D * 16 * V * 4


@pytest.mark.parametrize(("reduction", "way"), REDUCTIONS_AND_WAYS)
def test_ignored_tokens_cost_nothing(reduction, way):
    """Half of the tokens ignored: half of the products; all of them: none."""
    case = problem(N, D, V, ignored=0.0)
    whole = work(train(case, reduction=reduction, options=chunks(C, way)))
    case.target[torch.randperm(N)[: N // 2]] = -100
    half = work(train(case, reduction=reduction, options=chunks(C, way)))
    assert half.multiplications == whole.multiplications / 2
    case.target[:] = -100
    assert work(train(case, reduction=reduction, options=chunks(C, way))).multiplications == 0


def test_products_of_log_probabilities():
    case = problem(N, D, V, ignored=0.0)
    with torch.no_grad():
        assert work(lambda: case.logprobs(options=chunks(C))).multiplications == PRODUCT
    step = lambda: torch.autograd.grad(case.logprobs(options=chunks(C)).sum(), case.leaves())  # noqa: E731
    assert work(step).multiplications <= 4 * PRODUCT


@pytest.mark.parametrize("way", WAYS)
def test_stats_cost_no_product(way):
    case = problem(N, D, V, ignored=0.0)
    expected = work(train(case, options=chunks(C, way))).multiplications

    def step():
        value, stats = case.loss(return_stats=True, options=chunks(C, way))
        return stats, torch.autograd.grad(value, case.leaves())

    assert work(step).multiplications == expected


# --- memory ---


@pytest.mark.parametrize(("reduction", "way"), REDUCTIONS_AND_WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_logits_never_exist(dtype, reduction, way):
    """peers 14: neither at once nor in pieces that ordinary autograd keeps until the backward."""
    n, d, vocab = 512, 16, 8192
    case = problem(n, d, vocab, dtype=dtype)
    cost = work(train(case, reduction=reduction, options=chunks(16, way)))
    gradients = 3 * (n + vocab) * d * 4  # dX and dW, an fp32 sum and a share of a product beside them
    assert cost.largest < n * vocab / 2
    assert cost.peak < n * vocab / 2 + gradients


@pytest.mark.parametrize(("reduction", "way"), REDUCTIONS_AND_WAYS)
def test_memory_hardly_grows_with_tokens(reduction, way):
    """peers 14: eight times the tokens take less than one more chunk of logits, and their gradients."""
    few, many, d, vocab, size = 128, 1024, 8, 8192, 32
    costs = [
        work(train(problem(n, d, vocab), reduction=reduction, options=chunks(size, way))).peak for n in (few, many)
    ]
    per_token = 4 * d * 4 + 256  # input rows kept and their gradients, statistics
    assert costs[1] - costs[0] < size * vocab * 4 + (many - few) * per_token


def test_memory_of_log_probabilities():
    n, d, vocab = 512, 16, 8192
    case = problem(n, d, vocab)

    def step():
        values = case.logprobs(return_entropy=True, options=chunks(16))
        return values, torch.autograd.grad(sum(v.sum() for v in values), case.leaves())

    assert work(step).peak < n * vocab / 2 + 3 * (n + vocab) * d * 4


def test_memory_budget_bounds_the_automatic_choice():
    n, d, vocab = 512, 16, 8192
    case = problem(n, d, vocab)
    for way in WAYS:
        small = work(train(case, options=chunks("auto", way, memory_budget=1 << 20)))
        assert small.largest <= max(1 << 20, vocab * d * 4)
        assert small.peak < 4 * n * vocab / 2


@pytest.mark.parametrize(("reduction", "way"), REDUCTIONS_AND_WAYS)
def test_frozen_head_allocates_no_head_gradient(reduction, way):
    """peers 3: with a frozen head nothing of the head's size is made."""
    n, d, vocab = 64, 128, 8192
    case = freeze(problem(n, d, vocab), ["head"])
    cost = work(train(case, reduction=reduction, options=chunks(16, way)))
    assert cost.peak < d * vocab * 4 / 2 + 16 * vocab * 4


def test_stats_that_nobody_asked_for_cost_nothing():
    """Operations, not only products: a call without stats runs fewer of them."""
    case = problem(N, D, V)

    def operations(**options):
        with (
            torch.no_grad(),
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
        ):
            case.loss(options=chunks(C), **options)
        return len(profile.events())

    operations()
    assert operations() < operations(return_stats=True)


# --- host reads ---


@pytest.mark.parametrize(("reduction", "way"), REDUCTIONS_AND_WAYS)
def test_host_reads_do_not_grow_with_chunks(reduction, way):
    """peers 13: the CPU may look at the targets, to check and count them; chunks look at nothing."""
    case = problem(N, D, V)
    few, many = (
        work(train(case, reduction=reduction, options=chunks(size, way), label_smoothing=0.1)).host_reads
        for size in (N, 2)
    )
    assert few == many <= 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(("reduction", "way"), REDUCTIONS_AND_WAYS)
def test_no_synchronisation_on_a_gpu(reduction, way):
    """peers 13: no `.item()` and no comparison that the host waits for (Liger 2 to 3, DeepSpeed 1)."""
    on_cpu = problem(N, D, V)
    case = on_cpu.fresh(
        hidden=on_cpu.hidden.detach().cuda().requires_grad_(),
        head=on_cpu.head.detach().cuda().requires_grad_(),
        target=on_cpu.target.cuda(),
    )
    step = train(case, reduction=reduction, options=chunks(C, way), label_smoothing=0.1)
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
