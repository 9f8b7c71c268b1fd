"""count_tokens and TokenMean: by themselves, and under DDP and FSDP on two ranks."""

import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from chunked_ce.parallel.tokens import TokenMean, count_tokens
from tests.distributed.launch import run
from tests.distributed.token_training import (
    COUNTED,
    LEARNING_RATE,
    mean_of_micro_batch,
    new_model,
    one_process,
    step_error,
    whole_batch,
    window,
)

IGNORED = torch.tensor([-100, -100])


# One process


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (torch.tensor([[1, -100], [0, 5]]), 3),
        (torch.tensor(4), 1),
        (torch.tensor([], dtype=torch.int64), 0),
        ([torch.tensor([1, 2], dtype=torch.int32), torch.tensor([[-100], [3]])], 3),
        ((torch.tensor([target]) for target in (1, -100, 2)), 2),
        ([torch.empty(0, 7, dtype=torch.int64), IGNORED], 0),
        ([], 0),
    ],
)
def test_count(targets, count):
    counted = count_tokens(targets)
    assert counted.shape == () and counted.dtype == torch.int64
    assert counted == count


def test_count_ignores_what_it_is_told_to():
    assert count_tokens(torch.tensor([0, 1, -100]), ignore_index=0) == 2


losses = st.integers(-(10**6), 10**6).map(lambda integer: integer / 1e4)
parts = st.lists(st.tuples(st.integers(0, 9), losses), min_size=1, max_size=6)


@given(parts, st.floats(0.01, 100))
def test_what_the_engine_makes_of_the_losses_is_the_mean(parts, divisor):
    """sum_rm mean(S_rm) / divisor = sum_rm S_rm / T = report, for any divisor."""
    targets = [torch.zeros(count, dtype=torch.int64) for count, _ in parts]
    sums = [torch.tensor(value if count else 0.0, dtype=torch.float64) for count, value in parts]
    mean = TokenMean.over(targets, divisor=divisor)
    num_tokens = sum(count for count, _ in parts)
    expected = sum(sums).item() / num_tokens if num_tokens else 0.0
    expected = pytest.approx(expected, abs=1e-14 * sum(map(abs, sums)).item())
    assert sum(mean(loss_sum) / divisor for loss_sum in sums).item() == expected
    assert mean.report(sums).item() == expected


def test_the_loss_is_attached_and_the_report_is_not():
    loss_sum = torch.tensor(6.0, requires_grad=True)
    mean = TokenMean(4, divisor=2)
    mean(loss_sum).backward()
    assert loss_sum.grad == 0.5
    report = mean.report([loss_sum, loss_sum])
    assert report == 3.0 and not report.requires_grad


@pytest.mark.parametrize("value", [0.0, 5.0, math.nan, math.inf])
@pytest.mark.parametrize("num_tokens", [0, 0.0, torch.tensor(0)])
def test_without_tokens_the_loss_is_zero_and_attached(value, num_tokens):
    loss_sum = torch.tensor(value, requires_grad=True)
    mean = TokenMean(num_tokens)
    loss = mean(loss_sum)
    loss.backward()
    assert loss == 0.0 and loss_sum.grad == 0.0
    assert mean.report(loss_sum) == 0.0
    assert mean.report([]) == 0.0


@pytest.mark.parametrize("num_tokens", [3, 0.3, torch.tensor(3), torch.tensor(0.3)])
def test_any_denominator(num_tokens):
    mean = TokenMean(num_tokens)
    assert mean.divisor == 1.0
    assert mean(torch.tensor(6.0)).item() == pytest.approx(6.0 / float(num_tokens))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_losses_are_float32_or_float64(dtype):
    mean = TokenMean(torch.tensor(100_000))  # beyond float16, and rounded by bfloat16
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    for loss in (mean(torch.ones((), dtype=dtype)), mean.report([torch.ones((), dtype=dtype)])):
        assert loss.dtype == expected
        assert loss.item() == pytest.approx(1e-5, rel=1e-6)


def test_report_takes_one_tensor_of_sums():
    assert TokenMean(4).report(torch.tensor([1.0, 2.0, 3.0])) == 1.5


def test_nothing_is_read_on_the_host():
    """A meta tensor has no value: whatever asks for one raises."""
    targets = [torch.zeros(2, 3, dtype=torch.int64, device="meta")] * 2
    loss_sum = torch.zeros((), device="meta", requires_grad=True)
    mean = TokenMean.over(targets, divisor=2)
    mean(loss_sum).backward()
    assert mean.num_tokens.is_meta and mean.report([loss_sum]).is_meta and loss_sum.grad.is_meta


