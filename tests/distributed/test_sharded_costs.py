"""The bytes that a sharded head and a gathered one send, as `chunked_ce.sharded.costs` has them, on up to 64 ranks."""

import pytest
import torch
import torch.distributed as dist

from benchmarks.sharded_head import GATHERED, SHARDED, Sizes, measure_time
from chunked_ce import ChunkOptions, VocabShard, linear_cross_entropy
from chunked_ce.cli.counted_collectives import counted, sent_bytes
from chunked_ce.parallel.collectives import all_gather_single, reduce_scatter_single
from chunked_ce.sharded.costs import bytes_sent_gathered, bytes_sent_sharded, most_tokens
from tests.distributed.launch import run
from tests.distributed.threads import run_threads

HIDDEN, VOCAB = 8, 640
MANY = 64
FEW = 3 * 48  # bytes: the comparison of calls, numbers of tokens, upstream gradients


def assert_nearly(sent: int, law: int, ranks: int) -> None:
    """Besides what the law has, each rank sends five numbers in the forward and in the backward."""
    assert law < sent <= law + (ranks - 1) * FEW


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def sharded(rank: int, world_size: int, collectives, tokens: int, dtype: torch.dtype) -> int:
    """Bytes that this rank sends in one step."""
    vocab = VocabShard.split(VOCAB, tokens="own")
    hidden = torch.randn(tokens, HIDDEN).to(dtype).requires_grad_()
    head = torch.randn(vocab.rows, HIDDEN).to(dtype).requires_grad_()
    target, options = torch.randint(VOCAB, (tokens,)), ChunkOptions(chunk_size=2 * world_size)
    before = len(collectives())
    linear_cross_entropy(hidden, head, target, vocab=vocab, options=options).backward()
    return sent_bytes(collectives()[before:], world_size)


def gathered(rank: int, world_size: int, collectives, dtype: torch.dtype) -> int:
    """Bytes that this rank sends to gather a head and to reduce-scatter its gradient."""
    mine = torch.randn(VOCAB // world_size, HIDDEN).to(dtype)
    whole = mine.new_empty(VOCAB, HIDDEN)
    before = len(collectives())
    all_gather_single(whole, mine, group=dist.group.WORLD)
    reduce_scatter_single(torch.empty_like(mine), whole, group=dist.group.WORLD)
    return sent_bytes(collectives()[before:], world_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_64_ranks(dtype):
    with counted() as collectives:
        for sent in run_threads(sharded, MANY, collectives, 4, dtype):
            assert_nearly(sent, bytes_sent_sharded(4, HIDDEN, MANY, itemsize=dtype.itemsize), MANY)
        found = run_threads(gathered, MANY, collectives, dtype)
        assert found == [bytes_sent_gathered(VOCAB, HIDDEN, MANY, itemsize=dtype.itemsize)] * MANY


@pytest.mark.parametrize("ranks", [2, 8])
def test_where_a_sharded_head_starts_to_send_more(ranks):
    most = most_tokens(VOCAB, HIDDEN, ranks, itemsize=4)
    with counted() as collectives:
        (whole,) = set(run_threads(gathered, ranks, collectives, torch.float32))
        (less,) = set(run_threads(sharded, ranks, collectives, most, torch.float32))
        (more,) = set(run_threads(sharded, ranks, collectives, most + 1, torch.float32))
    few = (ranks - 1) * FEW
    assert less - few <= whole < more


def test_bytes_that_fsdp_sends():
    sizes = Sizes(64, 32, 512, "fp32")
    for _, sent in run(measure_time, 2, sizes, [SHARDED, GATHERED], 0):
        assert_nearly(sent[SHARDED], bytes_sent_sharded(64, 32, 2, itemsize=4), 2)
        assert sent[GATHERED] == bytes_sent_gathered(512, 32, 2, itemsize=4, gathers=1)
