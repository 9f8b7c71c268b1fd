"""All that is asked of the same logits comes from the same product, bit by bit, and the logits themselves too."""

import warnings

import pytest
import torch
import torch.nn.functional as F

from chunked_ce import ChunkOptions, LazyLogits, LMHead
from tests.integrations.training import largest_allocation

WIDTH, VOCAB = 64, 1003  # where a product of few rows is rounded otherwise than one of many

FORMS = {
    "whole": lambda z: z,
    "last token": lambda z: z[:, -1],
    "one token": lambda z: z[1, 3],
    "without the last": lambda z: z[..., :-1, :].contiguous().view(-1, VOCAB),
    "temperature": lambda z: (z if z.dtype == torch.float64 else z.float())[:, -1] / 0.7,
    "softcap": lambda z: torch.tanh(z / 3.0) * 3.0,
    "mask": lambda z: z[torch.arange(12).view(2, 6) % 5 != 1] * -1.3,
    "shuffled": lambda z: z.flatten(0, 1)[torch.tensor([7, 3, 3, 11, 0])],
    "transposed": lambda z: z.transpose(0, 1)[1:] * 0.3,
    "detached": lambda z: z.detach()[:, ::2],
}
QUESTIONS = {
    "topk": lambda z: tuple(z.topk(7)),
    "smallest": lambda z: tuple(z.topk(3, largest=False)),
    "max": lambda z: tuple(z.max(-1)),
    "max kept": lambda z: tuple(torch.max(z, dim=-1, keepdim=True)),
    "argmax": lambda z: (z.argmax(-1),),
    "argmin": lambda z: (z.argmin(-1, keepdim=True),),
    "gather": lambda z: (z.gather(-1, torch.arange(3).expand(*z.shape[:-1], 3) * 400 + 5),),
    "take along": lambda z: (torch.take_along_dim(z, z.detach().argmax(-1, keepdim=True), dim=-1),),
    "log-sum-exp": lambda z: (z.logsumexp(-1),),
}


def new_head(dtype=torch.float32, **options):
    torch.manual_seed(0)
    head = LMHead(WIDTH, VOCAB, dtype=dtype, options=ChunkOptions(**options))
    with torch.no_grad():
        head.weight.normal_()
    return head, torch.randn(2, 6, WIDTH, dtype=dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"chunk_size": 5}, {"memory_budget": 10_000}], ids=str)
@pytest.mark.parametrize("how", ["trained", "hooked", "frozen"])
def test_answers_are_those_of_the_logits_computed_later(dtype, options, how):
    head, hidden = new_head(dtype, **options)
    trained = how != "frozen"
    hidden.requires_grad_(trained)
    head.requires_grad_(trained)
    for form in FORMS.values():
        logits = head(hidden)
        seen = form(logits)
        if how == "hooked" and seen.requires_grad:
            seen.register_hook(lambda grad: grad)
        found = {name: ask(seen) for name, ask in QUESTIONS.items()}
        assert type(seen) is LazyLogits and (not trained or not seen.is_computed)
        values = seen.materialize()
        for name, ask in QUESTIONS.items():
            if name != "log-sum-exp" or dtype != torch.bfloat16:  # which comes in float32
                for part, expected in zip(found[name], ask(values), strict=True):
                    assert torch.equal(part, expected), name
        assert torch.equal(form(logits.materialize()), values)  # and so do all views of one another


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("question", ["topk", "max", "gather", "log-sum-exp"])
def test_their_gradients(form, question):
    def gradients(module, hidden):
        seen = FORMS[form](module(hidden))
        found = QUESTIONS[question](seen)[0]
        if not found.requires_grad:
            return None
        weights = torch.linspace(-1, 2, found.numel(), dtype=found.dtype).view(found.shape)
        return torch.autograd.grad((found * weights).sum(), [hidden, module.weight])

    head, hidden = new_head(torch.float64, chunk_size=5)
    ours, plain = gradients(head, hidden), gradients(head.eval(), hidden)
    assert (ours is None) == (plain is None)
    for one, other in zip(ours or (), plain or (), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:LazyLogits")
@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("trained", [True, False])
def test_words_that_are_not_among_the_best_are_left_out(k, trained):
    """What samplers do: the k-th best word is itself kept."""
    for seed in range(20):
        head, hidden = new_head(chunk_size=3)
        hidden = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(seed)).requires_grad_(trained)
        head.requires_grad_(trained)
        scores = head(hidden)
        kept = scores.masked_fill(scores < torch.topk(scores, k)[0][..., -1:], -torch.inf)
        assert (kept > -torch.inf).sum(-1).tolist() == [k] * 4


def test_gradients_of_logits_computed_from_blocks():
    head, hidden = new_head(torch.float64, chunk_size=5)
    for bias in (None, torch.nn.Parameter(torch.randn(VOCAB, dtype=torch.float64))):
        head.bias = bias
        leaves = [hidden, *head.parameters()]

        def second(module, leaves=leaves):
            logits = module(hidden)
            logits = logits.materialize() if isinstance(logits, LazyLogits) else logits
            loss = (logits / 9).exp().sum()
            first = torch.autograd.grad(loss, leaves, create_graph=True)
            return *first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

        for ours, plain in zip(second(head.train()), second(head.eval()), strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)


def test_few_rows_without_gradients_are_those_of_a_head_in_evaluation():
    head, hidden = new_head(chunk_size=3)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for states in (hidden, hidden[:, -1], hidden[0, 0], hidden.transpose(0, 1)):
            expected = head.eval()(states)
            assert torch.equal((head.train()(states) / 0.7).softmax(-1), (expected / 0.7).softmax(-1))
            assert torch.equal(head(states).argmax(-1), expected.argmax(-1))
            assert torch.equal(head(states)[..., :5].sum(-1), expected[..., :5].sum(-1))
    assert type(head(hidden)) is LazyLogits


def test_many_rows_without_gradients_are_not_computed():
    head = LMHead(8, 2**15)
    hidden = torch.randn(1024, 8)  # 128 MiB of logits
    with torch.no_grad():
        logits = head(hidden)
        size = 1024 * 2**15 * 4
        for ask in (lambda: logits.argmax(-1), lambda: logits.topk(2), lambda: logits.logsumexp(-1)):
            assert largest_allocation(ask) <= size // 2
        with pytest.warns(UserWarning, match="does not follow sigmoid"):
            logits[:3].sigmoid()


def test_losses_of_few_rows_keep_what_the_head_adds():
    head = LMHead(WIDTH, VOCAB, z_loss=0.25, label_smoothing=0.1)
    hidden, target = torch.randn(5, WIDTH), torch.arange(5)
    with torch.no_grad():
        first = head(hidden)
        before = F.cross_entropy(first, target)
        first.softmax(-1)
        torch.testing.assert_close(F.cross_entropy(first, target), before)
