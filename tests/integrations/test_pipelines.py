"""Pipelines of torch and DeepSpeed, the head whole on the last stage or spread over all: the step of one process."""

import importlib.util

import pytest
import torch

from tests.distributed.launch import run
from tests.integrations.pipelines import DEEPSPEED, RANKS, TORCH, deepspeed_cases, one_process, torch_cases

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")


@pytest.fixture(scope="module")
def results():
    return [torch | deep for torch, deep in zip(run(torch_cases, RANKS), run(deepspeed_cases, RANKS), strict=True)]


@pytest.mark.parametrize("case", TORCH + DEEPSPEED, ids=str)
def test_step_equals_that_of_one_process(results, case):
    dtype = torch.bfloat16 if case.dtype == "bf16" else torch.float32
    start, steps, loss = one_process(case.tied, RANKS // case.stages, dtype)
    found, tolerance = [], 1e-6 if case.dtype == "fp32" else torch.finfo(torch.bfloat16).eps
    for of_rank in results:
        assert not isinstance(of_rank[case], str), of_rank[case]
        found.append(of_rank[case][0])
        assert of_rank[case][1] == pytest.approx(loss, rel=tolerance)
    for name, step in steps.items():
        for state in whole(name, found, case.stages):
            error = (state.double() - start[name] - step).norm() / step.norm()
            assert error <= tolerance, name


def whole(name, found, stages):
    """Every copy of a parameter; rows are put together, and those of replicas are copies."""
    copies = [state[name] for state in found if name in state]
    rows = [state[f"rows of {name}"] for state in found if f"rows of {name}" in state]
    assert bool(copies) != bool(rows)
    assert not rows or len(rows) == len(found)
    of_replica = len(found) // stages
    return copies, rows, of_replica