def test_what_the_group_cannot_reduce_moves_to_its_device(monkeypatch):
    """As NCCL with targets on the CPU, with the meta device for the GPU."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(dist, "get_backend_config", lambda group: "meta:nccl")
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group: None)
    assert count_tokens(torch.tensor([1, 2])).is_meta
    assert count_tokens([]).is_meta
    assert TokenMean(torch.ones((), device="meta")).report([torch.tensor(1.0)]).is_meta


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: count_tokens(torch.tensor([1.5])),
            TypeError,
            "targets .* int32 or int64, was a torch.float32",
        ),
        (lambda: count_tokens(torch.tensor([True])), TypeError, "targets .* torch.bool"),
        (lambda: count_tokens([IGNORED, [1, 2]]), TypeError, r"targets must hold tensors, held \[1, 2\]"),
        (lambda: count_tokens(3), TypeError, "targets must be a tensor or an iterable of tensors, was 3"),
        (lambda: count_tokens(IGNORED, ignore_index=1.0), TypeError, "ignore_index must be .*, was 1.0"),
        (lambda: count_tokens(IGNORED, group=-100), TypeError, "group must be .* ProcessGroup .*, was -100"),
        (lambda: TokenMean.over(IGNORED, group="data"), TypeError, "group must be .*, was 'data'"),
        (lambda: TokenMean.over(IGNORED, divisor=0), ValueError, "divisor must be finite and > 0, was 0"),
        (lambda: TokenMean(3, divisor=-1.0), ValueError, "divisor must be finite and > 0, was -1.0"),
        (lambda: TokenMean(3, divisor=math.nan), ValueError, "divisor must be finite and > 0, was nan"),
        (lambda: TokenMean(3, divisor="2"), TypeError, "divisor must be a number or None, was '2'"),
        (lambda: TokenMean(-1), ValueError, "num_tokens must be finite and >= 0, was -1"),
        (lambda: TokenMean(None), TypeError, "num_tokens must be a number or a 0-d tensor, was None"),
        (lambda: TokenMean(torch.tensor([3])), ValueError, r"num_tokens must be 0-d, had shape \(1,\)"),
        (lambda: TokenMean(torch.tensor(True)), TypeError, "num_tokens .* torch.bool"),
        (lambda: TokenMean(3)(2.0), TypeError, "loss_sum must be a floating-point tensor, was 2.0"),
        (lambda: TokenMean(3)(torch.tensor(2)), TypeError, "loss_sum must be .* torch.int64"),
        (lambda: TokenMean(3)(torch.ones(2)), ValueError, r"loss_sum must be 0-d .*, had shape \(2,\)"),
        (lambda: TokenMean(3).report([2.0]), TypeError, "loss_sums must hold tensors, held 2.0"),
        (lambda: TokenMean(3).report(torch.tensor(2)), TypeError, "loss_sums must be .* torch.int64"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


# Two ranks

STEPS = (1, 3)
WRAPPERS = ("ddp", "fsdp")


def wrapped(wrapper):
    model = new_model()
    return DistributedDataParallel(model) if wrapper == "ddp" else fully_shard(model)


def set_last(model, last):
    """Whether the next backward is the window's last, after which gradients are averaged."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = last
    else:
        model.set_requires_gradient_sync(last)


def whole(parameter):
    parameter = parameter.detach()
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.clone()


def train(wrapper, batches, means=False):
    """Parameters after one step, and the reported loss. The micro-batches add up: nothing divides by them."""
    model = wrapped(wrapper)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    mean = TokenMean.over([target for _, target in batches])
    loss_sums = []
    for index, (tokens, target) in enumerate(batches):
        set_last(model, index == len(batches) - 1)
        loss_sum = model(tokens, target)
        loss_sums.append(loss_sum.detach())
        loss = mean_of_micro_batch(target)(loss_sum) / len(batches) if means else mean(loss_sum)
        loss.backward()
    optimizer.step()
    state = {name.removeprefix("module."): whole(parameter) for name, parameter in model.named_parameters()}
    return state, mean.report(loss_sums).item()


def two_ranks(rank, world_size):
    trained = {
        (wrapper, data, steps): train(wrapper, window(data, rank, steps))
        for wrapper in WRAPPERS
        for data in COUNTED
        for steps in STEPS
    }
    means = {wrapper: train(wrapper, window("uneven", rank, 3), means=True) for wrapper in WRAPPERS}

    alone = [dist.new_group([member]) for member in range(world_size)]
    mine = torch.arange(3 + rank)
    small = {
        "all": count_tokens(mine).item(),
        "alone": count_tokens(mine, group=alone[rank]).item(),
        "empty here": count_tokens([mine] if rank else []).item(),
        "divisor": TokenMean.over(mine).divisor,
        "divisor alone": TokenMean.over(mine, group=alone[rank]).divisor,
        "report": TokenMean.over(mine).report([torch.tensor(7.0 * rank)] if rank else []).item(),
        "report alone": TokenMean.over(mine, group=alone[rank]).report(torch.tensor(6.0)).item(),
    }
    try:
        count_tokens(mine, group=alone[1 - rank])
    except TypeError as error:
        small["not in the group"] = str(error)
    return trained, means, small


@pytest.fixture(scope="module")
def results():
    return run(two_ranks, 2)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("data", ["uneven", "idle rank"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_step_equals_that_of_one_process(results, wrapper, data, steps):
    exact, loss = one_process(whole_batch(data, steps), torch.float64, start=torch.float32)
    for trained, _, _ in results:
        state, reported = trained[wrapper, data, steps]
        assert step_error(state, exact, torch.float32) <= 1e-6
        assert reported == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_nothing_counted_anywhere_changes_nothing(results, wrapper):
    initial = dict(new_model().named_parameters())
    for trained, _, _ in results:
        state, reported = trained[wrapper, "nothing", 3]
        assert all(torch.equal(state[name], initial[name]) for name in initial)
        assert reported == 0.0


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_mean_of_means_would_be_another_step(results, wrapper):
    exact, _ = one_process(whole_batch("uneven", 3), torch.float64, start=torch.float32)
    for _, means, _ in results:
        assert step_error(means[wrapper][0], exact, torch.float32) > 0.1


def test_groups(results):
    for rank, (_, _, small) in enumerate(results):
        assert small["all"] == 7
        assert small["alone"] == 3 + rank
        assert small["empty here"] == 4
        assert small["divisor"] == 2.0 and small["divisor alone"] == 1.0
        assert small["report"] == 1.0
        assert small["report alone"] == pytest.approx(6.0 / (3 + rank))
        assert "group must be None or a ProcessGroup that this rank is in" in small["not in the group"]
