"""A shard whose calls are compared once: later calls read nothing for it, and still refuse bad input."""

import pytest
import torch
import torch.distributed as dist

from chunked_ce import VocabShard, invocation, linear_cross_entropy


@pytest.fixture
def vocab(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        yield VocabShard(dist.group.WORLD, 0, 5, 5, check="first")
    finally:
        dist.destroy_process_group()


def test_later_calls(vocab, monkeypatch):
    tensors = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 4, -100, 2])
    first = linear_cross_entropy(*tensors, vocab=vocab)

    def reads(*arguments):
        raise AssertionError("compared again")

    monkeypatch.setattr(invocation, "facts_of_call", reads)
    assert linear_cross_entropy(*tensors, vocab=vocab) == first
    with pytest.raises(ValueError, match="label_smoothing"):
        linear_cross_entropy(*tensors, vocab=vocab, label_smoothing=2.0)
    with pytest.raises(ValueError, match="target must have the shape"):
        linear_cross_entropy(tensors[0], tensors[1], tensors[2][:2], vocab=vocab)
