"""The tensors that are measured on, and the float64 reference of a few of their gradients."""

import pytest
import torch
import torch.nn.functional as F

from chunked_ce.cli.accuracy import errors_of, reference
from chunked_ce.cli.synthetic_inputs import IGNORED, TRAINED_ENTROPY, LossInputs, load, softmax_summary


@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.0])
def test_reference(ignored, monkeypatch):
    """Against autograd on all logits in float64, with blocks smaller than the sizes."""
    monkeypatch.setattr("chunked_ce.cli.accuracy._BLOCK_TOKENS", 32)
    monkeypatch.setattr("chunked_ce.cli.accuracy._BLOCK_ENTRIES", 100)
    problem = LossInputs.random(90, 16, 731, torch.float32, ignored=ignored)
    exact = reference(problem)
    hidden, weight = (tensor.detach().double().requires_grad_() for tensor in problem[:2])
    loss = F.cross_entropy(hidden @ weight.t(), problem.target, reduction="sum")
    loss = loss / max(1, int((problem.target != IGNORED).sum()))
    loss.backward()
    found = errors_of(exact, loss.detach(), hidden.grad, weight.grad)
    assert all(error < 1e-13 for error in found.values())
    if ignored < 1:
        assert len(exact.entries) > 100
        worse = errors_of(exact, loss.detach() + 1, 1.01 * hidden.grad, weight.grad)
        assert worse["hidden_grad_relative_error"] == pytest.approx(0.01)
        assert worse["loss_error_nats"] == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trained_is_as_sharp_as_it_says(dtype):
    problem = LossInputs.trained(512, 64, 8192, dtype, ignored=0.25)
    assert (problem.target == IGNORED).sum() == 128
    summary = softmax_summary(problem)
    assert summary["entropy"] == pytest.approx(TRAINED_ENTROPY, abs=0.1)
    assert summary["loss"] == pytest.approx(TRAINED_ENTROPY, abs=1.5)  # targets are drawn from it: 64 of them
    assert problem.weight.requires_grad and problem.hidden.dtype == dtype


def test_tensors_of_a_user(tmp_path):
    path = tmp_path / "tensors.pt"
    tensors = {"hidden": torch.randn(5, 4), "weight": torch.randn(9, 4), "target": torch.arange(5)}
    torch.save(tensors, path)
    problem = load(path, torch.bfloat16)
    assert problem.hidden.dtype == torch.bfloat16 and problem.hidden.requires_grad
    assert torch.equal(problem.target, tensors["target"])
    torch.save(tensors | {"target": torch.arange(4)}, path)
    with pytest.raises(ValueError, match=r"target \(4,\)"):
        load(path, torch.float32)
    torch.save({"hidden": torch.randn(5, 4)}, path)
    with pytest.raises(ValueError, match="hidden, weight, target"):
        load(path, torch.float32)
