"""Copies and pickles of a shard, and of what holds one: the group is the process's own."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from chunked_ce import LinearCrossEntropyLoss, LMHead, VocabShard
from tests.distributed.launch import run

FIELDS = ("start", "stop", "total", "input_grad", "reduce_dtype", "check", "padded_rows", "tokens")


@pytest.fixture
def world(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        yield dist.group.WORLD
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def new_shard() -> VocabShard:
    return VocabShard(None, 0, 5, 5, "partial", torch.bfloat16, "first", padded_rows=6)


def saved_and_loaded(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def pickled(value):
    return pickle.loads(pickle.dumps(value))


COPIES = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": pickled, "torch.save": saved_and_loaded}


@pytest.mark.parametrize("how", COPIES)
def test_of_a_shard(world, how):
    for shard in (new_shard(), VocabShard(None, 0, 5, 5, tokens="own")):
        found = COPIES[how](shard)
        assert found.group is world
        assert [getattr(found, name) for name in FIELDS] == [getattr(shard, name) for name in FIELDS]


@pytest.mark.parametrize("how", [how for how in COPIES if how != "copy"])
def test_of_a_head_and_of_a_loss(world, how):
    head = LMHead(4, 5, vocab=VocabShard.split(5))
    hidden, target = torch.randn(3, 4), torch.tensor([0, 4, 2])
    expected = F.cross_entropy(F.linear(hidden, head.weight), target)
    for module in (head, torch.nn.ModuleDict({"head": head})["head"]):
        found = COPIES[how](module)
        assert found.weight is not head.weight and found.vocab.group is world
        torch.testing.assert_close(F.cross_entropy(found(hidden), target), expected)
    loss = COPIES[how](LinearCrossEntropyLoss(vocab=head.vocab))
    torch.testing.assert_close(loss(hidden, head.weight, target), expected)


def test_an_average_of_a_model(world):
    model = torch.nn.Sequential(LMHead(4, 5, vocab=VocabShard.split(5)))
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    assert torch.equal(average.module[0].weight, model[0].weight)
    assert average.module[0].vocab.group is world


def test_without_a_process_group(world):
    data = pickle.dumps(new_shard())
    dist.destroy_process_group()
    with pytest.raises(ValueError, match=r"group must be of torch\.distributed, which is not initialised"):
        pickle.loads(data)


def on_three_ranks(rank: int, world_size: int) -> dict:
    last = dist.new_group([1, 2])
    twin = dist.new_group([1, 2])
    everyone = [None] * world_size
    mine = pickle.dumps(VocabShard.split(7, twin if rank else None))
    dist.all_gather_object(everyone, mine)
    found = pickle.loads(everyone[rank])
    try:
        refusal = pickle.loads(everyone[1])
    except ValueError as error:
        refusal = str(error)
    return {
        "same": found.group is (twin if rank else dist.group.WORLD) and (rank == 0 or twin is not last),
        "bounds": (found.start, found.stop, found.total),
        "of rank 1": refusal if isinstance(refusal, str) else refusal.group is twin,
    }


def test_groups_of_several_ranks():
    found = run(on_three_ranks, 3)
    assert [of_rank["same"] for of_rank in found] == [True] * 3
    assert [of_rank["bounds"] for of_rank in found] == [(0, 3, 7), (0, 4, 7), (4, 7, 7)]
    assert found[0]["of rank 1"] == (
        "group: a VocabShard that was pickled needs the process group of ranks [1, 2], and this process, rank 0 of 3, "
        "is in no such group: make it first, as torch.distributed.new_group([1, 2])"
    )
    assert [of_rank["of rank 1"] for of_rank in found[1:]] == [True] * 2
