"""Bad input with a sharded vocabulary: an error on every rank that says who has what, never a hang."""

import pytest
import torch

from chunked_ce import VocabShard, cross_entropy, linear_cross_entropy, linear_logprobs
from tests.distributed import vocab_errors
from tests.distributed.launch import run
from tests.distributed.vocab_errors import (
    BOUNDS,
    DISAGREEMENTS,
    ODD_ONE,
    OUT_OF_RANGE,
    RANKS,
    SHARD_ARGUMENTS,
    WRONG_ALONE,
    Failure,
)


@pytest.fixture(scope="module")
def failures():
    return run(vocab_errors.run_all, RANKS)


def failures_of(failures, name) -> list[Failure]:
    found = [of_rank[name] for of_rank in failures]
    assert None not in found, found
    return found


@pytest.mark.parametrize("message", DISAGREEMENTS)
def test_ranks_that_disagree(failures, message):
    for found in failures_of(failures, message):
        assert found.type == "ValueError"
        assert found.message.startswith(f"ranks of the vocabulary group disagree on {message}")
        assert "rank 0 has" in found.message and "rank 1 has" in found.message


@pytest.mark.parametrize("message", BOUNDS)
def test_shards_that_do_not_fit_together(failures, message):
    for found in failures_of(failures, message):
        assert found == Failure("ValueError", message)


@pytest.mark.parametrize("message", WRONG_ALONE)
def test_one_rank_with_wrong_arguments(failures, message):
    for rank, found in enumerate(failures_of(failures, message)):
        if rank == ODD_ONE:
            assert found.message.startswith(message)
        else:
            assert found.type == "ValueError"
            assert f"rank {ODD_ONE} of the group could not take part: {message}" in found.message


@pytest.mark.parametrize("case", OUT_OF_RANGE, ids=str)
def test_target_out_of_range(failures, case):
    for found in failures_of(failures, case):
        assert found.type == "IndexError"
        assert f"target at position 2 (of the flattened tokens) is {case[2]}, allowed are [0, 9)" in found.message


@pytest.mark.parametrize("message", SHARD_ARGUMENTS)
def test_arguments_of_a_shard(failures, message):
    for found in failures_of(failures, message):
        assert found.type in ("ValueError", "TypeError")
        assert message in found.message


def test_ranks_are_in_step_after_errors(failures):
    assert [of_rank["afterwards"] for of_rank in failures] == [None] * RANKS


@pytest.mark.parametrize("make", [lambda: VocabShard(None, 0, 1, 1), lambda: VocabShard.split(9)])
def test_no_process_group(make):
    with pytest.raises(ValueError, match=r"group must be of torch\.distributed, which is not initialised"):
        make()


@pytest.mark.parametrize("function", [linear_cross_entropy, linear_logprobs, cross_entropy])
def test_vocab_of_another_type(function):
    tensors = (torch.randn(3, 4), torch.randn(5, 4), torch.tensor([1, 2, 3]))
    with pytest.raises(TypeError, match="vocab must be a VocabShard or None, was tuple"):
        function(*(tensors if function is not cross_entropy else tensors[::2]), vocab=(0, 5, 5))
