"""`chunked-ce plan`'s prediction beside what processes take, one rank and two: within a tenth."""

import pytest
import torch

from chunked_ce import ChunkOptions, VocabShard, linear_cross_entropy
from chunked_ce.cli import memory
from chunked_ce.plan import predict_memory
from tests.distributed.launch import run

NOT_HERE = memory.why_not_measured("cpu")
N, D, V = 1024, 128, 32768
DTYPES = (torch.float32, torch.bfloat16)
WAYS = ("forward", "backward")
CASES = [(dtype, {"gradients": way}) for dtype in DTYPES for way in WAYS]
CASES += [(torch.bfloat16, {"gradients": way, "logits_dtype": torch.float32}) for way in WAYS]


def step(shape, dtype, options):
    n, d, total = shape
    vocab = VocabShard.split(total)
    hidden = torch.randn(n, d).to(dtype).requires_grad_()
    head = torch.randn(vocab.stop - vocab.start, d).to(dtype).requires_grad_()
    target = torch.randint(total, (n,), generator=torch.Generator().manual_seed(0))
    return lambda: linear_cross_entropy(hidden, head, target, vocab=vocab, options=options).backward()


def peaks(rank, world_size):
    """Bytes for each case, one after the other in one process."""
    torch.manual_seed(0)
    found = []
    for dtype, options in CASES:
        step((64, 64, 8200), dtype, ChunkOptions(**options))()
        found.append(memory.peak_of(step((N, D, V), dtype, ChunkOptions(**options)), "cpu"))
    return found


@pytest.mark.skipif(NOT_HERE is not None, reason=NOT_HERE or "")
def test_a_shard_takes_what_the_law_says():
    for (dtype, options), *ranks in zip(CASES, *run(peaks, 2), strict=True):
        law = predict_memory(N, V, D, dtype=dtype, options=ChunkOptions(**options), ranks=2)
        assert max(ranks) == pytest.approx(law.peak, rel=0.1), f"{dtype}, {options}"
