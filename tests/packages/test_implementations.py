"""The implementations that `chunked-ce bench` and `benchmarks.ratios` take from other packages compute the loss."""

import pytest
import torch

from chunked_ce.cli.accuracy import errors_of, reference
from chunked_ce.cli.implementations import FULL, LIGER_SCALED, TRL, loss_of, why_not
from chunked_ce.cli.synthetic_inputs import LossInputs

EXACT = 2e-5  # in fp32, of a loss of about 6 and of a gradient's root mean square: a few roundings of sums
OF_PLAIN = 1.5  # in bf16, of the plain loss's own error: theirs are summed in other orders and dtypes


def errors(name: str, inputs: LossInputs) -> list[float]:
    """The errors of the loss and of rows of both gradients."""
    hidden, weight, target = inputs
    loss = loss_of(name)(hidden, weight, target).mean()
    loss.backward()
    found = errors_of(reference(inputs), loss.detach(), hidden.grad, weight.grad)
    hidden.grad = weight.grad = None
    return list(found.values())


@pytest.mark.parametrize("name", [TRL, LIGER_SCALED])
@pytest.mark.parametrize("ignored", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loss_and_its_gradients(dtype, ignored, name):
    """More tokens than one of Liger's chunks, and a share of them ignored."""
    if reason := why_not(name):
        pytest.skip(reason)
    inputs = LossInputs.trained(600, 32, 1003, dtype, ignored=ignored)
    found, plain = errors(name, inputs), errors(FULL, inputs)
    if dtype == torch.float32:
        assert max(found) < EXACT
    else:
        assert all(a <= OF_PLAIN * b for a, b in zip(found[1:], plain[1:], strict=True)), (found, plain)
        assert found[0] < 1e-2
