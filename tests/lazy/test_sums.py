"""Sums of the lazy logits of two heads: values and gradients of plain logits, without any."""

import contextlib
import warnings

import pytest
import torch
import torch.nn.functional as F

from chunked_ce import ChunkOptions, LMHead, VocabShard
from tests.distributed.threads import run_threads
from tests.integrations.training import largest_allocation

TOKENS, VOCAB, WIDTHS = (2, 5), 40, (6, 4)
TARGET = torch.arange(10).view(TOKENS) * 3


def loss(z):
    return F.cross_entropy(z.flatten(0, 1), TARGET.flatten())


def entropy(z):
    return -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)


def word_set(z):
    z[..., 3] = -1.5
    return z


SUMS = {
    "sum": lambda a, b: loss(a + b),
    "difference": lambda a, b: (2 * a - b / 3).log_softmax(-1).gather(-1, TARGET[..., None]),
    "one detached": lambda a, b: loss(a - 2 * b.detach()),
    "the other detached": lambda a, b: entropy(a.detach() - 2 * b),
    "softcap": lambda a, b: loss(torch.tanh((a + b) / 3) * 3),
    "mean": lambda a, b: (a + b)[:, 1:].mean(),
    "words": lambda a, b: (a + b)[..., 3:25].logsumexp(-1),
}
OTHERS = {
    "topk": lambda a, b: (a + b).topk(3).values,
    "argmax": lambda a, b: (a + b).argmax(-1) * (a + b).logsumexp(-1),
}
COMPUTED = {
    "all logits": lambda a, b: (a + b).relu(),
    "a softcap before": lambda a, b: loss(torch.tanh(a) + b),
    "other tokens": lambda a, b: loss(a + b[:, :1]),
    "words set before": lambda a, b: loss(a + word_set(b)),
    "words set before in the first": lambda a, b: loss(word_set(a) - b),
    "probabilities": lambda a, b: (a.softmax(-1) + b.softmax(-1)).log().mean(),
}


def heads(bias, training=True):
    generator = torch.Generator().manual_seed(0)  # ranks that are threads share torch's own
    made = [LMHead(width, VOCAB, bias=bias, dtype=torch.float64) for width in WIDTHS]
    for parameter in (parameter for head in made for parameter in head.parameters()):
        torch.nn.init.normal_(parameter, generator=generator)
    hidden = [torch.randn(*TOKENS, width, dtype=torch.float64, generator=generator) for width in WIDTHS]
    hidden = [states.requires_grad_() for states in hidden]
    return [head.train(training) for head in made], hidden


def outcome(form, made, hidden):
    value = form(*(head(states) for head, states in zip(made, hidden, strict=True)))
    trained = [*hidden, *(parameter for head in made for parameter in head.parameters())]
    upstream = torch.linspace(-1, 2, value.numel(), dtype=value.dtype).view(value.shape)
    return value, *torch.autograd.grad(value, trained, upstream, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("name", SUMS | OTHERS)
def test_values_and_gradients(name, bias):
    form = (SUMS | OTHERS)[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = outcome(form, *heads(bias))
    torch.testing.assert_close(ours, outcome(form, *heads(bias, training=False)))


@pytest.mark.parametrize("name", COMPUTED)
def test_what_is_computed(name):
    with pytest.warns(UserWarning, match="does not follow"):
        ours = outcome(COMPUTED[name], *heads(True))
    torch.testing.assert_close(ours, outcome(COMPUTED[name], *heads(True, training=False)))


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits):
        return torch.where(logits.isnan(), 0, logits)

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_a_function_of_the_sum_of_two_calls_of_one_head():
    """The gradient of the sum reaches the weight once for each call."""
    found = []
    for training in (True, False):
        (head, _), (hidden, _) = heads(False, training)
        logits = head(hidden) + head(hidden.flip(0)) * 2
        with pytest.warns(UserWarning, match="does not follow") if training else contextlib.nullcontext():
            values = _Read.apply(logits)
        found.append(torch.autograd.grad(loss(values), [hidden, *head.parameters()]))
    torch.testing.assert_close(*found)


def test_a_head_that_an_engine_takes_back_before_the_loss():
    made, hidden = heads(False)
    logits = made[0](hidden[0]) + made[1](hidden[1])
    made[1].weight.untyped_storage().resize_(0)  # as FSDP2 does after a forward
    with pytest.raises(RuntimeError, match="is not whole here"):
        loss(logits)


def test_hooks_on_both():
    """Each sees the gradient of the sum, and what it returns goes on."""
    found = []
    for training in (True, False):
        made, hidden = heads(False, training)
        first, second = (head(states) for head, states in zip(made, hidden, strict=True))
        first.register_hook(lambda grad: grad + grad)
        second.register_hook(lambda grad: grad + grad + grad)
        found.append(torch.autograd.grad(loss(first + second), hidden))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("changed", ["hidden states", "weight"])
def test_what_changes_before_the_sum(changed):
    made, hidden = heads(False)
    logits = [head(states) for head, states in zip(made, hidden, strict=True)]
    with torch.no_grad():
        (hidden[1] if changed == "hidden states" else made[1].weight).mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        logits[0] + logits[1]


def on_a_rank(rank: int, world_size: int, tokens: str) -> dict:
    torch.set_num_threads(1)
    whole, hidden = heads(False)
    shard = VocabShard.split(VOCAB, tokens=tokens)
    made = [
        LMHead(width, VOCAB, dtype=torch.float64, vocab=shard, options=ChunkOptions(chunk_size=3)) for width in WIDTHS
    ]
    with torch.no_grad():
        for mine, all_rows in zip(made, whole, strict=True):
            mine.weight.copy_(all_rows.weight[shard.start : shard.stop])
    return {name: outcome(form, made, hidden) for name, form in SUMS.items()}


@pytest.mark.parametrize("tokens", ["same", "own"])
def test_sharded(tokens):
    results = run_threads(on_a_rank, 2, tokens)
    for name, form in SUMS.items():
        value, *gradients = outcome(form, *heads(False, training=False))
        for result in results:
            torch.testing.assert_close(result[name][:3], (value, *gradients[:2]))
        for at in (2, 3):  # the ranks' tokens are alike, so that their mean is that of one
            rows = torch.cat([result[name][1 + at] for result in results])
            torch.testing.assert_close(rows, gradients[at])


def test_no_logits():
    made = [LMHead(width, 4096, options=ChunkOptions(chunk_size=1)) for width in (3, 2)]
    hidden = [torch.randn(3, 4, width, requires_grad=True) for width in (3, 2)]
    target = torch.zeros(12, dtype=torch.long)

    def step():
        logits = made[0](hidden[0]) + made[1](hidden[1])
        F.cross_entropy(logits.flatten(0, 1), target).backward()

    assert largest_allocation(step) < 12 * 4096 * 4 // 2
