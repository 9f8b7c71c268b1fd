"""Changes in place of a view of lazy logits, and the tensors that share its memory."""

import warnings

import pytest
import torch
import torch.nn.functional as F

from chunked_ce import ChunkOptions, LMHead
from tests.integrations.training import largest_allocation

TOKENS, VOCAB = (2, 5), 50
TARGET = torch.arange(10).view(TOKENS) * 7 % VOCAB


def loss(z, target=TARGET):
    return F.cross_entropy(z.reshape(-1, z.shape[-1]), target.reshape(-1))


def part_of_kept_logits(z):
    """As GRPO scales: the model's output holds the whole logits."""
    view = z[:, :-1]
    view = view[:, -3:]
    view.div_(0.7)
    return loss(view, TARGET[:, :3])


def twice(z):
    view = z.view(-1, VOCAB)
    view /= 0.7
    view.mul_(2).neg_()
    return loss(view)


def copies_made_before(z):
    copied, logp = z[:, 1:] * 2, z[:, :3].log_softmax(-1)
    view = z[:, :3]
    view.tanh_()
    return loss(copied, TARGET[:, 1:]) + logp.gather(-1, TARGET[:, :3, None]).sum() + loss(view, TARGET[:, :3])


LAZY = {"part of kept logits": part_of_kept_logits, "twice": twice, "copies made before": copies_made_before}


def the_base(z):
    view = z[:, :-1]
    view.div_(0.7)
    return loss(view, TARGET[:, :4]) + loss(z)


def the_base_alone(z):
    z.view(-1, VOCAB).div_(0.7)
    return loss(z)


def views_of_views(z):
    copied, first = z[:, 1:] * 2, z[:, :3]
    first /= 0.3
    second = first[:, 1:]
    second.mul_(2)
    found = loss(second, TARGET[:, 1:3]) + loss(first, TARGET[:, :3])
    return found + loss(copied, TARGET[:, 1:]) + loss(z)


def without_a_gradient(z):
    view = z[0]
    view.neg_()
    with torch.no_grad():
        p = view.softmax(-1)
    del view
    return p[:, 3].sum() * loss(z)


def a_detached_one(z):
    detached, view = z.detach(), z[0]
    view.mul_(2)
    return loss(z) * detached.sum()


def a_view_of_a_detached_one(z):
    half = z.detach() * 0.5
    half.view(-1, VOCAB)[1:].div_(2)
    return loss(z) * half.sum()


def words(z):
    part = z[..., :7]
    part.mul_(2)
    return part.sum() + z.logsumexp(-1).sum()


def then_the_base(z):
    view = z[:, :3]
    view.mul_(2)
    z.mul_(3)
    return view.logsumexp(-1).sum() + z.sum()


def then_values(z):
    view = z[:, :3]
    view.mul_(2)
    view.clamp_(-1, 1)
    return z.sum() + view.sum()


def transposed(z):
    view = z.mT
    view.mul_(2)
    return z[:, 2].exp().sum() + view.exp().sum()


class _Same(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


COMPUTED = {
    function.__name__: function
    for function in (
        a_view_of_a_detached_one, the_base, the_base_alone, views_of_views, without_a_gradient, a_detached_one, words,
        then_the_base, then_values, transposed,
    )
}  # fmt: skip


def outcome(form, training):
    torch.manual_seed(0)
    head = LMHead(6, VOCAB, bias=True, dtype=torch.float64, options=ChunkOptions(chunk_size=3)).train(training)
    hidden = torch.randn(*TOKENS, 6, dtype=torch.float64, requires_grad=True)
    logits = head(hidden)
    value = form(logits)
    return value, *torch.autograd.grad(value, [hidden, *head.parameters()])


@pytest.mark.parametrize("name", LAZY)
def test_what_stays_lazy(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = outcome(LAZY[name], True)
    torch.testing.assert_close(ours, outcome(LAZY[name], False))


@pytest.mark.parametrize("name", COMPUTED)
def test_what_is_computed(name):
    with pytest.warns(UserWarning, match="does not follow") as caught:
        ours = outcome(COMPUTED[name], True)
    assert len(caught) == 1
    torch.testing.assert_close(ours, outcome(COMPUTED[name], False))


def test_the_dtype_of_a_change_is_that_of_the_logits():
    """A temperature of each token in float32 leaves bf16 logits in bf16, as it leaves plain ones."""
    temperature, found = torch.linspace(0.5, 2, 5).unsqueeze(-1), []
    for training in (True, False):
        torch.manual_seed(0)
        head = LMHead(6, VOCAB, dtype=torch.bfloat16, options=ChunkOptions(chunk_size=3)).train(training)
        logits = head(torch.randn(*TOKENS, 6, dtype=torch.bfloat16))
        logits.div_(temperature)
        values = logits.materialize() if training else logits
        assert logits.dtype == values.dtype == torch.bfloat16
        found.append(values)
    assert torch.equal(*found)


def test_a_function_of_what_was_changed():
    """As engines have for what a forward returns: the values are right, and a gradient of theirs is a clear error."""
    head, hidden = LMHead(6, VOCAB), torch.randn(*TOKENS, 6, requires_grad=True)
    logits = head(hidden)
    logits[0].mul_(3)
    with pytest.warns(UserWarning, match="does not follow"):
        passed = _Same.apply(logits)
    plain = F.linear(hidden, head.weight) * torch.tensor([3, 1]).view(2, 1, 1)
    torch.testing.assert_close(passed, plain)
    with pytest.raises(RuntimeError, match="changed in place: call materialize"):
        loss(passed).backward()


def test_no_logits():
    head, hidden = LMHead(2, 4096, options=ChunkOptions(chunk_size=1)), torch.randn(3, 4, 2, requires_grad=True)

    def step():
        logits = head(hidden)
        view = logits[:, :-1]
        view.div_(0.7)
        loss(view, torch.zeros(3, 3, dtype=torch.long)).backward()
        return logits

    assert largest_allocation(step) < 12 * 4096 * 4 // 3
