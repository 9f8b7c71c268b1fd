"""A head that holds its rank's words: unmodified model code takes the loss of the whole vocabulary."""

import re

import pytest
import torch
import torch.nn.functional as F

from tests.distributed.launch import run

VOCAB, WIDTH, TOKENS = 11, 4, 6
FORMS = {
    "loss": lambda z, y: F.cross_entropy(z.float().view(-1, VOCAB), y.view(-1), label_smoothing=0.1),
    "softcap": lambda z, y: F.cross_entropy(torch.tanh(z / 2).mul(2).flatten(0, 1), y.flatten(), reduction="sum"),
    "log-probabilities": lambda z, y: z.log_softmax(-1).gather(-1, y[..., None]).square().sum(),
    "their sum": lambda z, y: (z.log_softmax(-1).sum(-1) / 50).sin().sum(),
    "entropy": lambda z, y: (z.softmax(-1) * z.log_softmax(-1)).sum(-1).square().sum(),
}
REFUSED = {
    "relu": lambda z: z.relu(),
    "clamp": lambda z: (z + 1).clamp(0, 1),
    "argmax": lambda z: z.argmax(-1),
    "max": lambda z: z.max(-1),
    "topk": lambda z: z.topk(2),
    "materialize": lambda z: z.materialize(),
}


def inputs():
    torch.manual_seed(0)
    head = torch.randn(VOCAB, WIDTH, requires_grad=True)
    hidden = torch.randn(2, 3, WIDTH, requires_grad=True)
    return hidden, head, torch.randint(VOCAB, (2, 3))


def two_ranks(rank, world_size):
    from chunked_ce import LMHead, VocabShard

    shard = VocabShard.split(VOCAB)
    hidden, whole, target = inputs()
    head = LMHead(WIDTH, VOCAB, vocab=shard)
    with torch.no_grad():
        head.weight.copy_(whole[shard.start : shard.stop])
    found = {}
    for name, form in FORMS.items():
        loss = form(head(hidden), target)
        found[name] = (loss.detach(), *torch.autograd.grad(loss, [hidden, head.weight]))
    for name, form in REFUSED.items():
        with pytest.raises(NotImplementedError) as refusal:
            form(head(hidden))
        found[name] = str(refusal.value)
    head.eval()
    found["evaluation"] = F.cross_entropy(head(hidden).flatten(0, 1), target.flatten()).detach()
    with pytest.raises(NotImplementedError, match="this call of the head"):
        head(hidden[..., :2])
    found["tensor parallel"] = tensor_parallel()
    return found


def tensor_parallel():
    """A head that is sharded by DTensor computes what it would as a linear layer."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    from chunked_ce import LMHead

    hidden, whole, target = inputs()
    model = torch.nn.Sequential(LMHead(WIDTH, VOCAB))
    with torch.no_grad():
        model[0].weight.copy_(whole)
    parallelize_module(model, init_device_mesh("cpu", (2,)), {"0": ColwiseParallel(output_layouts=Replicate())})
    loss = F.cross_entropy(model(hidden).flatten(0, 1), target.flatten())
    loss.backward()
    return loss.detach(), hidden.grad, model[0].weight.grad.full_tensor()


@pytest.fixture(scope="module")
def results():
    return run(two_ranks, 2)


@pytest.mark.parametrize("name", FORMS)
def test_the_loss_of_the_whole_vocabulary(results, name):
    hidden, head, target = inputs()
    loss = FORMS[name](hidden @ head.T, target)
    grad_hidden, grad_head = torch.autograd.grad(loss, [hidden, head])
    for found, _, _ in (result[name] for result in results):
        torch.testing.assert_close(found, loss.detach())
    for result in results:
        torch.testing.assert_close(result[name][1], grad_hidden)
    torch.testing.assert_close(torch.cat([result[name][2] for result in results]), grad_head)


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_all_words_is_refused_by_name(results, name):
    for result, rows in zip(results, (6, 5), strict=True):
        assert re.match(f"{name} needs the logits of all words, of which this rank holds {rows} of 11", result[name])


def test_evaluation(results):
    hidden, head, target = inputs()
    expected = F.cross_entropy((hidden @ head.T).flatten(0, 1), target.flatten()).detach()
    for result in results:
        torch.testing.assert_close(result["evaluation"], expected)


def test_a_tensor_parallel_head(results):
    hidden, head, target = inputs()
    loss = F.cross_entropy((hidden @ head.T).flatten(0, 1), target.flatten())
    expected = (loss.detach(), *torch.autograd.grad(loss, [hidden, head]))
    for result in results:
        for found, plain in zip(result["tensor parallel"], expected, strict=True):
            torch.testing.assert_close(found, plain)
