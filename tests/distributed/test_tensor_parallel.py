"""A head that torch's ``ColwiseParallel`` shards: unchanged model code takes its losses from each rank's rows."""

import pytest
import torch
from torch import nn

from tests.distributed.launch import run
from tests.distributed.tensor_parallel import (
    BATCH,
    CASES,
    LENGTH,
    LOSSES,
    OF_LOSSES,
    RANKS,
    SIZES,
    WARNED,
    Case,
    Step,
    batch,
    data_batch,
    loss_with,
    new_model,
    run_all,
    run_with_fsdp,
    step,
)


@pytest.fixture(scope="module")
def results():
    return run(run_all, RANKS)


def logits_of_a_rank(case: Case) -> int:
    """Bytes of (N, V / R) in float64."""
    return BATCH * LENGTH * (SIZES[case.size] // RANKS) * 8


def plain_step(case: Case) -> Step:
    ids, labels = batch(case)
    return step(new_model(case), lambda model: model(ids, labels))


def assert_same(found: Step, expected: Step):
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-12, atol=0)
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        atol = 1e-12 * gradient.abs().max().item()
        torch.testing.assert_close(
            found.gradients[name], gradient, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", CASES)
def test_the_step_of_one_process_without_logits(results, name, order):
    expected = plain_step(CASES[name])
    for result in results:
        found = result[name, order]
        assert found.is_lazy and found.evaluated and not found.said
        assert_same(found.step, expected)
        assert found.largest < logits_of_a_rank(CASES[name]) / 4


@pytest.mark.parametrize("name", LOSSES)
def test_other_losses(results, name):
    expected = step(new_model(OF_LOSSES), loss_with(name))
    for result in results:
        found, said, largest = result[name]
        assert_same(found, expected)
        if name in WARNED:
            (message,) = said
            assert message.startswith(f"LazyLogits does not follow {WARNED[name]}: the logits")
        else:
            assert not said and largest < logits_of_a_rank(OF_LOSSES) / 4


@pytest.mark.parametrize("way", ["loss_parallel", "unwrapped", "FSDP of the model", "FSDP of the head"])
def test_other_surroundings(results, way):
    expected = plain_step(CASES["sharded DTensor"])
    for result in results:
        assert_same(result[way], expected)


def test_unwrap_and_lazy_always(results):
    expected = plain_step(CASES["sharded DTensor"]).loss
    for result in results:
        assert result["class"] is nn.Linear
        is_lazy, loss = result["always"]
        assert is_lazy
        torch.testing.assert_close(loss, expected)


def test_what_is_refused(results):
    for result in results:
        assert result["shards"].startswith("NotImplementedError: sigmoid needs the logits of all words")
        assert "sharded by tensor parallelism" in result["shard"]
        assert "must be sharded by ColwiseParallel, if at all, but is sharded by RowwiseParallel" in result["rowwise"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("rowwise later", "the head is sharded by RowwiseParallel"),
        ("sharded tokens", "the head is sharded by ColwiseParallel, with output_layouts="),
        ("a hook", "a hook on the head"),
    ],
)
def test_whole_logits_are_told_once(results, name, reason):
    case = CASES["layers"]
    for result in results:
        found, said = result[name]
        (message,) = said
        assert reason in message
        if name != "sharded tokens":
            assert_same(found, plain_step(case))


@pytest.mark.thorough
def test_fsdp_over_ranks_with_other_tokens():
    steps = [step(new_model(OF_LOSSES), lambda model, rank=rank: model(*data_batch(rank))) for rank in range(2)]
    mean = {name: (gradient + steps[1].gradients[name]) / 2 for name, gradient in steps[0].gradients.items()}
    for rank, result in enumerate(run(run_with_fsdp, 2 * RANKS)):
        for found in result.values():
            assert_same(found, Step(steps[rank // RANKS].loss, mean))
