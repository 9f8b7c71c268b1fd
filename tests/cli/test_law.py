"""`chunked-ce plan`'s prediction beside what processes take, one rank and two: within a tenth."""

import itertools
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from chunked_ce import (
    ChunkOptions,
    Teacher,
    VocabShard,
    linear_cross_entropy,
    linear_divergence,
    linear_loss,
)
from chunked_ce.cli import memory
from chunked_ce.objectives import TopKDivergence
from chunked_ce.plan import predict_memory
from chunked_ce.sharded.costs import predict_sharded_memory
from tests.cases import HAS_BF16, needs_bf16
from tests.distributed.launch import SERVER, run

NOT_HERE = memory.why_not_measured("cpu")
ALLOCATOR = 4 * 2**20  # bytes that the C allocator holds besides, now and then
N, D, V = 1024, 128, 32768
DTYPES = (torch.float32, torch.bfloat16) if HAS_BF16 else (torch.float32,)
WAYS = ("forward", "backward")
CASES = [(dtype, {"gradients": way}) for dtype in DTYPES for way in WAYS]
OWN_CASES = list(CASES)
CASES += [(torch.bfloat16, {"gradients": way, "logits_dtype": torch.float32}) for way in WAYS if HAS_BF16]


def step(shape, dtype, options, tokens="same"):
    n, d, total = shape
    vocab = VocabShard.split(total, tokens=tokens)
    hidden = torch.randn(n, d).to(dtype).requires_grad_()
    head = torch.randn(vocab.stop - vocab.start, d).to(dtype).requires_grad_()
    target = torch.randint(total, (n,), generator=torch.Generator().manual_seed(0))
    return lambda: linear_cross_entropy(hidden, head, target, vocab=vocab, options=options).backward()


def peaks(rank, world_size):
    """Bytes for each case, one after the other in one process."""
    torch.manual_seed(0)
    found = []
    for (dtype, options), tokens in [*itertools.product(CASES, ["same"]), *itertools.product(OWN_CASES, ["own"])]:
        step((64, 64, 8200), dtype, ChunkOptions(**options), tokens)()
        n = N if tokens == "same" else N // world_size
        found.append(memory.peak_of(step((n, D, V), dtype, ChunkOptions(**options), tokens), "cpu"))
    return found


@pytest.mark.skipif(NOT_HERE is not None, reason=NOT_HERE or "")
def test_a_shard_takes_what_the_law_says():
    laws = [predict_memory(N, V, D, dtype=dtype, options=ChunkOptions(**options), ranks=2) for dtype, options in CASES]
    laws += [
        predict_sharded_memory(N // 2, V, D, dtype=dtype, options=ChunkOptions(**options), ranks=2)
        for dtype, options in OWN_CASES
    ]
    for case, law, *ranks in zip(CASES + OWN_CASES, laws, *run(peaks, 2), strict=True):
        assert max(ranks) == pytest.approx(law.peak, rel=0.1, abs=ALLOCATOR), case


# ---- losses besides cross-entropy, on one rank ----

OTHERS = {
    "divergence": {"teacher_hidden_size": 64},
    "mixture": {"teacher_hidden_size": 64},
    "top-k": {"num_ids": 64},
    "adapter": {"adapter_rank": 16},
    "frozen": {"adapter_rank": 16, "train_head": False},
}


def other_step(name, shape, dtype, options):
    n, d, vocab = shape
    hidden, head, teacher, adapter = ((torch.randn(n, size), torch.randn(vocab, size)) for size in (d, d, 64, 16))
    hidden, head = (x.to(dtype).requires_grad_(name != "frozen" or x is hidden[0]) for x in (hidden[0], head[1]))
    target = torch.randint(vocab, (n,))
    keywords = {"options": options}
    if name in ("divergence", "mixture"):
        teacher = Teacher(*(x.to(dtype) for x in teacher))
        keywords |= {"beta": 0.0 if name == "divergence" else 0.5}
        return lambda: linear_divergence(hidden, head, teacher, **keywords).backward()
    if name == "top-k":
        tensors = {"teacher_ids": torch.randint(vocab, (n, 64)), "teacher_logprobs": torch.full((n, 64), -5.0)}
        return lambda: linear_loss(TopKDivergence(), hidden, head, target, **tensors, **keywords).backward()
    adapter = tuple(x.to(dtype).requires_grad_() for x in adapter)
    return lambda: linear_cross_entropy(hidden, head, target, linear_adapter=adapter, **keywords).backward()


def other_peak(name, dtype, way):
    torch.set_num_threads(1)
    options = ChunkOptions(gradients=way)
    other_step(name, (64, 64, 8200), dtype, options)()
    return memory.peak_of(other_step(name, (N, D, 2 * V), dtype, options), "cpu")


@pytest.mark.skipif(NOT_HERE is not None, reason=NOT_HERE or "")
@pytest.mark.parametrize(
    ("name", "dtype", "way"),
    [
        ("divergence", torch.float32, "forward"),
        pytest.param("divergence", torch.bfloat16, "backward", marks=[needs_bf16, pytest.mark.thorough]),
        ("mixture", torch.float32, "forward"),
        pytest.param("top-k", torch.bfloat16, "forward", marks=needs_bf16),
        pytest.param("adapter", torch.float32, "backward", marks=pytest.mark.thorough),
        pytest.param("frozen", torch.bfloat16, "forward", marks=[needs_bf16, pytest.mark.thorough]),
    ],
)
def test_other_losses_take_what_the_law_says(name, dtype, way):
    """Each in a process of its own: in a used one, memory that was freed before hides some of it."""
    with ProcessPoolExecutor(1, mp_context=SERVER) as pool:
        peak = pool.submit(other_peak, name, dtype, way).result()
    law = predict_memory(N, 2 * V, D, dtype=dtype, options=ChunkOptions(gradients=way), **OTHERS[name])
    assert peak == pytest.approx(law.peak, rel=0.1)
