"""How large chunks and blocks are, and that the dtype of their sums agrees with the plan."""

import math

import pytest
import torch

from chunked_ce import ChunkOptions, linear_cross_entropy, plan
from chunked_ce.plan import Plan, Settings, budget, predict_memory
from tests.cases import full_loss


@pytest.mark.parametrize("train_head", [True, False])
def test_bias_is_summed_in_fp32_over_chunks(monkeypatch, train_head):
    """Without a gradient of the head there is no sum of it whose memory one chunk of logits could take."""
    monkeypatch.setattr(plan, "_LEAST_BUDGET", 1024)
    hidden = torch.randn(512, 512).bfloat16()
    head = (torch.randn(64, 512) / 20).bfloat16().requires_grad_(train_head)
    bias = torch.zeros(64, dtype=torch.bfloat16, requires_grad=True)
    target = torch.zeros(512, dtype=torch.long)
    exact = bias.detach().double().requires_grad_()
    full_loss(hidden.double(), head.detach().double(), target, exact).backward()
    errors = []
    for loss in (
        linear_cross_entropy(hidden, head, target, linear_bias=bias),
        full_loss(hidden, head, target, bias),
    ):
        (gradient,) = torch.autograd.grad(loss, bias)
        errors.append((gradient.double() - exact.grad).norm())
    assert errors[0] <= 1.05 * errors[1]


GIB, BF16 = 2**30, torch.bfloat16
SHAPES = [(8192, 2304, 256000), (8192, 4096, 128256), (16384, 2048, 248320), (8192, 2048, 50257), (16385, 1024, 151936)]


def on_accelerator(**changes):
    return Settings(BF16, device_type="cuda", **changes)


@pytest.mark.parametrize(
    ("shape", "tokens", "alone", "entries"),
    [
        (SHAPES[0], 8192, 2048, 64000),
        (SHAPES[1], 8192, 4096, 64256),
        (SHAPES[2], 4096, 2048, 31232),
        (SHAPES[3], 8192, 8192, 50257),
        (SHAPES[4], 3328, 3328, 30464),
    ],
)
def test_chunks_on_an_accelerator(shape, tokens, alone, entries):
    """Tokens where a gradient of the head is a sum over chunks, and where none is; entries of a block."""
    n, d, v = shape
    assert Plan.by_tokens(n, n, v, d, on_accelerator(), head_dtype=BF16).tokens == tokens
    assert Plan.by_tokens(n, n, v, d, on_accelerator(), head_dtype=None).tokens == alone
    assert Plan.by_vocabulary(n, v, on_accelerator(), BF16).entries == entries


