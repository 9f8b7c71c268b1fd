"""A head sharded over tensor-parallel ranks in DeepSpeed, with data-parallel ranks: the step of one process."""

import importlib.util

import pytest
import torch

from tests.distributed.launch import run
from tests.distributed.token_training import one_process, step_error, whole_batch
from tests.integrations.vocab_engine import CASES, DATA, STEPS, TENSOR, run_all

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
HEAD = "head.weight"


@pytest.fixture(scope="module")
def results():
    return run(run_all, DATA * TENSOR)


def result_of(results, case) -> list:
    for of_rank in results:
        assert not isinstance(of_rank[case], str), of_rank[case]
    return [of_rank[case] for of_rank in results]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_step_equals_that_of_one_process(results, case):
    exact, exact_loss = one_process(whole_batch("uneven", STEPS), torch.float64, start=torch.float32)
    found = result_of(results, case)
    assert [loss for _, loss, _ in found] == pytest.approx([exact_loss] * len(found), rel=1e-6)
    for data_rank in range(DATA):
        states = [state for state, _, _ in found[data_rank * TENSOR : data_rank * TENSOR + TENSOR]]
        for state in states:
            whole = state | {HEAD: torch.cat([part[HEAD] for part in states])}
            assert step_error(whole, exact, torch.float32) <= 1e-6


@pytest.mark.parametrize("case", [case for case in CASES if case.stage == 3], ids=str)
def test_head_is_gathered_once_per_loss(results, case):
    """However many chunks there are: 14 at most here, and one at least."""
    for _, _, gathers in result_of(results, case):
        assert gathers == [1] * STEPS


def test_layer_without_a_group(results):
    for of_rank in results:
        assert "ValueError: layer must be sharded over a group, but its mp_group is None" in of_rank["not sharded"]
