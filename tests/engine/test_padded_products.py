"""The way of an accelerator on a CPU: a bias is added within the product, whose rows are padded."""

import pytest
import torch

from chunked_ce import devices
from chunked_ce.engine.products import project
from chunked_ce.engine.scratch import cast_with_room, logits_scratch, with_padding
from tests.cases import gradients, problem

CPU = torch.device("cpu")


@pytest.fixture
def dense(monkeypatch):
    """Whether the output of each product with a bias was dense."""
    seen, addmm = [], torch.addmm

    def noticing(bias, left, right, *, out):
        seen.append(out.is_contiguous())
        return addmm(bias, left, right, out=out)

    monkeypatch.setattr(devices, "is_accelerator", lambda device_type: True)
    monkeypatch.setattr(torch, "addmm", noticing)
    return seen


@pytest.mark.parametrize("room", [True, False])
@pytest.mark.parametrize("vocab", [1, 15, 16, 50])
@pytest.mark.parametrize("n", [0, 1, 5])
def test_project(n, vocab, room, dense):
    """Whatever lies behind the head reaches no logit; without room, the product is the usual one."""
    hidden, weight, bias = torch.randn(n, 6), torch.randn(vocab, 6).double(), torch.randn(vocab).double()
    head, added = (cast_with_room(part, torch.float32) if room else part.float() for part in (weight, bias))
    if room and vocab % 16:
        with_padding(head)[vocab:] = torch.nan
    out = logits_scratch(n, vocab, dtype=torch.float32, device=CPU)
    low_rank = torch.randn(n, 2), torch.randn(vocab, 2)
    expected = hidden @ weight.float().t() + bias.float() + low_rank[0] @ low_rank[1].t()
    torch.testing.assert_close(project(hidden, head, added, out, low_rank), expected)
    assert dense == [room or out.is_contiguous()]


def test_padding():
    """Dense rows with what lies behind them, where there is any."""
    whole = torch.arange(64.0).view(32, 2)
    assert torch.equal(with_padding(whole[:17]), whole)
    assert torch.equal(with_padding(whole[:16]), whole[:16])
    assert torch.equal(with_padding(whole.view(2, 32)[:, :20], 1), whole.view(2, 32))
    for part, dim in ((whole[1:18], 0), (whole[:17, :1], 0), (whole.view(2, 32)[:, :9], 1), (whole.t(), 0)):
        assert with_padding(part, dim) is None


def test_a_head_that_is_cast(dense, monkeypatch):
    """A loss under autocast is that of a CPU, and so are its gradients."""
    case = problem(13, 5, 50, bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = case.loss()
    found = gradients(loss, case)
    assert dense and all(dense)
    monkeypatch.undo()
    with torch.autocast("cpu", torch.bfloat16):
        expected = case.loss()
    assert torch.equal(loss, expected)
    torch.testing.assert_close(found, gradients(expected, case))
