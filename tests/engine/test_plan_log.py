"""``CHUNKED_CE_LOG=plan`` says how each sweep is cut, once per sweep, and what it says is the plan."""

import logging
import os
import re
import subprocess
import sys

import pytest
import torch

from chunked_ce import ChunkOptions, cross_entropy, linear_cross_entropy, linear_logprobs, linear_statistics
from chunked_ce.engine import plan_log

HIDDEN, HEAD = torch.randn(30, 8), torch.randn(640, 8)
TARGET = torch.arange(30).masked_fill(torch.arange(30) < 4, -100)


@pytest.fixture
def lines(monkeypatch, caplog):
    monkeypatch.setattr(plan_log, "LOGS_PLANS", True)
    caplog.set_level(logging.INFO, "chunked_ce")
    return lambda: [record.getMessage() for record in caplog.records]


def trained():
    return HIDDEN.clone().requires_grad_(), HEAD.clone().requires_grad_()


def test_gradients_in_the_forward(lines):
    linear_cross_entropy(*trained(), TARGET, options=ChunkOptions(chunk_size=10)).backward()
    (line,) = lines()
    assert line == (
        "plan: CrossEntropy, gradients in the forward: 26 of 30 tokens in 3 x 10, 640 words; 0.0 MiB of float32 logits "
        "at a time; budget 64.0 MiB, the least budget; torch kernels on cpu; sums in float32 for the head, float32 for "
        "hidden states"
    )


def test_gradients_in_the_backward(lines):
    options = ChunkOptions(memory_budget=26 * 128 * 4, gradients="backward", gradient_filter=0.01)
    loss = linear_cross_entropy(*trained(), TARGET, options=options)
    (values,) = lines()
    assert values.startswith("plan: statistics, values: 26 of 30 tokens in 1 x 26, 640 words in 5 x 128; 0.0 MiB")
    assert "budget 0.0 MiB, as asked; gradient filter at 1.0e-02; torch kernels" in values and "sums" not in values
    loss.backward()
    assert len(lines()) == 2 and lines()[1].startswith("plan: statistics, gradients in the backward: 26 of 30 tokens")


def test_other_ways(lines):
    linear_statistics(HIDDEN, HEAD, TARGET, options=ChunkOptions(invariant=True))
    cross_entropy(HIDDEN @ HEAD.T, TARGET)
    torch.func.grad(lambda hidden: linear_cross_entropy(hidden, HEAD, TARGET))(HIDDEN)
    invariant, existing, plain = lines()
    assert invariant.startswith("plan: statistics, batch-invariant values: 26 of 30 tokens in 1 x 26, 640 words in 1 x")
    assert existing.endswith("640 words, float32 logits that exist, a few rows at a time; torch kernels on cpu")
    assert plain == "plan: statistics, in plain torch: all logits of 30 tokens and 640 words exist"


def test_each_run_of_a_compiled_call(lines):
    step = torch.compile(lambda hidden: linear_logprobs(hidden, HEAD, TARGET), backend="eager", fullgraph=True)
    for _ in range(2):
        step(HIDDEN)
    assert len(lines()) == 2 and all("values: 26 of 30 tokens" in line for line in lines())


def test_off_by_default(caplog):
    caplog.set_level(logging.DEBUG)
    linear_cross_entropy(*trained(), TARGET).backward()
    assert not plan_log.LOGS_PLANS and not caplog.records


def test_a_value_that_it_does_not_have():
    assert plan_log.asked({plan_log.VARIABLE: "plan"}) and not plan_log.asked({plan_log.VARIABLE: ""})
    with pytest.warns(UserWarning, match="CHUNKED_CE_LOG is 'plans', which logs nothing: set it to 'plan', or unset"):
        assert not plan_log.asked({plan_log.VARIABLE: "plans"})


def test_stderr_of_a_process_without_logging():
    code = (
        "import torch, chunked_ce as c; c.linear_logprobs(torch.zeros(2, 4), torch.zeros(8, 4), torch.tensor([1, 2]))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"CHUNKED_CE_LOG": "plan"}, capture_output=True, text=True
    )
    assert re.fullmatch(r"chunked_ce plan: statistics, values: 2 of 2 tokens in 1 x 2, 8 words .*\n", ran.stderr)
    assert ran.stdout == ""