@pytest.mark.parametrize("in_flight", [1, 2])
@pytest.mark.parametrize("head_dtype", [None, BF16, torch.float32], ids=str)
@pytest.mark.parametrize("memory_budget", [None, 3 * 10**8, 10**6])
def test_rules_on_an_accelerator(memory_budget, head_dtype, in_flight):
    settings = on_accelerator(memory_budget=memory_budget)
    for n, d, v in [*SHAPES, (1, 8, 100), (5000, 64, 999_999), (70_000, 4096, 32000), (300, 4096, 2**20)]:
        most = budget(v, d, memory_budget, sums_head=head_dtype is not None, device_type="cuda").size
        if memory_budget is None:
            assert most == (GIB if head_dtype is None else max(GIB, 4 * v * d))
        parts = Plan.by_tokens(n, n, v, d, settings, head_dtype=head_dtype, in_flight=in_flight)
        narrow = head_dtype == BF16
        if memory_budget is None and narrow and n <= 4 * d:
            assert parts.tokens == n and parts.head_sum == BF16
        if parts.tokens >= n:
            continue
        fitting = max(1, most // (2 * v * in_flight))
        assert parts.tokens <= fitting
        assert parts.tokens % 256 == 0 or fitting < 256
        if memory_budget is None and narrow and in_flight == 1 and d >= 2048:
            assert parts.tokens >= min(4096, n / 2)
        # As few chunks as fit, and all but the last of one size.
        unit = 256 if fitting >= 256 else 1
        assert math.ceil(n / parts.tokens) <= math.ceil(n / (fitting - fitting % unit))


@pytest.mark.parametrize("memory_budget", [None, 3 * 10**8, 10**6])
def test_blocks_on_an_accelerator(memory_budget):
    for n, _, v in [*SHAPES, (0, 8, 100), (70_000, 4096, 32000), (2**20, 4096, 2**20)]:
        blocks = Plan.by_vocabulary(n, v, on_accelerator(memory_budget=memory_budget), BF16)
        most = (memory_budget or GIB) // max(1, 2 * n)
        assert blocks.entries <= max(1, most)
        if blocks.entries < v:
            assert blocks.entries % (256 if most >= 256 else 16 if most >= 16 else 1) == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_the_law_follows_the_plan_of_the_device(shape):
    n, d, v = shape
    tokens = Plan.by_tokens(n, n, v, d, on_accelerator(), head_dtype=BF16).tokens
    entries = Plan.by_vocabulary(n, v, on_accelerator(), BF16).entries
    forward = predict_memory(n, v, d, dtype=BF16, device_type="cuda")
    backward = predict_memory(n, v, d, dtype=BF16, device_type="cuda", options=ChunkOptions(gradients="backward"))
    assert forward.forward["logits"] == 2 * tokens * v
    assert backward.forward["logits"] == backward.backward["logits"] == 2 * n * entries


def test_a_budget_is_halved_only_where_memory_is_short():
    n, d, v = SHAPES[2]

    def law(size, **options):
        return predict_memory(
            n, v, d, dtype=BF16, device_type="cuda", options=ChunkOptions(memory_budget=size, **options)
        )

    logits = 2 * 4096 * v
    assert plan.budget_within(law(None).peak, law) is None
    assert plan.budget_within(law(None).peak - 1, law) == logits // 2
    assert plan.budget_within(law(None).peak - logits, law) == logits // 16
    assert plan.budget_within(0, law) == logits // 16  # at least the least budget of a CPU


def test_the_device_leaves_a_cpu_alone():
    assert plan.tokens_per_chunk(8192, 256000, 2304, Settings(BF16)) == 131


@pytest.mark.parametrize(("tokens", "entries"), [(10, 131072), (2048, 8192), (4096, 4096), (16384, 1024)])
def test_blocks_on_a_cpu(tokens, entries):
    """Those of 32 MiB of logits; a budget that was asked for is used."""
    assert Plan.by_vocabulary(tokens, 131072, Settings(BF16), BF16).entries == entries
    asked = Plan.by_vocabulary(tokens, 131072, Settings(BF16, memory_budget=2 * tokens * 2048), BF16)
    assert asked.entries == 2048


def test_a_filter_on_an_accelerator_keeps_no_sum_of_the_head():
    """It keeps the kept rows of all chunks, as long as they are few."""
    pytest.importorskip("triton")
    options = ChunkOptions(gradient_filter="auto")
    n, d, v = 16384, 2048, 248320

    def law(tokens, **options_):
        return predict_memory(tokens, v, d, dtype=torch.bfloat16, device_type="cuda", options=options, **options_)

    chunks = 4
    for share in (0.05, 0.08):
        found = law(n, kept_share=share)
        assert found.forward["head_sum"] == found.backward["head_sum"]
        assert found.backward["head_sum"] == pytest.approx(chunks * share * v * d * 4, rel=1e-4)
        assert found.backward["head_grad"] == v * d * 2
    assert law(n, kept_share=0.3).backward["head_sum"] == (v // 2 + v) * d * 4
    assert law(n, train_head=False).backward["head_sum"] == 0
    way = ChunkOptions(gradient_filter="auto", gradients="backward")
    of_backward = predict_memory(n, v, d, dtype=torch.bfloat16, device_type="cuda", options=way, kept_share=0.05)
    assert of_backward.backward["head_sum"] == pytest.approx(chunks * 0.05 * v * d * 4, rel=1e-4)
    exact = predict_memory(n, v, d, dtype=torch.bfloat16, device_type="cuda")
    assert law(n).peak < exact.peak
