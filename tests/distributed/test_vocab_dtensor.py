"""A head that is a DTensor, sharded on dim 0 along one dimension of its mesh."""

import pytest

from tests.distributed.launch import run
from tests.distributed.vocab_dtensors import PLACEMENTS, SIZES, WRONG, run_all

OTHERS = ["with a VocabShard", "logprobs", "in another world"]


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    return run(run_all, 4, str(tmp_path_factory.mktemp("world")))


@pytest.mark.parametrize("case", [*(f"{name}, {size}" for name in PLACEMENTS for size in SIZES), *OTHERS])
def test_equals_the_reference_with_gradients_of_its_kind(failures, case):
    assert [of_rank[case] for of_rank in failures] == [None] * 4


@pytest.mark.parametrize("case", WRONG)
def test_placement_that_cannot_work(failures, case):
    placements = WRONG[case][1]
    for of_rank in failures:
        assert of_rank[case].type == "ValueError"
        assert "linear_weight must be sharded on dim 0 along one dimension of its mesh" in of_rank[case].message
        assert f"had placements {placements}" in of_rank[case].message
