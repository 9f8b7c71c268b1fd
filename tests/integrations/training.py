"""One training step of a model, and whether two models make the same one."""

import copy
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tests.precision import FP32, errors


class Step(NamedTuple):
    loss: Tensor
    gradients: dict[str, Tensor]


def training_step(model: nn.Module, loss_of: Callable[[nn.Module], Tensor]) -> Step:
    model.zero_grad()
    torch.manual_seed(1)  # dropout
    loss = loss_of(model)
    loss.backward()
    return Step(loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def exact_step(model: nn.Module, loss_of: Callable[[nn.Module], Tensor]) -> Step:
    return training_step(copy.deepcopy(model).double(), loss_of)


def assert_same_step(ours: Step, plain: Step, exact: Step, most_roundings: int = 4):
    """Loss and every gradient are as close to the float64 model's as the plain model's are.

    Everything but the head's arithmetic is the same in both, so their errors are mostly the same too: twice the
    plain error covers sums in another order. A gradient that cancels to little (a key's bias) is as uncertain as
    the terms it is summed from, which the model's largest gradient stands for: ``most_roundings`` of it are allowed.
    """
    loss_error = abs(plain.loss.double() - exact.loss.double())
    assert abs(ours.loss.double() - exact.loss.double()) <= 2 * loss_error + 2 * FP32 * abs(exact.loss)
    assert ours.gradients.keys() == plain.gradients.keys()
    largest = max(gradient.abs().max().item() for gradient in exact.gradients.values())
    for name, gradient in ours.gradients.items():
        expected = exact.gradients[name].double().numpy()
        assert gradient.dtype == plain.gradients[name].dtype
        rms, most = errors(gradient, expected)
        plain_rms, plain_most = errors(plain.gradients[name], expected)
        assert rms <= 2 * plain_rms + 4 * FP32 * largest / math.sqrt(gradient.numel()), (
            f"rms error of the gradient of {name}"
        )
        assert most <= 2 * plain_most + most_roundings * FP32 * largest, f"largest error of the gradient of {name}"


def largest_allocation(step: Callable[[], object]) -> int:
    """Bytes, inside operators too."""
    return max(allocations(step))


def allocations(step: Callable[[], object]) -> list[int]:
    """Bytes of each, inside operators too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]"]
