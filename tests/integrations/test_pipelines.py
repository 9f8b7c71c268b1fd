"""Pipelines of torch and DeepSpeed, the head whole on the last stage or spread over all: the step of one process."""

import importlib.util

import pytest
import torch

from tests.distributed.launch import run
from tests.integrations.pipelines import DEEPSPEED, RANKS, TORCH, VOCAB, deepspeed_cases, one_process, torch_cases

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")

ERRORS = {
    "losses": "ValueError: the step has 3 micro-batches, but the last stage deferred 1 losses",
    "rows": "ValueError: weight must be (stop - start = ",
    "dtype": "ValueError: weight must not be float16",
    "shard": "TypeError: shard must be a VocabShard over the pipeline's group, was Tensor",
    "input_grad": "ValueError: shard must have input_grad='complete' and tokens='same', had 'partial' and 'same'",
    "mean": "TypeError: mean must be callable, was 1.0",
    "loss": "TypeError: loss must be callable, was 'sum'",
    "tied": "TypeError: tied must be ",
    "tokens": "ValueError: tokens must be in [0, 61), held 61",
    "dtype of tokens": "ValueError: tokens must be int32 or int64",
    "not met": "RuntimeError: a spread head's loss has no gradient before all stages have met",
    "head": "TypeError: head must be a SpreadHead, was Tensor",
    "order": "ValueError: head must be spread over the stages in their order, but stage ",
    "keywords": "TypeError: keywords must not hold loss_fn or scale_grads",
    "engine": "TypeError: engine must be what deepspeed.initialize made of a PipelineModule, was PipelineStage",
    "not a head": "TypeError: head must be a SpreadHead, was DeepSpeedStage",
    "no submodule": "ValueError: head must be a submodule of the PipelineModule, set before deepspeed.initialize",
    "ranks": "ValueError: head must be spread over the 2 stages of the engine's pipeline, had a ",
}


@pytest.fixture(scope="module")
def of_torch():
    return run(torch_cases, RANKS)


@pytest.fixture(scope="module")
def of_deepspeed():
    return run(deepspeed_cases, RANKS)


@pytest.mark.parametrize("case", TORCH, ids=str)
def test_step_of_torch(of_torch, case):
    check([of_rank[case] for of_rank in of_torch], case)


@pytest.mark.parametrize("case", DEEPSPEED, ids=str)
def test_step_of_deepspeed(of_deepspeed, case):
    check([of_rank[case] for of_rank in of_deepspeed], case)


def check(results, case):
    """Every rank's parameters and losses are those of one process, and the ranks have all parameters."""
    tolerance = 1e-6 if case.dtype == "fp32" else 2 * torch.finfo(torch.bfloat16).eps
    expected, loss = one_process(case)
    rows = dict.fromkeys(expected, 0)
    for of_rank in results:
        assert not isinstance(of_rank, str), of_rank
        parts, losses = of_rank
        assert losses == pytest.approx([loss] * len(losses), rel=tolerance)
        for name, (start, part) in parts.items():
            value, step = (whole[start : start + len(part)] for whole in expected[name])
            assert (part.double() - value - step).norm() <= tolerance * step.norm(), name
            rows[name] += len(part)
    replicas = RANKS // case.stages
    both_ends = case.tied and case.head == "whole"
    for name, value in expected.items():
        copies = replicas * (2 if both_ends and name == "embedding" else 1)
        assert rows[name] == copies * len(value.start), name
    if case.head == "spread":
        most = -(-VOCAB // case.stages)
        name = "embedding" if case.tied else "head"
        assert all(len(parts[name][1]) <= most for parts, _ in results if case.tied or name in parts)


@pytest.mark.parametrize("name", ERRORS)
def test_errors(of_torch, of_deepspeed, name):
    for torchs, deepspeeds in zip(of_torch, of_deepspeed, strict=True):
        assert ERRORS[name] in (torchs | deepspeeds)[name]
